"""What every video autoencoder and every text encoder must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opensora.core.accelerator import cast_module
from opensora.core.components import build
from opensora.core.conditioning import Conditioning
from opensora.core.machine import probe_dtype
from opensora.core.protocols import Size, TextEncoder, VideoAutoencoder
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.core.testing._report import Report
from opensora.core.text_cuts import cut_off

__all__ = ["check_text_encoder", "check_vae"]

_TOLERANCE = 1e-4
_HALF_TOLERANCE = 0.1
"""Of bf16, relative, over all values. It has three digits, and every layer rounds."""
_MANY_WORDS = 2000
_META = "builds on the meta device, for dry runs"
_CUT = "says what it cuts off: a prompt's end that has no influence, and no more"
_FROZEN = "stays frozen and in eval mode"
_HALF = "in half precision it gives nearly the same"
_STATE = "loads its own state dict to the same outputs"


@torch.no_grad()
def check_vae(
    name: str, *, size: Size = (3, 32, 48), on_pass: Callable[[str], None] | None = None, **options: Any
) -> Report:
    """Latent sizes, shapes, dtypes, determinism under draws, batch independence, meta-device build, loading.

    Half precision is tried as bf16, where this machine has it (see ``opensora doctor``).

    Args:
        name: As in ``type=``.
        size: (T, H, W) of the video that it is tried on.
        on_pass: Called with each check's title as it passes.
        options: Of the component's ``Spec``.

    Raises:
        AssertionError: A check failed.
    """
    construct = _constructor("vaes", name, options)
    vae: VideoAutoencoder = construct()
    report = Report(name, on_pass=on_pass)
    video = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draws = SampleDraws([SampleKey(0, index) for index in range(2)])
    with report.checking("latents have the announced channels and size, in float32"):
        latents = vae.encode(video, draws=draws)
        expected = [2, vae.latent_channels, *vae.latent_size(size)]
        assert list(latents.shape) == expected, f"got {list(latents.shape)}, expected {expected}"
        _check_values(latents)
    with report.checking("encoding is the same for the same draws"):
        assert torch.equal(latents, vae.encode(video, draws=draws))
        assert torch.equal(vae.encode(video), vae.encode(video))
    with report.checking("a video doesn't depend on the others in its batch"):
        alone = vae.encode(video[1:], draws=SampleDraws(draws.keys[1:]))
        torch.testing.assert_close(alone, latents[1:], rtol=_TOLERANCE, atol=_TOLERANCE)
    with report.checking("decoding gives [B, 3, num_frames, H', W'] for the frames that were asked for, in float32"):
        decoded = vae.decode(latents, num_frames=size[0])
        assert list(decoded.shape[:3]) == [2, 3, size[0]], f"got {list(decoded.shape)}"
        _check_values(decoded)
    with report.checking("a decoded video doesn't depend on the others in its batch"):
        alone = vae.decode(latents[1:], num_frames=size[0])
        torch.testing.assert_close(alone, decoded[1:], rtol=_TOLERANCE, atol=_TOLERANCE)

    def outputs(of: VideoAutoencoder) -> dict[str, Tensor]:
        encoded = of.encode(video)
        _check_values(encoded)  # in float32 whatever it computes in
        decoded = of.decode(latents, num_frames=size[0])
        _check_values(decoded)
        return {"latents": encoded, "video": decoded}

    def facts(of: VideoAutoencoder) -> Any:
        return {"latent_channels": of.latent_channels, "latent_size": tuple(of.latent_size(size))}

    _check_as_a_part(report, construct, vae, outputs, facts)
    return report


@torch.no_grad()
def check_text_encoder(
    name: str,
    *,
    prompts: Sequence[str] = ("a handwritten seven moving left", "", "two words"),
    on_pass: Callable[[str], None] | None = None,
    **options: Any,
) -> Report:
    """Shapes, masks, dtypes, determinism, batch independence, ``cut_off`` if it has that, meta-device build, loading.

    Half precision is tried as bf16, where this machine has it (see ``opensora doctor``).

    Args:
        name: As in ``type=``.
        prompts: What it is tried on; three of them, that it reads as a whole.
        on_pass: Called with each check's title as it passes.
        options: Of the component's ``Spec``.

    Raises:
        AssertionError: A check failed.
    """
    construct = _constructor("text_encoders", name, options)
    encoder: TextEncoder = construct()
    report = Report(name, on_pass=on_pass)
    with report.checking("gives text_embedding [B, L, D] and text_mask [B, L], or labels [B]"):
        encoded = encoder.encode(list(prompts))
        check_text_shapes(encoded, encoder, len(prompts))
    with report.checking("encodes alike again, and alone"):
        for row, prompt in enumerate(prompts):
            check_alike(encoder.encode([prompt]), encoded[row : row + 1], prompt)
        check_alike(encoder.encode(list(reversed(prompts))), encoded[list(reversed(range(len(prompts))))], "in reverse")
    if hasattr(encoder, "cut_off"):
        with report.checking(_CUT):
            _check_cut(encoder, prompts)

    def outputs(of: TextEncoder) -> dict[str, Tensor]:
        told = of.encode(list(prompts))
        check_text_shapes(told, of, len(prompts))
        tensors = {"text_embedding": told.text_embedding, "text_mask": told.text_mask, "labels": told.labels}
        return {key: value for key, value in tensors.items() if value is not None}

    def facts(of: TextEncoder) -> Any:
        return {"width": of.width, "max_length": of.max_length}

    _check_as_a_part(report, construct, encoder, outputs, facts)
    return report


def check_text_shapes(encoded: Conditioning, encoder: TextEncoder, batch: int) -> None:
    """Shapes agree with what the encoder announces, values are finite, and each prompt has a token."""
    if encoder.width is None:
        assert encoded.labels is not None, "labels are missing"
        assert encoded.labels.shape == (batch,), "labels must be [B]"
        assert encoded.labels.dtype is torch.int64, f"labels are {encoded.labels.dtype}"
        return
    assert encoded.text_embedding is not None, "text_embedding is missing"
    expected = (batch, encoder.max_length, encoder.width)
    assert encoded.text_embedding.shape == expected, (
        f"got {list(encoded.text_embedding.shape)}, expected {list(expected)}"
    )
    assert encoded.text_embedding.isfinite().all(), "text_embedding is not all finite"
    if encoded.text_mask is not None:
        assert encoded.text_mask.shape == expected[:2], f"mask is {list(encoded.text_mask.shape)}"
        assert encoded.text_mask.dtype is torch.bool, f"mask is {encoded.text_mask.dtype}"
        assert encoded.text_mask.any(1).all(), "a prompt without any token; even an empty one needs one"


def _check_cut(encoder: TextEncoder, prompts: Sequence[str]) -> None:
    """Short prompts are read as a whole. Of a long one, what is said to be cut has no influence, and the rest has."""
    for prompt in prompts:
        assert (cut := cut_off(encoder, prompt)) == "", f'"{prompt}" is short, but "{cut}" is said to be cut off'
    long = " ".join([prompt for prompt in prompts if prompt] * (_MANY_WORDS // len(prompts)))
    if not (cut := cut_off(encoder, long)):
        return
    assert long.casefold().endswith(cut.casefold()), f'"{cut[:60]}" ... is not the end of the prompt'
    kept = len(long) - len(cut)
    end = long.find(" ", kept) if kept and not long[kept - 1].isspace() else kept  # behind a word that is cut in two
    read = long[: end if end >= 0 else len(long)].rstrip()
    check_alike(encoder.encode([read]), encoder.encode([long]), "without what is cut off")
    shorter = " ".join(long[:kept].split()[:-1])
    assert not _is_same(encoder.encode([shorter]), encoder.encode([long])), "more is cut off than it says"


def _is_same(one: Conditioning, other: Conditioning) -> bool:
    pairs = ((getattr(one, name), getattr(other, name)) for name in ("text_embedding", "text_mask", "labels"))
    return all(left is right or torch.equal(left, right) for left, right in pairs)


def check_alike(one: Conditioning, other: Conditioning, which: str) -> None:
    """Two encodings of the same prompts agree; ``which`` says of which, for the message."""
    for name in ("text_embedding", "text_mask", "labels"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), f"{name} is given for some prompts only"
        if left is not None:
            _check_close(left, right, f'"{which}": {name}')


# ---- what autoencoders and text encoders have in common: frozen parts of a run


def _constructor(kind: str, name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """Builds the component as core does; ``seed`` chooses the initial weights of those that read none."""

    def construct(seed: int = 0, *, meta: bool = False) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            part = build(kind, {"type": name, **options}, meta=meta)
        return part.requires_grad_(False).eval() if isinstance(part, nn.Module) else part

    return construct


def _check_as_a_part(
    report: Report,
    construct: Callable[..., Any],
    part: Any,
    outputs: Callable[[Any], dict[str, Tensor]],
    facts: Callable[[Any], Any],
) -> None:
    """What core does with frozen parts: a look without weights, another dtype, and saving and loading."""
    with report.checking(_META):
        with torch.device("meta"):
            empty = construct(meta=True)
        _check_empty(empty, part)
        assert facts(empty) == facts(part), f"announces {facts(empty)} there, and {facts(part)} with its weights"
    if not isinstance(part, nn.Module):
        return
    with report.checking(_FROZEN):
        with torch.enable_grad():
            learning = [key for key, value in outputs(part).items() if value.requires_grad]
        assert not learning, f"{', '.join(learning)} asks for gradients"
        assert not any(each.requires_grad for each in part.parameters()), "encoding makes a parameter ask for gradients"
        assert not any(each.training for each in part.modules()), "encoding puts it into training mode"
    if not any(each.is_floating_point() for each in part.parameters()) or probe_dtype("cpu", "bf16") is None:
        with report.checking(_HALF):
            half = cast_module(construct(), torch.device("cpu"), torch.bfloat16)
            _check_near(outputs(half), outputs(part))
    with report.checking(_STATE):
        _disturb(part)
        other = construct(1)
        other.load_state_dict(part.state_dict())
        for key, value in outputs(part).items():
            assert torch.equal(outputs(other)[key], value), f"{key} differs: something that matters is not in it"


def _check_empty(empty: Any, part: Any) -> None:
    """The instance without weights has the real one's, as shapes."""
    if not isinstance(empty, nn.Module):
        return
    there = [key for key, each in empty.named_parameters() if not each.is_meta]
    assert not there, f"{there[:4]} are on a real device. Take the keyword `meta`, and read no weights if it is true"
    shapes = {key: list(each.shape) for key, each in empty.state_dict().items()}
    real = {key: list(each.shape) for key, each in part.state_dict().items()}
    differing = sorted(key for key in shapes.keys() | real.keys() if shapes.get(key) != real.get(key))
    assert not differing, f"other weights than the real one's: {differing[:4]}"


def _check_near(half: dict[str, Tensor], full: dict[str, Tensor]) -> None:
    for key, value in full.items():
        if not value.is_floating_point():
            assert torch.equal(half[key], value), f"{key} differs"
            continue
        error = ((half[key].float() - value).norm() / value.norm().clamp(min=1e-6)).item()
        assert error <= _HALF_TOLERANCE, f"{key} is off by {error:.0%} in bf16"


def _check_close(one: Tensor, other: Tensor, what: str) -> None:
    torch.testing.assert_close(one, other, rtol=_TOLERANCE, atol=_TOLERANCE, msg=lambda text: f"{what}: {text}")


def _check_values(tensor: Tensor) -> None:
    assert tensor.dtype is torch.float32, f"got {tensor.dtype}, expected float32 whatever the weights are"
    assert tensor.isfinite().all(), "not all finite"


def _disturb(module: nn.Module) -> None:
    """Other weights than those it was built with, by 5 %."""
    generator = torch.Generator().manual_seed(1)
    for each in module.parameters():
        if each.is_floating_point():
            each.mul_(1 + 0.05 * torch.randn(each.shape, generator=generator))
