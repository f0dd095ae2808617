"""Models in other projects' layouts: the same numbers as diffusers' classes, the same bits after the way there and back."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora.core import Conditioning, ConfigError, WeightsError
from opensora.core.components import load
from opensora.core.conversion import convert
from opensora.core.weights import load_weights, read_weights, unwrap
from opensora.models._diffusers_keys import from_diffusers

SMALL = {"hidden_size": 48, "depth": 2, "num_heads": 4}
IMAGE = {**SMALL, "no_temporal_pos_emb": True}
TEXT = {"text_width": 16, "text_length": 6}

MODELS = {
    "DiT": ("DiT", {**IMAGE, "condition": "label_10", "frequency_shift": 1}, (1, 8, 8), {"text_width": None}),
    "DiT-XL/4": ("DiT-XL/4", {**IMAGE, "condition": "label_10", "learn_sigma": False, "frequency_shift": 1}, (1, 16, 16),
                 {"text_width": None}),
    "PixArt": ("PixArt", IMAGE, (1, 8, 8), TEXT),
    "PixArt scaled": ("PixArt-XL/2", {**IMAGE, "space_scale": 2.0, "pred_sigma": False}, (1, 8, 8), TEXT),
    "PixArt oblong": ("PixArt", {**IMAGE, "base_size": 16}, (1, 6, 12), TEXT),
    "PixArtMS": ("PixArtMS", {**IMAGE, "space_scale": 2.0}, (1, 8, 8), TEXT),
    "PixArt-Sigma": ("PixArt_Sigma", IMAGE, (1, 8, 8), TEXT),
    "PixArt-Sigma scaled": ("PixArt-Sigma-XL/2", {**IMAGE, "space_scale": 0.5, "base_size": 12}, (1, 8, 8), TEXT),
    "LatteT2V": ("LatteT2V", SMALL, (3, 8, 8), TEXT),
}  # fmt: skip


def build(name, options, size, text):
    component = load("models", name)
    model = component(component.Spec(**options), latent_channels=4, latent_size=size, **text)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        std = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter.data, std=std, generator=generator)
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request):
    return build(*MODELS[request.param])


@pytest.fixture
def inputs():
    """(latents of a size, timesteps, conditions, pixel sizes) for any of the models."""

    def make(size):
        generator = torch.Generator().manual_seed(1)
        height, width = (torch.full((3,), 8.0 * side) for side in size[1:])
        mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] + [0] * 5]).bool()
        conditioning = Conditioning(
            text_embedding=torch.randn(3, 6, 16, generator=generator),
            text_mask=mask if size[0] == 1 else None,  # diffusers' Latte takes none
            labels=torch.tensor([0, 5, 10]),
            height=height,
            width=width,
            aspect_ratio=height / width,
        )
        return torch.randn(3, 4, *size, generator=generator), torch.tensor([3.0, 20.0, 500.0]), conditioning

    return make


def run_theirs(network, latents, timestep, conditioning):
    """The same call, as diffusers' classes take it."""
    if isinstance(network, diffusers.DiTTransformer2DModel):
        return network(latents[:, :, 0], timestep, conditioning.labels).sample[:, :, None]
    if isinstance(network, diffusers.LatteTransformer3DModel):
        return network(latents, timestep, conditioning.text_embedding).sample
    sizes = {
        "resolution": torch.stack([conditioning.height, conditioning.width], dim=1),
        "aspect_ratio": conditioning.aspect_ratio[:, None],
    }
    return network(
        latents[:, :, 0],
        conditioning.text_embedding,
        timestep,
        sizes,
        encoder_attention_mask=conditioning.text_mask,
    ).sample[:, :, None]


def read_theirs(folder):
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder, low_cpu_mem_usage=False).eval()


