"""Published checkpoints in the models' own keys: recorded cases, real key lists, and those of other models."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from opensora.core import Conditioning, WeightsError
from opensora.core.components import load
from opensora.core.interop import Interop
from opensora.core.weight_sources import locate_weights
from opensora.core.weights import load_weights
from opensora.models import _interop
from opensora.models.dit import DiT
from opensora.models.stdit3 import STDiT3, STDiT3_XL_2

CASES = [
    "pixart_to_stdit",
    "pixart_extend_text",
    "pixart_shrink_text",
    "sigma_to_stdit3",
    "dit_official",
    "latte_official",
]
SMALL = {"hidden_size": 48, "depth": 2, "num_heads": 4}


def make(name, *, size=(1, 8, 8), channels=4, width=16, length=6, **options):
    """A small model of any kind."""
    component = load("models", name)
    options = {**SMALL, **options}
    is_labels = options.get("condition", "").startswith("label")
    text = {"text_width": None if is_labels else width, "text_length": 1 if name in {"DiT", "Latte"} else length}
    keywords = {} if name in {"STDiT2", "STDiT3"} else {"latent_size": size}
    return component(component.Spec(**options), latent_channels=channels, **keywords, **text).eval()


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        std = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter.data, std=std, generator=generator)
    return model


def build(golden, case):
    options = dict(golden.kwargs(case)["model_config"])
    options["width"], options["length"] = options.pop("caption_channels", 16), options.pop("model_max_length", 6)
    options["size"] = tuple(options.pop("input_size", (1, 8, 8)))
    return make(golden.kwargs(case)["model_type"], **options)


# ---- the rules


@pytest.mark.parametrize("case", CASES)
def test_reference_cases(golden, case):
    """Recorded entries come out as recorded; position tables, which were left to the model, are the model's own."""
    golden = golden("ckpt_adapt")
    model = build(golden, case)
    own, expected = model.state_dict(), golden.outputs(case)
    tables = {key: own[key] for key in golden.kwargs(case)["missing"] if key.startswith("pos_embed")}
    adapted = model.adapt_state_dict(golden.inputs(case))
    assert adapted.keys() == expected.keys() | tables.keys()
    assert all(torch.equal(adapted[key], value) for key, value in (expected | tables).items())
    report = model.load_state_dict(adapted, strict=False)
    assert set(report.missing_keys) == set(golden.kwargs(case)["missing"]) - tables.keys()
    assert report.unexpected_keys == golden.kwargs(case)["unexpected"]


@pytest.mark.parametrize("case", CASES)
def test_reference_cases_load_from_their_files(golden, case, tmp_path, monkeypatch):
    """By name, in the wrapping they are published in, and without asking for less than all."""
    golden = golden("ckpt_adapt")
    kwargs = golden.kwargs(case)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained_models").mkdir()
    content = golden.inputs(case)
    torch.save({kwargs["wrapper"]: content} if kwargs["wrapper"] else content, f"pretrained_models/{kwargs['file']}")
    model = build(golden, case)
    report = load_weights(model, kwargs["file"])
    assert report.is_complete
    assert set(report.started) == {key for key in kwargs["missing"] if not key.startswith("pos_embed")}
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in golden.outputs(case).items())


def test_dit_takes_the_weights_of_another_size(golden):
    state = golden("dit_label_image").state
    spec = DiT.Spec(hidden_size=48, depth=2, num_heads=2, condition="label_10")
    model = DiT(spec, latent_channels=4, latent_size=(2, 10, 10), text_width=None)
    model.load_state_dict(model.adapt_state_dict(state))
    assert model.pos_embed_spatial.shape == (1, 25, 48)


@pytest.mark.parametrize("case", ["pixart_extend_text", "pixart_shrink_text"])
def test_null_caption_is_fitted_to_the_length_of_the_text(golden, case):
    golden = golden("ckpt_adapt")
    length = golden.kwargs(case)["model_config"]["model_max_length"]
    model = STDiT3(STDiT3.Spec(hidden_size=12, depth=1, num_heads=2, mlp_ratio=1.0, qk_norm=False), latent_channels=4,
                   text_width=8, text_length=length)  # fmt: skip
    adapted = model.adapt_state_dict(golden.inputs(case))
    key = "y_embedder.y_embedding"
    assert torch.equal(adapted[key], golden.outputs(case)[key])
    assert not model.load_state_dict(adapted, strict=False).unexpected_keys


def test_a_null_caption_means_nothing_to_a_model_of_class_labels(golden):
    adapted = make("DiT", condition="label_3").adapt_state_dict(golden("ckpt_adapt").inputs("pixart_extend_text"))
    assert adapted["y_embedder.y_embedding"].shape == (6, 8)


def test_own_state_comes_back_unchanged(golden):
    state = golden("stdit3_qknorm").state
    model = STDiT3(STDiT3.Spec(hidden_size=48, depth=2, num_heads=4), latent_channels=4, text_width=16, text_length=6)
    adapted = model.adapt_state_dict(state)
    assert adapted.keys() == state.keys()
    assert all(adapted[key] is state[key] for key in state)


