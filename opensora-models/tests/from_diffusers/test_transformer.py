"""Transformers of diffusers as denoisers: the same numbers as their own pipelines, folders, and what can't be."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from safetensors.torch import save_file

from opensora.core.components import build
from opensora.core.composing import checkpoint_activations
from opensora.core.conditioning import Conditioning
from opensora.core.conversion import convert
from opensora.core.errors import ConfigError, ShapeError, WeightsError
from opensora.core.machine import probe_dtype
from opensora.core.testing import check_denoiser
from opensora.core.weights import load_weights
from opensora.models.from_diffusers._layouts import crop_region
from opensora.models.from_diffusers._schedules import COGVIDEOX_2B
from opensora.models.from_diffusers.transformer import DiffusersTransformer

SIZE = (3, 8, 8)
STEPS = 4
SCALE = 3.0


def make(options, *, size=SIZE, channels=4, width=16, length=6) -> DiffusersTransformer:
    torch.manual_seed(0)
    keywords = {"latent_channels": channels, "latent_size": size, "text_width": width, "text_length": length}
    return build("models", {"type": "diffusers", **options}, **keywords).eval()


def image_size(name):
    return (1, *SIZE[1:]) if "2D" in name else SIZE


def make_of(tiny_transformer, name, **options) -> DiffusersTransformer:
    return make(tiny_transformer(name) | options, size=image_size(name), width=None if "DiT" in name else 16)


def example(name, batch=2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    draw = torch.Generator().manual_seed(1)
    size = image_size(name)
    shared = {key: torch.full((batch,), value) for key, value in {"fps": 24.0, "height": 64.0, "width": 64.0}.items()}
    shared |= {"num_frames": torch.full((batch,), 9.0 if size[0] > 1 else 1.0), "aspect_ratio": torch.ones(batch)}
    if "DiT" in name:
        told = Conditioning(labels=torch.arange(batch) % 4, **shared)
    else:
        mask = torch.arange(6)[None] < torch.tensor([6, 3])[:batch, None]
        told = Conditioning(text_embedding=torch.randn(batch, 6, 16, generator=draw), text_mask=mask, **shared)
    return torch.randn(batch, 4, *size, generator=draw), torch.tensor([800.0, 250.0])[:batch], told


# ---- what every denoiser does


def test_passes_the_conformance_kit(class_name, tiny_transformer):
    check_denoiser(
        "diffusers",
        latent_size=image_size(class_name),
        text_width=None if "DiT" in class_name else 16,
        **tiny_transformer(class_name),
    )


def test_activation_checkpointing_changes_no_gradient(class_name, tiny_transformer):
    model = make_of(tiny_transformer, class_name).train()
    inputs = example(class_name)

    def gradients():
        model.zero_grad()
        model(*inputs).square().mean().backward()
        return {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}

    plain = gradients()
    config = model.module.config
    blocks = config.num_layers * (2 if "Latte" in class_name else 1) + config.get("num_single_layers", 0)
    refiner = config.get("num_refiner_layers", 0)
    assert checkpoint_activations(model) == blocks + refiner  # blocks, and not the lists within them
    torch.testing.assert_close(gradients(), plain)


@pytest.mark.skipif(probe_dtype("cpu", "bf16") is not None, reason="this CPU has no bf16 products")
def test_half_precision_weights(class_name, tiny_transformer):
    model = make_of(tiny_transformer, class_name)
    expected = model(*example(class_name))
    found = model.bfloat16()(*example(class_name))
    assert found.dtype is torch.float32
    assert (found - expected).norm() <= 0.1 * expected.norm()


def test_runs_on_the_meta_device(class_name, tiny_transformer):
    with torch.device("meta"):
        model = make_of(tiny_transformer, class_name)
    latents, timestep, told = example(class_name)
    predicted = model(latents.to("meta"), timestep.to("meta"), told.to("meta"))
    assert predicted.is_meta
    assert predicted.shape == latents.shape


# ---- the same as diffusers' own pipelines


def sample_here(model, noise, told, levels):
    """Euler steps of rectified flow with guidance; ``levels`` are u from 1 to 0."""
    latents = noise
    for u, following in pairwise(levels):
        timestep = u.expand(len(noise)) * 1000
        conditional, null = model(latents, timestep, told), model(latents, timestep, told.unconditional())
        latents = latents + (null + SCALE * (conditional - null)) * (u - following)
    return latents


def prompts(length=6, width=16):
    """Embedding and mask of a prompt, and of what a dropped one is replaced by."""
    draw = torch.Generator().manual_seed(2)
    mask = torch.arange(length)[None] < 4
    null_mask = torch.arange(length)[None] < 1
    return (torch.randn(1, length, width, generator=draw), mask), (
        torch.randn(1, length, width, generator=draw),
        null_mask,
    )


class EvenEuler(diffusers.FlowMatchEulerDiscreteScheduler):
    """The steps of this project's rflow: evenly down to 0."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        steps = num_inference_steps or len(sigmas)
        super().set_timesteps(device=device, sigmas=[1 - step / steps for step in range(steps)])