def save_own(model, folder):
    """In this project's layout, as training leaves it (and so without a config)."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def type_of(model):
    return next(name for name, *_ in MODELS.values() if type(model) is load("models", name))


def options_of(model):
    """What neither type nor tensors tell."""
    names = ("num_heads", "space_scale", "base_size", "frequency_shift")
    return {name: getattr(model.spec, name) for name in names if hasattr(model.spec, name)}


def convert_own(model, tmp_path, to, name):
    source = save_own(model, tmp_path / "source")
    return convert(source, tmp_path / name, to=to, model=type_of(model), options=options_of(model),
                   latent_size=model.latent_size)  # fmt: skip


# ---- the same numbers


@torch.no_grad()
def test_diffusers_computes_what_the_model_here_does(model, inputs, tmp_path):
    network = read_theirs(convert_own(model, tmp_path, "diffusers", "theirs"))
    latents, timestep, conditioning = inputs(model.latent_size)
    expected = model(latents, timestep, conditioning)
    assert expected.abs().max() > 2
    assert (run_theirs(network, latents, timestep, conditioning) - expected).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["PixArtMS", "PixArt-Sigma", "PixArt-Sigma scaled"])
def test_so_it_does_at_other_sizes(name, inputs, tmp_path):
    model = build(*MODELS[name])
    network = read_theirs(convert_own(model, tmp_path, "diffusers", "theirs"))
    latents, timestep, conditioning = inputs((1, 6, 14))
    difference = run_theirs(network, latents, timestep, conditioning) - model(latents, timestep, conditioning)
    assert difference.abs().max() <= 1e-5


THEIRS = {
    "DiT": (diffusers.DiTTransformer2DModel, {"num_embeds_ada_norm": 10, "sample_size": 8, "out_channels": 8}),
    "PixArt": (diffusers.PixArtTransformer2DModel, {"sample_size": 8, "caption_channels": 16, "cross_attention_dim": 24}),
    "PixArtMS": (
        diffusers.PixArtTransformer2DModel,
        {"sample_size": 128, "caption_channels": 16, "cross_attention_dim": 24, "use_additional_conditions": True},
    ),
    "PixArt_Sigma": (
        diffusers.PixArtTransformer2DModel,
        {"sample_size": 128, "caption_channels": 16, "cross_attention_dim": 24, "use_additional_conditions": False},
    ),
    "LatteT2V": (
        diffusers.LatteTransformer3DModel,
        {"sample_size": 8, "caption_channels": 16, "cross_attention_dim": 24, "out_channels": 8, "video_length": 3,
         "attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single",
         "norm_elementwise_affine": False, "norm_eps": 1e-6},
    ),
}  # fmt: skip


@pytest.fixture(params=THEIRS)
def their_folder(request, tmp_path):
    """(type here, their network, the folder that it saved itself into)."""
    network_class, config = THEIRS[request.param]
    torch.manual_seed(0)
    network = network_class(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, num_layers=2, patch_size=2, **config
    ).eval()
    with torch.no_grad():
        if request.param == "DiT":  # all blocks start with the same embedders, as published weights have them
            for block in network.transformer_blocks:
                block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    network.save_pretrained(tmp_path / "theirs")
    return request.param, network, tmp_path / "theirs"


@torch.no_grad()
def test_a_folder_of_diffusers_loads_as_it_is(their_folder, inputs):
    name, network, folder = their_folder
    component = load("models", name)
    config = json.loads((folder / "config.json").read_text())
    facts = component.interop.facts(load_file(folder / "diffusion_pytorch_model.safetensors"), config)
    size = (3, 8, 8) if name == "LatteT2V" else (1, 8, 8)
    built_for = (1, 128, 128) if component in (load("models", "PixArtMS"), load("models", "PixArt_Sigma")) else size
    assert facts.latent_size == built_for
    text = {"text_width": None} if name == "DiT" else {"text_width": facts.text_width, "text_length": 6}
    model = component(component.Spec(**facts.options), latent_channels=4, latent_size=built_for, **text).eval()
    load_weights(model, folder)
    latents, timestep, conditioning = inputs(size)
    difference = model(latents, timestep, conditioning) - run_theirs(network, latents, timestep, conditioning)
    assert difference.abs().max() <= 1e-5


def test_the_transformer_of_a_pipeline_s_folder_is_found(their_folder, tmp_path):
    name, _, folder = their_folder
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    folder.rename(pipeline / "transformer")
    (pipeline / "model_index.json").write_text("{}")
    written = convert(pipeline, tmp_path / "own", to="opensora", model=name)
    assert json.loads((written / "config.json").read_text())["type"] == name


# ---- the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "way", [("diffusers", "opensora"), ("original", "diffusers", "original", "opensora")], ids=" ".join
)
def test_there_and_back_is_the_same_to_the_last_bit(model, dtype, way, tmp_path):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if hasattr(model.y_embedder, "y_embedding"):
        model.y_embedder.y_embedding = torch.randn(6, 16).to(dtype)
    if "original" in way and not model.interop.to_original:
        pytest.skip("has no original layout")
    names = [f"{index}.pt" if to == "original" else str(index) for index, to in enumerate(way)]
    convert_own(model, tmp_path, way[0], names[0])
    for (before, name), to in zip(pairwise(names), way[1:], strict=True):
        convert(tmp_path / before, tmp_path / name, to=to, model=type_of(model), options=options_of(model),
                latent_size=model.latent_size)  # fmt: skip
    result, expected = read_weights(tmp_path / names[-1]), model.state_dict()
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        assert result[key].dtype is value.dtype, key
        assert torch.equal(result[key], value), key


FULL = {
    "DiT-XL/2": ("DiT-XL-2-label_1000", {"condition": "label_1000"}, {"text_width": None}, 32),
    "PixArt-XL/2": ("PixArt-XL-2", {}, {"text_width": 4096, "text_length": 120}, 64),
    "PixArt-1B/2": ("PixArt-1B-2", {}, {"text_width": 4096, "text_length": 300}, 256),
    "PixArtMS-XL/2": ("PixArtMS-XL-2", {}, {"text_width": 4096, "text_length": 120}, 128),
    "PixArt-Sigma-XL/2": ("PixArt-Sigma-XL-2", {}, {"text_width": 4096, "text_length": 300}, 128),
    "LatteT2V-XL/2": (None, {}, {"text_width": 4096, "text_length": 120}, 64),
}


@pytest.mark.parametrize("name", FULL)
def test_real_presets_have_the_keys_of_diffusers_own_and_come_back(name, golden_json):
    """Rows are told apart by what they hold, for a byte an entry."""
    table, options, text, side = FULL[name]
    component = load("models", name)
    video = name.startswith("Latte")
    options = options if video else {**options, "no_temporal_pos_emb": True}
    size = (16 if video else 1, side, side)
    with torch.device("meta"):
        model = component(component.Spec(**options), latent_channels=4, latent_size=size, **text)
    if (
        table and name != "PixArt-1B/2"
    ):  # the tables of keys were made for other latents: but for position tables, all agree
        keys = golden_json(f"keys_{table}")["keys"]
        assert {key for key in keys if "pos_embed" not in key} <= model.state_dict().keys()
    state = {key: tagged(index, value.shape) for index, (key, value) in enumerate(model.state_dict().items())}
    model.requires_grad_(False).load_state_dict(state, assign=True)
    exported = model.interop.to_diffusers(model)
    with torch.device("meta"):
        network = getattr(diffusers, exported.config["_class_name"]).from_config(dict(exported.config))
    theirs = {key: value.shape for key, value in network.state_dict().items()}
    assert {key: value.shape for key, value in exported.tensors.items()} == theirs
    back = model.adapt_state_dict({**exported.tensors, **exported.extra})
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key


def tagged(index, shape):
    rows = (torch.arange(shape[0] if shape else 1) * 7 + index * 31) % 251
    return rows.to(torch.uint8).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


# ---- the originals' layouts


def test_image_models_are_written_as_their_projects_write_them(tmp_path):
    dit = torch.load(convert_own(build(*MODELS["DiT"]), tmp_path, "original", "dit.pt"), weights_only=True)
    assert dit["x_embedder.proj.weight"].shape == (48, 4, 2, 2)
    assert dit["pos_embed"].shape == (1, 16, 48)
    assert not {"pos_embed_spatial", "pos_embed_temporal"} & dit.keys()


def test_pixart_and_latte_come_in_their_wrappers(tmp_path):
    for name, options, size, text in (
        MODELS["PixArt"],
        ("Latte", {**SMALL, "condition": "label_10"}, (3, 8, 8), {"text_width": None}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        model = build(name, options, size, text)
        save_own(model, folder / "source")
        file = convert(folder / "source", folder / "a.pth", to="original", model=name, options={"num_heads": 4},
                       latent_size=size)  # fmt: skip
        content = torch.load(file, weights_only=True)
        assert list(content) == ["state_dict" if name == "PixArt" else "ema"]
        (inner,) = content.values()
        assert inner["x_embedder.proj.weight"].dim() == 4
        assert inner["pos_embed"].shape == (1, 16, 48)
        assert ("temp_embed" in inner) == (name == "Latte")
        load_weights(model, file)


@pytest.mark.parametrize(
    ("name", "size"), [("STDiT", (2, 8, 8)), ("STDiT2", None), ("STDiT3", None), ("PixArt", (3, 8, 8))]
)
def test_video_models_are_written_with_open_soras_keys(name, size, tmp_path):
    component = load("models", name)
    keywords = {"latent_size": size} if size else {}
    model = component(component.Spec(**SMALL), latent_channels=4, **keywords, **TEXT)
    source = save_own(model, tmp_path / "source")
    file = convert(source, tmp_path / "a.pt", to="original", model=name, options={"num_heads": 4}, latent_size=size)
    written = unwrap(read_weights(file))
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[key], value) for key, value in model.state_dict().items())


# ---- autoencoders


@pytest.fixture
def vae_folder(tmp_path):
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    network.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@torch.no_grad()
def test_an_image_autoencoder_goes_both_ways(vae_folder, tmp_path):
    options = {"from_pretrained": str(vae_folder)}
    file = convert(vae_folder, tmp_path / "vae.pt", to="original", model="VideoAutoencoderKL")
    assert all(key.startswith("module.") for key in torch.load(file, weights_only=True))
    back = convert(file, tmp_path / "back", to="diffusers", model="VideoAutoencoderKL", options=options)
    theirs, ours = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (vae_folder, back))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    network = diffusers.AutoencoderKL.from_pretrained(back, low_cpu_mem_usage=False).eval()
    component = load("vaes", "VideoAutoencoderKL")
    vae = component(component.Spec(from_pretrained=str(back)))
    video = torch.randn(1, 3, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = network.encode(video[0].transpose(0, 1)).latent_dist.mean.transpose(0, 1)[None]
    assert (vae.encode(video) - latents * 0.18215).abs().max() <= 1e-5
    decoded = network.decode(latents[0].transpose(0, 1)).sample.transpose(0, 1)[None]
    assert (vae.decode(latents * 0.18215, num_frames=2) - decoded).abs().max() <= 1e-5


def test_an_autoencoder_has_no_third_layout(vae_folder, tmp_path):
    with pytest.raises(WeightsError, match='VideoAutoencoderKL has no layout "opensora"; it has original, diffusers'):
        convert(vae_folder, tmp_path / "own", to="opensora", model="VideoAutoencoderKL")


# ---- what can't be


@pytest.mark.parametrize(
    ("name", "options", "size", "text", "message"),
    [
        ("DiT", {**IMAGE, "condition": "text"}, (1, 8, 8), {"text_width": 16, "text_length": 1}, "takes class labels only"),
        ("DiT", {**SMALL, "condition": "label_3"}, (1, 8, 8), {"text_width": None}, "set no_temporal_pos_emb = True"),
        ("DiT", {**IMAGE, "condition": "label_3"}, (2, 8, 8), {"text_width": None}, "2 latent frames; it makes images"),
        ("DiT", {**IMAGE, "condition": "label_3", "class_dropout_prob": 0.0}, (1, 8, 8), {"text_width": None}, "no null"),
        ("PixArt", {**IMAGE, "patch_size": (2, 2, 2)}, (2, 8, 8), TEXT, r"patch_size \(2, 2, 2\)"),
        ("PixArt", {**IMAGE, "mlp_ratio": 2.0}, (1, 8, 8), TEXT, r"mlp_ratio 2\.0; it takes 4"),
        ("PixArt_Sigma", {**IMAGE, "qk_norm": True}, (1, 8, 8), TEXT, "normalised queries and keys"),
        ("LatteT2V", {**SMALL, "space_scale": 2.0}, (3, 8, 8), TEXT, r"space_scale 2\.0 at 8 latents; it takes 1"),
    ],
)  # fmt: skip
def test_what_diffusers_has_nothing_for_is_said(name, options, size, text, message):
    model = build(name, options, size, text)
    with pytest.raises(WeightsError, match=rf"diffusers' \w+ can't stand for this model, which has .*{message}"):
        model.interop.to_diffusers(model)


@pytest.mark.parametrize("name", ["STDiT3", "Latte"])
def test_a_model_without_a_counterpart_says_what_it_has(name, tmp_path):
    component = load("models", name)
    options = {**SMALL, "condition": "label_3"} if name == "Latte" else SMALL
    keywords = {"latent_size": (3, 8, 8), "text_width": None} if name == "Latte" else TEXT
    source = save_own(component(component.Spec(**options), latent_channels=4, **keywords), tmp_path / "source")
    with pytest.raises(WeightsError, match=rf'{name} has no layout "diffusers"; it has opensora, original'):
        convert(source, tmp_path / "a", to="diffusers", model=name, options={"num_heads": 4}, latent_size=(3, 8, 8))
    assert not (tmp_path / "a").exists()


def test_a_dit_whose_blocks_have_embedders_of_their_own_is_refused():
    network = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=12, num_layers=2, sample_size=8)
    with pytest.raises(WeightsError, match=r'embedders that differ .* use type "diffusers"'):
        from_diffusers(network.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "CogVideoXTransformer3DModel"}, 'holds diffusers\' CogVideoX.*Use model type "diffusers"'),
        (
            {"_class_name": "AutoencoderKL"},
            r"holds diffusers' AutoencoderKL, and PixArt takes PixArtTransformer2DModel\.$",
        ),
        ({"activation_fn": "geglu"}, "has activation_fn = 'geglu', which no model here does"),
        ({"num_attention_heads": 2}, r"has 2 heads: set model\.num_heads, now 4"),
    ],
)
def test_a_folder_whose_config_says_otherwise_is_refused(change, message, tmp_path):
    model = build(*MODELS["PixArt"])
    folder = convert_own(model, tmp_path, "diffusers", "theirs")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        load_weights(model, folder)


def test_differences_that_a_model_could_follow_are_told(tmp_path, caplog):
    folder = convert_own(build(*MODELS["PixArt scaled"]), tmp_path, "diffusers", "theirs")
    name, options, size, text = MODELS["PixArt scaled"]
    model = build(name, {**options, "space_scale": 1.0}, size, text)
    with caplog.at_level(logging.WARNING, "opensora"):
        load_weights(model, folder)
    assert "space_scale is 2.0 there and 1.0 here" in caplog.text


@pytest.mark.parametrize("their_folder", [name for name in THEIRS if name != "DiT"], indirect=True)  # it has classes
def test_a_missing_null_caption_becomes_zeros_and_is_told(their_folder, caplog):
    name, _, folder = their_folder
    component = load("models", name)
    config = json.loads((folder / "config.json").read_text())
    facts = component.interop.facts(load_file(folder / "diffusion_pytorch_model.safetensors"), config)
    model = component(component.Spec(**facts.options), latent_channels=4, latent_size=facts.latent_size, **TEXT)
    with caplog.at_level(logging.WARNING, "opensora"):
        load_weights(model, folder)
    assert "no null caption" in caplog.text
    assert not model.y_embedder.y_embedding.any()


def test_type_is_needed_for_what_does_not_name_it(their_folder, tmp_path):
    _, _, folder = their_folder
    with pytest.raises(ConfigError, match="does not say of which model it is: give --model"):
        convert(folder, tmp_path / "own", to="opensora")