def test_real_pixart_keys_fill_the_spatial_half_of_the_preset(golden_json):
    """Published shapes of PixArt-Sigma, in the layout of its own files (2-D patch weights, a position table)."""
    keys = golden_json("keys_PixArt-Sigma-XL-2")["keys"] | {"x_embedder.proj.weight": [1152, 4, 2, 2]}
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    with torch.device("meta"):
        model = STDiT3_XL_2(STDiT3_XL_2.Spec(), latent_channels=4, text_width=4096, text_length=300)
    own = model.state_dict()
    adapted = model.adapt_state_dict(state)
    assert all(own[key].shape == value.shape for key, value in adapted.items())
    missing = {key for key in own if key not in adapted}
    assert all(
        key.startswith(("temporal_blocks.", "fps_embedder.", "rope.")) or "_norm.weight" in key for key in missing
    )
    assert len(own) - len(missing) == len(keys) - 2  # all but the two position tables


# ---- an image model becomes a video model


@pytest.fixture
def conditioning():
    generator = torch.Generator().manual_seed(1)
    return Conditioning(
        text_embedding=torch.randn(2, 6, 16, generator=generator),
        text_mask=torch.tensor([[1] * 6, [1] * 2 + [0] * 4]).bool(),
        fps=torch.tensor([8.0, 24.0]),
        height=torch.full((2,), 512.0),
        width=torch.full((2,), 512.0),
    )


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize(("image", "video"), [("PixArt", "STDiT"), ("PixArt_Sigma", "STDiT3")])
def test_a_video_model_starts_with_the_frames_of_the_image_model(image, video, frames, conditioning, tmp_path):
    image_model = randomise(make(image, no_temporal_pos_emb=True))
    content = image_model.interop.to_original(image_model)
    torch.save({content.wrapper: dict(content.tensors)}, tmp_path / "image.pth")
    options = {"qk_norm": False} if video == "STDiT3" else {}
    model = make(video, size=(frames, 8, 8), **options)
    report = load_weights(model, tmp_path / "image.pth")
    assert report.started
    latents = torch.randn(2, 4, frames, 8, 8, generator=torch.Generator().manual_seed(2))
    timestep = torch.tensor([20.0, 500.0])
    found = model(latents, timestep, conditioning)
    for frame in range(frames):
        expected = image_model(latents[:, :, frame : frame + 1], timestep, conditioning)
        assert expected.abs().max() > 2
        assert (found[:, :, frame : frame + 1] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["STDiT", "STDiT2", "STDiT3"])
def test_new_parts_start_only_where_a_file_has_none_of_them(name, tmp_path):
    model = make(name)
    state = model.state_dict()
    new = [key for key in state if "temp" in key and not key.startswith("pos_embed")]
    save_file({key: value for key, value in state.items() if key != new[-1]}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=f"1 missing: {new[-1]}"):
        load_weights(make(name), tmp_path / "a.safetensors")


def test_the_report_names_the_new_parts(golden, tmp_path, caplog):
    golden = golden("ckpt_adapt")
    save_file(golden.inputs("pixart_to_stdit"), tmp_path / "a.safetensors")
    with caplog.at_level(logging.INFO, "opensora"):
        load_weights(build(golden, "pixart_to_stdit"), tmp_path / "a.safetensors")
    assert "4 of new parts, at their initial values: blocks.0.attn_temp.qkv.weight" in caplog.text


# ---- a small model grows


@torch.no_grad()
@pytest.mark.parametrize("name", ["DiT", "Latte"])
def test_a_deeper_model_whose_blocks_start_as_nothing_computes_the_same(name, tmp_path):
    size = (1, 8, 8) if name == "DiT" else (3, 8, 8)
    small = randomise(make(name, size=size, condition="label_10"))
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    large = make(name, size=size, condition="label_10", depth=4)
    report = load_weights(large, tmp_path / "small.safetensors", grow=True)
    assert set(report.grown) == {key for key in large.state_dict() if key.startswith(("blocks.2.", "blocks.3."))}
    latents, labels = torch.randn(2, 4, *size), Conditioning(labels=torch.tensor([1, 10]))
    timestep = torch.tensor([3.0, 700.0])
    assert torch.equal(large(latents, timestep, labels), small(latents, timestep, labels))


@pytest.mark.parametrize("name", ["PixArt", "STDiT3"])
def test_a_wider_model_has_the_small_one_in_its_corner(name, tmp_path):
    small = randomise(make(name))
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    large = make(name, hidden_size=96)
    report = load_weights(large, tmp_path / "small.safetensors", grow=True)
    assert "blocks.0.mlp.fc1.weight" in {key.removeprefix("spatial_") for key in report.grown}
    own, given = large.state_dict(), small.state_dict()
    for key in small.state_dict():
        if not key.startswith("pos_embed"):
            corner = tuple(slice(length) for length in given[key].shape)
            assert torch.equal(own[key][corner], given[key]), key