def run_pipeline(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent", **options).frames


def test_sampled_like_the_wan_pipeline(tiny_transformer):
    model = make_of(tiny_transformer, "WanTransformer3DModel")
    (text, mask), (null, null_mask) = prompts()
    model.take_null_text(Conditioning(text_embedding=null, text_mask=null_mask))
    noise = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(3))
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=EvenEuler(), transformer=model.module
    )
    expected = run_pipeline(
        pipeline,
        prompt_embeds=text * mask[..., None],
        negative_prompt_embeds=null * null_mask[..., None],
        latents=noise.clone(),
        height=64,
        width=64,
        num_frames=9,
    )
    told = Conditioning(text_embedding=text, text_mask=mask)
    found = sample_here(model, noise, told, torch.linspace(1, 0, STEPS + 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_sampled_like_the_ltx_pipeline(tiny_transformer):
    model = make_of(tiny_transformer, "LTXVideoTransformer3DModel")
    (text, mask), (null, null_mask) = prompts()
    model.take_null_text(Conditioning(text_embedding=null, text_mask=null_mask))
    size = (3, 4, 8)
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3))
    pipeline = diffusers.LTXPipeline(
        scheduler=EvenEuler(), vae=None, text_encoder=None, tokenizer=None, transformer=model.module
    )
    expected = run_pipeline(
        pipeline,
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt_embeds=null,
        negative_prompt_attention_mask=null_mask,
        latents=noise.flatten(2).transpose(1, 2).clone(),
        height=128,
        width=256,
        num_frames=17,
        frame_rate=24,
    )
    told = Conditioning(
        text_embedding=text,
        text_mask=mask,
        fps=torch.tensor([24.0]),
        height=torch.tensor([128.0]),
        width=torch.tensor([256.0]),
        num_frames=torch.tensor([17.0]),
    )
    found = sample_here(model, noise, told, torch.linspace(1, 0, STEPS + 1))
    torch.testing.assert_close(found, expected.transpose(1, 2).unflatten(2, size), atol=1e-5, rtol=1e-5)


def test_sampled_like_the_mochi_pipeline(tiny_transformer, monkeypatch):
    model = make_of(tiny_transformer, "MochiTransformer3DModel")
    (text, mask), (null, null_mask) = prompts()
    model.take_null_text(Conditioning(text_embedding=null, text_mask=null_mask))
    noise = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(3))
    pipeline = diffusers.MochiPipeline(
        scheduler=EvenEuler(invert_sigmas=True), vae=None, text_encoder=None, tokenizer=None, transformer=model.module
    )
    expected = run_pipeline(
        pipeline,
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt_embeds=null,
        negative_prompt_attention_mask=null_mask,
        latents=noise.clone(),
        height=64,
        width=64,
        num_frames=13,
    )
    told = Conditioning(text_embedding=text, text_mask=mask)
    found = sample_here(model, noise, told, torch.linspace(1, 0, STEPS + 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_sampled_like_the_hunyuan_video_pipeline(tiny_transformer):
    model = make_of(tiny_transformer, "HunyuanVideoTransformer3DModel", embedded_guidance=4.0)
    (text, mask), (null, null_mask) = prompts()
    noise = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(3))
    pooled, null_pooled = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(4))
    model.take_null_text(Conditioning(text_embedding=null, text_mask=null_mask, extra={"pooled_text": null_pooled}))
    pipeline = diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=model.module,
        vae=None,
        scheduler=EvenEuler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=text,
        prompt_attention_mask=mask,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=null,
        negative_prompt_attention_mask=null_mask,
        negative_pooled_prompt_embeds=null_pooled,
        true_cfg_scale=SCALE,
        guidance_scale=4.0,
        num_inference_steps=STEPS,
        latents=noise.clone(),
        height=64,
        width=64,
        num_frames=9,
        output_type="latent",
    ).frames
    told = Conditioning(text_embedding=text, text_mask=mask, extra={"pooled_text": pooled})
    found = sample_here(model, noise, told, torch.linspace(1, 0, STEPS + 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "snr_shift_scale"),
    [({}, 3.0), ({"use_rotary_positional_embeddings": True}, 1.0)],
    ids=["2b", "5b"],
)
def test_v_prediction_sampled_as_rectified_flow_is_what_ddim_samples(tiny_transformer, changes, snr_shift_scale):
    """Between the same noise levels the two take the same steps, though the pipeline knows nothing of straight paths."""
    schedule = COGVIDEOX_2B | {"snr_shift_scale": snr_shift_scale}
    name = "CogVideoXTransformer3DModel"
    model = make(tiny_transformer(name, attention_head_dim=16, **changes) | {"noise_schedule": schedule})
    (text, _), (null, _) = prompts()
    model.take_null_text(Conditioning(text_embedding=null))
    noise = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(3))
    scheduler = diffusers.CogVideoXDDIMScheduler(
        **schedule, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model.module, scheduler=scheduler
    )
    expected = run_pipeline(
        pipeline,
        prompt_embeds=text,
        negative_prompt_embeds=null,
        latents=noise.transpose(1, 2).clone(),
        height=64,
        width=64,
        num_frames=9,
    )
    kept = scheduler.alphas_cumprod[[999, 749, 499, 249]].double()
    ratio = ((1 - kept) / kept).sqrt()  # noise over data
    levels = torch.cat([torch.where(kept > 0, ratio / (1 + ratio), 1.0), torch.zeros(1, dtype=torch.float64)]).float()
    found = sample_here(model, noise, Conditioning(text_embedding=text), levels)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (30, 45), (45, 30), (48, 85)])
