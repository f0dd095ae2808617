"""What every video autoencoder and every text encoder must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from opensora.core.components import build
from opensora.core.conditioning import Conditioning
from opensora.core.protocols import Size, TextEncoder, VideoAutoencoder
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.core.testing._report import Report

__all__ = ["check_text_encoder", "check_vae"]


@torch.no_grad()
def check_vae(
    name: str, *, size: Size = (3, 32, 48), on_pass: Callable[[str], None] | None = None, **options: Any
) -> Report:
    """Latent sizes, shapes, determinism under draws, batch independence.

    Args:
        name: As in ``type=``.
        size: (T, H, W) of the video that it is tried on.
        on_pass: Called with each check's title as it passes.
        options: Of the component's ``Spec``.

    Raises:
        AssertionError: A check failed.
    """
    vae: VideoAutoencoder = build("vaes", {"type": name, **options})
    report = Report(name, on_pass=on_pass)
    if isinstance(vae, nn.Module):
        vae.eval()
    video = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draws = SampleDraws([SampleKey(0, index) for index in range(2)])
    with report.checking("latents have the announced channels and size"):
        latents = vae.encode(video, draws=draws)
        expected = [2, vae.latent_channels, *vae.latent_size(size)]
        assert list(latents.shape) == expected, f"got {list(latents.shape)}, expected {expected}"
        assert latents.isfinite().all()
    with report.checking("encoding is the same for the same draws"):
        assert torch.equal(latents, vae.encode(video, draws=draws))
        assert torch.equal(vae.encode(video), vae.encode(video))
    with report.checking("a video doesn't depend on the others in its batch"):
        alone = vae.encode(video[1:], draws=SampleDraws(draws.keys[1:]))
        torch.testing.assert_close(alone, latents[1:], rtol=1e-4, atol=1e-4)
    with report.checking("decoding gives [B, 3, num_frames, H', W'] for the frames that were asked for"):
        decoded = vae.decode(latents, num_frames=size[0])
        assert list(decoded.shape[:3]) == [2, 3, size[0]], f"got {list(decoded.shape)}"
        assert decoded.isfinite().all()
    return report


@torch.no_grad()
def check_text_encoder(
    name: str,
    *,
    prompts: Sequence[str] = ("a handwritten seven moving left", "", "two words"),
    on_pass: Callable[[str], None] | None = None,
    **options: Any,
) -> Report:
    """Shapes, masks, determinism, batch independence.

    Args:
        name: As in ``type=``.
        prompts: What it is tried on; three of them.
        on_pass: Called with each check's title as it passes.
        options: Of the component's ``Spec``.

    Raises:
        AssertionError: A check failed.
    """
    encoder: TextEncoder = build("text_encoders", {"type": name, **options})
    report = Report(name, on_pass=on_pass)
    if isinstance(encoder, nn.Module):
        encoder.eval()
    with report.checking("gives text_embedding [B, L, D] and text_mask [B, L], or labels [B]"):
        encoded = encoder.encode(list(prompts))
        check_text_shapes(encoded, encoder, len(prompts))
    with report.checking("encodes alike again, and alone"):
        for row, prompt in enumerate(prompts):
            alone = encoder.encode([prompt])
            for field in ("text_embedding", "text_mask", "labels"):
                own, of_batch = getattr(alone, field), getattr(encoded, field)
                assert (own is None) == (of_batch is None), f"{field} is given for some prompts only"
                if own is not None:
                    torch.testing.assert_close(own[0], of_batch[row], rtol=1e-4, atol=1e-4)
    return report


def check_text_shapes(encoded: Conditioning, encoder: TextEncoder, batch: int) -> None:
    """Shapes agree with what the encoder announces, and each prompt has a token."""
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
    if encoded.text_mask is not None:
        assert encoded.text_mask.shape == expected[:2], f"mask is {list(encoded.text_mask.shape)}"
        assert encoded.text_mask.dtype is torch.bool, f"mask is {encoded.text_mask.dtype}"
        assert encoded.text_mask.any(1).all(), "a prompt without any token; even an empty one needs one"