def test_a_model_does_not_shrink(tmp_path):
    save_file(make("PixArt", hidden_size=96).state_dict(), tmp_path / "large.safetensors")
    with pytest.raises(WeightsError, match=r"can't grow from \[\d+.*\] to"):
        load_weights(make("PixArt"), tmp_path / "large.safetensors", grow=True)


# ---- files of something else


@pytest.mark.parametrize(
    ("file", "model", "message"),
    [
        (("DiT", {"condition": "label_10"}), "PixArt",
         r'looks like DiT \(or Latte\) with condition "label_10"; for that, use model type "DiT-XL/2"'),
        (("PixArt", {}), "DiT", 'looks like PixArt-alpha; for that, use model type "PixArt-XL/2"'),
        (("PixArt", {"length": 300}), "DiT", 'looks like PixArt-Sigma; for that, use model type "PixArt-Sigma-XL/2"'),
        (("PixArtMS", {}), "PixArt", 'looks like PixArt-alpha at many sizes; for that, use model type "PixArtMS-XL/2"'),
        (("STDiT", {}), "STDiT3", r'looks like STDiT \(Open-Sora 1\.0\); for that, use model type "STDiT-XL/2"'),
        (("STDiT2", {}), "STDiT", r'looks like STDiT2 \(Open-Sora 1\.1\); for that, use model type "STDiT2-XL/2"'),
        (("STDiT3", {}), "STDiT2", r'looks like STDiT3 \(Open-Sora 1\.2\); for that, use model type "STDiT3-XL/2"'),
        (("LatteT2V", {}), "STDiT3", r'looks like Latte for text \(Latte-1\); for that, use model type "LatteT2V-XL/2"'),
        (("PixArt", {"channels": 8}), "PixArt", "it is for 8 latent channels and the VAE has 4"),
        (("PixArt", {"width": 32}), "PixArt", "its text is 32 wide and the text encoder's 16"),
        (("PixArt", {"depth": 3}), "PixArt", "it has 3 blocks of width 48, this model 2 of width 48"),
        (("PixArt", {"hidden_size": 96}), "STDiT", "it has 2 blocks of width 96, this model 2 of width 48"),
        (("PixArt", {"pred_sigma": False}), "PixArt", "one predicts variance values"),
        (("STDiT3", {"qk_norm": False}), "STDiT3", "it lacks norms of queries and keys"),
    ],
)  # fmt: skip
def test_the_file_of_another_model_is_recognised(file, model, message, tmp_path):
    name, options = file
    save_file(make(name, **options).state_dict(), tmp_path / "a.safetensors")
    target = make(model)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_weights(target, tmp_path / "a.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
        (["text_model.embeddings.token_embedding.weight"], "a CLIP text encoder"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], r"an image autoencoder \(vae type"),
        (["spatial_vae.module.encoder.conv_in.weight"], r"the autoencoder of Open-Sora 1\.2 \(vae type"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a U-Net of Stable Diffusion"),
    ],
)
def test_what_is_no_denoiser_is_recognised(keys, message, tmp_path):
    save_file({key: torch.zeros(2) for key in keys}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=f"This looks like {message}.*, not like a denoiser"):
        load_weights(make("STDiT3"), tmp_path / "a.safetensors")


def test_a_folder_of_a_text_encoder_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5EncoderModel"]}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(WeightsError, match="The folder holds a T5 text encoder, not a denoiser"):
        load_weights(make("PixArt"), tmp_path)


def test_a_file_that_looks_like_nothing_gets_the_plain_question(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="Is it another model's file"):
        load_weights(make("PixArt"), tmp_path / "a.safetensors")


# ---- published names


NAMED = [
    "DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt", "Latte-XL-2-256x256-ucf101.pt", "PixArt-XL-2-256x256.pth",
    "PixArt-XL-2-SAM-256x256.pth", "PixArt-XL-2-512x512.pth", "PixArt-XL-2-1024-MS.pth", "PixArt-Sigma-XL-2-256x256.pth",
    "PixArt-Sigma-XL-2-512-MS.pth", "PixArt-Sigma-XL-2-1024-MS.pth", "PixArt-Sigma-XL-2-2K-MS.pth", "PixArt-1B-2.pth",
    "OpenSora-v1-16x256x256.pth", "OpenSora-v1-HQ-16x256x256.pth", "OpenSora-v1-HQ-16x512x512.pth",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["DiT", "Latte", "PixArt", "PixArtMS", "PixArt_Sigma", "STDiT", "STDiT2", "STDiT3", "LatteT2V"]
)
def test_every_denoiser_knows_the_published_names(name):
    interop = load("models", name).interop
    assert isinstance(interop, Interop)
    assert sorted(interop.published) == sorted(NAMED)


def test_a_file_that_was_never_published_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"never published.*Put the file at pretrained_models/PixArt-1B-2\.pth"):
        locate_weights("PixArt-1B-2.pth", published=_interop.PUBLISHED)