def test_rotary_crops_are_the_pipelines(grid):
    assert crop_region(grid, (30, 45)) == get_resize_crop_region_for_grid(grid, 45, 30)


def test_cogvideox_1_5_pads_an_odd_number_of_latent_frames(tiny_transformer):
    changes = {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "attention_head_dim": 16}
    model = make(tiny_transformer("CogVideoXTransformer3DModel", **changes))
    latents, timestep, told = example("CogVideoX")
    assert model(latents, timestep, told).shape == latents.shape


def test_epsilon_and_timesteps_reach_and_leave_the_class_unchanged(tiny_transformer):
    model = make_of(tiny_transformer, "PixArtTransformer2DModel")
    latents, timestep, told = example("PixArt 2D")
    expected = model.module(
        latents.squeeze(2),
        encoder_hidden_states=told.text_embedding,
        encoder_attention_mask=told.text_mask,
        timestep=timestep,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    torch.testing.assert_close(model(latents, timestep, told), expected.unsqueeze(2))


def test_large_pixart_is_told_the_size(tiny_transformer):
    changes = {"use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 24}
    model = make(tiny_transformer("PixArtTransformer2DModel", **changes), size=(1, 8, 8))
    torch.nn.init.normal_(model.module.adaln_single.emb.resolution_embedder.linear_2.weight)
    latents, timestep, told = example("PixArt 2D")
    wider = told.replace(width=told.width * 2)
    assert not torch.allclose(model(latents, timestep, told), model(latents, timestep, wider))


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "LTXVideoTransformer3DModel"])
def test_given_frames_are_told_that_they_are_clean(tiny_transformer, name):
    model = make_of(tiny_transformer, name)
    latents, timestep, told = example(name)
    mask = torch.ones(2, SIZE[0], dtype=torch.bool)
    everything = model(latents, timestep, told.replace(frame_mask=mask))
    torch.testing.assert_close(everything, model(latents, timestep, told), atol=1e-5, rtol=1e-5)
    nothing = model(latents, timestep, told.replace(frame_mask=~mask))
    torch.testing.assert_close(nothing, model(latents, torch.zeros(2), told), atol=1e-5, rtol=1e-5)


def test_dropped_captions_become_the_negative_prompt(tiny_transformer):
    model = make_of(tiny_transformer, "WanTransformer3DModel", negative_prompt="blurred")
    assert model.null_prompt == "blurred"
    latents, timestep, told = example("Wan")
    null = Conditioning(text_embedding=torch.randn(1, 6, 16), text_mask=torch.arange(6)[None] < 2)
    model.take_null_text(null)
    dropped = model(latents, timestep, told.replace(dropped=torch.tensor([False, True])))
    torch.testing.assert_close(dropped[:1], model(latents[:1], timestep[:1], told[[0]]))
    torch.testing.assert_close(dropped[1:], model(latents[1:], timestep[1:], null))


# ---- folders


@pytest.fixture
def pipeline_folder(tiny_transformer, tmp_path):
    """A pipeline as diffusers saves it, of a transformer and a noise schedule."""
    model = make_of(tiny_transformer, "CogVideoXTransformer3DModel")
    schedule = COGVIDEOX_2B | {"snr_shift_scale": 1.0}
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=model.module,
        scheduler=diffusers.CogVideoXDDIMScheduler(**schedule),
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline", model


@pytest.mark.parametrize("inside", ["", "transformer"], ids=["pipeline", "transformer"])
def test_a_folder_gives_class_size_weights_and_noise_schedule(pipeline_folder, inside):
    folder, model = pipeline_folder
    source = str(folder / inside)
    loaded = make({"from_pretrained": source})
    load_weights(loaded, source)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    inputs = example("CogVideoX")
    assert not torch.equal(loaded(*inputs), model(*inputs))  # another schedule: that of the folder
    expected = make({"from_pretrained": source, "noise_schedule": COGVIDEOX_2B})
    load_weights(expected, source)
    assert torch.equal(expected(*inputs), model(*inputs))


def test_arguments_in_the_config_go_before_the_folders(pipeline_folder):
    folder, _ = pipeline_folder
    assert make({"from_pretrained": str(folder), "config": {"num_layers": 1}}).module.config.num_layers == 1


def test_a_missing_noise_schedule_is_reported(pipeline_folder, tmp_path, caplog):
    folder, _ = pipeline_folder
    (folder / "transformer").rename(tmp_path / "alone")
    with caplog.at_level(logging.INFO):
        make({"from_pretrained": str(tmp_path / "alone")})
    assert "noise_schedule is not given: using that of CogVideoX-2b" in caplog.text


def test_written_as_diffusers_writes_it(class_name, tiny_transformer, tmp_path):
    model = make_of(tiny_transformer, class_name)
    exported = model.interop.to_diffusers(model)
    model.module.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: value for key, value in exported.config.items() if key[0] != "_"} == {
        key: value for key, value in written.items() if key[0] != "_"
    }
    cls = getattr(diffusers, exported.config["_class_name"])
    assert cls.from_config(exported.config).load_state_dict(exported.tensors)
    facts = model.interop.facts(exported.tensors, written)
    assert facts.latent_channels == 4
    assert facts.text_width == (None if "DiT" in class_name else 16)
    keywords = {"latent_channels": 4, "text_width": facts.text_width, "text_length": 6, "latent_size": None}
    again = build("models", {"type": "diffusers", **facts.options}, **keywords)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_converted_by_the_command(pipeline_folder, tmp_path):
    folder, model = pipeline_folder
    convert(folder, tmp_path / "converted", to="diffusers", model="diffusers")
    written = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "converted", low_cpu_mem_usage=False)
    assert all(torch.equal(each, model.module.state_dict()[key]) for key, each in written.state_dict().items())


def test_tensors_alone_say_no_class(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"don't say which class .*save_pretrained"):
        convert(tmp_path / "weights.safetensors", tmp_path / "converted", to="diffusers", model="diffusers")


# ---- what can't be


def test_unknown_class(tiny_transformer):
    with pytest.raises(ConfigError, match=r'no Transformer class "WanTransfomer3DModel".*mean "WanTransformer3DModel"'):
        make({"class_name": "WanTransfomer3DModel"})


def test_no_class():
    with pytest.raises(ConfigError, match=r"model names no class: set model\.from_pretrained"):
        make({})


def test_class_that_wants_more():
    with pytest.raises(
        ConfigError, match=r"FluxTransformer2DModel can't be driven: its forward takes .*pooled_projections"
    ):
        make({"class_name": "FluxTransformer2DModel"})


def test_class_that_is_not_listed_needs_its_prediction():
    options = {
        "class_name": "SkyReelsV2Transformer3DModel",
        "config": {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 1, "text_dim": 16},
    }
    with pytest.raises(ConfigError, match="can't be driven"):
        make(options)
    options = {
        "class_name": "AuraFlowTransformer2DModel",
        "config": {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 64,
            "sample_size": 8,
        },
    }
    with pytest.raises(ConfigError, match=r"What AuraFlowTransformer2DModel predicts is not known"):
        make(options, size=(1, 8, 8))
    model = make(options | {"prediction": "flow", "timesteps": (0.0, 1.0)}, size=(1, 8, 8))
    latents, timestep, told = example("AuraFlow 2D")
    assert model(latents, timestep, told).shape == latents.shape


def test_unknown_argument(tiny_transformer):
    with pytest.raises(ConfigError, match=r'model\.config\.num_layer is no argument.*Did you mean "num_layers"'):
        make(tiny_transformer("WanTransformer3DModel", num_layer=3))


def test_arguments_that_do_not_go_together(tiny_transformer):
    changes = {"use_learned_positional_embeddings": True}
    with pytest.raises(ConfigError, match=r"CogVideoXTransformer3DModel can't be built from model.config \(ValueError"):
        make(tiny_transformer("CogVideoXTransformer3DModel", **changes))


def test_two_classes(pipeline_folder):
    folder, _ = pipeline_folder
    with pytest.raises(ConfigError, match="but from_pretrained holds a CogVideoXTransformer3DModel"):
        make({"from_pretrained": str(folder), "class_name": "WanTransformer3DModel"})


def test_folder_without_config(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json: it is missing\. Set model\.from_pretrained"):
        make({"from_pretrained": str(tmp_path)})


@pytest.mark.parametrize("text", ['{"num_layers": 2}', "[]", "{"], ids=["no class", "no object", "cut short"])
def test_folder_with_another_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json: it (names no diffusers class|can't be read)"):
        make({"from_pretrained": str(tmp_path)})


def test_hub_repository_that_can_not_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r'model "nobody/nothing" can\'t be read'):
        make({"from_pretrained": "nobody/nothing"})


def test_wrong_text_width(pipeline_folder):
    folder, _ = pipeline_folder
    with pytest.raises(ConfigError, match=r"reads text of width 16 \(text_embed_dim\), but the text encoder gives 32"):
        make({"from_pretrained": str(folder)}, width=32)


def test_wrong_text_length(pipeline_folder):
    folder, _ = pipeline_folder
    with pytest.raises(ConfigError, match=r"reads 6 text tokens, not 7: set model_max_length = 6"):
        make({"from_pretrained": str(folder)}, length=7)


def test_labels_for_text_and_text_for_labels(tiny_transformer):
    with pytest.raises(ConfigError, match="reads text, but the text encoder gives class labels"):
        make(tiny_transformer("WanTransformer3DModel"), width=None)
    with pytest.raises(ConfigError, match="reads class labels, but the text encoder gives text"):
        make(tiny_transformer("DiTTransformer2DModel"), size=(1, 8, 8))


def test_wrong_latent_channels(pipeline_folder):
    folder, _ = pipeline_folder
    with pytest.raises(ShapeError, match="takes 4 latent channels, but the autoencoder makes 16"):
        make({"from_pretrained": str(folder)}, channels=16)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("WanTransformer3DModel", (3, 7, 8), "latents of 3x7x8 .*: its patch is 1x2x2. Nearest: 3x8x8"),
        ("CogVideoXTransformer3DModel", (3, 8, 5), "its patch is 1x2x2. Nearest: 3x8x4"),
        ("PixArtTransformer2DModel", (3, 8, 8), "it makes single images. Nearest: 1x8x8"),
        ("DiTTransformer2DModel", (1, 8, 16), "it does squares alone"),
    ],
)
def test_sizes_that_the_class_can_not_do(tiny_transformer, name, size, message):
    with pytest.raises(ShapeError, match=message):
        make(tiny_transformer(name), size=size, width=None if "DiT" in name else 16)


def test_latte_has_a_length(tiny_transformer):
    model = make_of(tiny_transformer, "LatteTransformer3DModel")
    latents, timestep, told = example("Latte")
    assert model(latents[:, :, :1], timestep, told).shape[2] == 1
    with pytest.raises(ShapeError, match="positions for 3 latent frames"):
        model(latents[:, :, :2], timestep, told)


def test_missing_text(tiny_transformer):
    latents, timestep, _ = example("Wan")
    with pytest.raises(ShapeError, match="WanTransformer3DModel needs the condition `text_embedding`"):
        make_of(tiny_transformer, "WanTransformer3DModel")(latents, timestep, Conditioning())


def test_missing_pooled_text(tiny_transformer):
    model = make(tiny_transformer("HunyuanVideoTransformer3DModel", pooled_projection_dim=12))
    with pytest.raises(ShapeError, match="takes a pooled text vector of width 12"):
        model(*example("HunyuanVideo"))
