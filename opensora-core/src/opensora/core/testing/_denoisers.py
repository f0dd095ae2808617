"""What every denoiser must do."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from opensora.core.components import build
from opensora.core.conditioning import Conditioning
from opensora.core.protocols import Size
from opensora.core.testing._report import Report
from opensora.core.weights import load_weights

__all__ = ["check_denoiser"]

_BATCH = 3
_TOLERANCE = 1e-4


def check_denoiser(
    name: str,
    *,
    latent_channels: int = 4,
    latent_size: Size = (2, 8, 8),
    text_width: int | None = 16,
    text_length: int = 6,
    num_labels: int = 4,
    on_pass: Callable[[str], None] | None = None,
    **options: Any,
) -> Report:
    """Shapes, dtype, batch independence, determinism, dropped text, gradients, meta-device build, saving and loading.

    Args:
        name: As in ``type=``.
        latent_channels: C of the latents that it is tried on.
        latent_size: Their (T, H, W).
        text_width: D of the text; None for class labels.
        text_length: L of the text.
        num_labels: Labels are drawn from [0, num_labels).
        on_pass: Called with each check's title as it passes.
        options: Of the component's ``Spec``: choose a small model.

    Raises:
        AssertionError: A check failed.
    """
    keywords: dict[str, Any] = {
        "latent_channels": latent_channels,
        "latent_size": latent_size,
        "text_width": text_width,
        "text_length": text_length,
    }

    def construct(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # initial weights
            denoiser: nn.Module = build("models", {"type": name, **options}, **keywords)
        return denoiser

    report = Report(name, on_pass=on_pass)
    with report.checking("is an nn.Module"):
        denoiser = construct()
        assert isinstance(denoiser, nn.Module), f"got a {type(denoiser).__name__}"
    with report.checking("builds on the meta device"), torch.device("meta"):
        assert all(each.is_meta for each in construct().parameters()), "a parameter was built on a real device"
    randomize(denoiser)
    denoiser.eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(_BATCH, latent_channels, *latent_size, generator=generator)
    timestep = torch.tensor([0.0, 333.3, 1000.0])
    conditioning = example_conditioning(latent_size, text_width, text_length, num_labels, generator)

    def predict(each: slice = slice(None), told: Conditioning = conditioning) -> Tensor:
        with torch.no_grad():
            prediction: Tensor = denoiser(latents[each], timestep[each], told[each])
        return prediction

    check_outputs(report, predict, latents)
    check_conditions(report, denoiser, predict, conditioning, latent_size)
    with report.checking("a sample doesn't depend on the others in its batch while training either"):
        check_training_independence(denoiser, latents, timestep, conditioning)
    with report.checking("gradients reach every trained parameter"):
        check_gradients(denoiser, latents, timestep, conditioning)
    with report.checking("saves and loads to the same outputs"):
        check_round_trip(denoiser, lambda: construct(2), predict, latents, timestep, conditioning)
    return report


def check_outputs(report: Report, predict: Callable[..., Tensor], latents: Tensor) -> None:
    """Shape, dtype, determinism, batch independence."""
    batch, channels, *size = latents.shape
    with report.checking("output is [B, C or 2C, T, H, W], float32 and finite"):
        whole = predict()
        allowed = ([batch, channels, *size], [batch, 2 * channels, *size])
        assert list(whole.shape) in allowed, f"got {list(whole.shape)}, expected one of {allowed}"
        assert whole.dtype is torch.float32, f"got {whole.dtype}"
        assert whole.isfinite().all(), "not all finite"
    with report.checking("is deterministic in eval mode"):
        assert torch.equal(whole, predict())
    with report.checking("a sample doesn't depend on the others in its batch"):
        alone = torch.cat([predict(slice(row, row + 1)) for row in range(batch)])
        torch.testing.assert_close(alone, whole, rtol=_TOLERANCE, atol=_TOLERANCE)


def check_conditions(
    report: Report, denoiser: nn.Module, predict: Callable[..., Tensor], conditioning: Conditioning, size: Size
) -> None:
    """Frame masks are taken; a dropped caption or label has no influence."""
    with report.checking("takes a frame mask"):
        mask = torch.ones(_BATCH, size[0], dtype=torch.bool)
        torch.testing.assert_close(
            predict(told=conditioning.replace(frame_mask=mask)), predict(), rtol=_TOLERANCE, atol=_TOLERANCE
        )
        mask[:, 0] = False
        assert predict(told=conditioning.replace(frame_mask=mask)).isfinite().all(), "not all finite"
    if not getattr(denoiser, "condition_dropout", 0.0):
        return
    with report.checking("text or label has no influence where it is dropped"):
        swapped = conditioning.replace(
            text_embedding=None if conditioning.text_embedding is None else conditioning.text_embedding.flip(0),
            labels=None if conditioning.labels is None else conditioning.labels.flip(0),
        )
        null = predict(told=conditioning.unconditional())
        torch.testing.assert_close(predict(told=swapped.unconditional()), null, rtol=_TOLERANCE, atol=_TOLERANCE)
        assert not torch.allclose(null, predict(), atol=1e-6), "dropping changes nothing: is `dropped` ignored?"


def check_training_independence(
    denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning
) -> None:
    """In train mode too, where batch norm would mix samples. A model that draws random numbers there can't be compared."""
    trained = deepcopy(denoiser).train()  # running statistics of the original stay as they are

    def predict(rows: slice = slice(None)) -> Tensor:
        prediction: Tensor = trained(latents[rows], timestep[rows], conditioning[rows])
        return prediction

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        whole = predict()
        if torch.equal(whole, predict()):
            alone = torch.cat([predict(slice(row, row + 1)) for row in range(len(latents))])
            torch.testing.assert_close(alone, whole, rtol=_TOLERANCE, atol=_TOLERANCE)


def check_gradients(denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> None:
    """Every parameter that wants a gradient gets one that is finite and not all zero."""
    dropped = torch.tensor([True, False, False])
    denoiser.train()
    denoiser(latents, timestep, conditioning.replace(dropped=dropped)).square().mean().backward()
    wanted = [(key, each) for key, each in denoiser.named_parameters() if each.requires_grad]
    assert wanted, "no parameter wants gradients"
    dead = [key for key, each in wanted if each.grad is None or not each.grad.any()]
    assert not dead, f"no gradient for {dead[:8]}"
    assert all(each.grad is not None and each.grad.isfinite().all() for _, each in wanted), "a gradient is not finite"
    denoiser.zero_grad()
    denoiser.eval()


def check_round_trip(
    denoiser: nn.Module,
    construct: Callable[[], nn.Module],
    predict: Callable[..., Tensor],
    latents: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
) -> None:
    """A second instance that loads the first one's file predicts the same, bit for bit."""
    from safetensors.torch import save_file

    with TemporaryDirectory() as folder:
        path = Path(folder, "weights.safetensors")
        save_file({key: each.contiguous() for key, each in denoiser.state_dict().items()}, path)
        other = construct().eval()
        report = load_weights(other, path)
    assert report.is_complete, str(report)
    with torch.no_grad():
        assert torch.equal(other(latents, timestep, conditioning), predict())


def randomize(module: nn.Module) -> None:
    """Give every trained parameter small random values, so that layers that start at zero count too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in module.parameters():
            if each.requires_grad:
                each.add_(0.05 * torch.randn(each.shape, generator=generator))


def example_conditioning(
    latent_size: Size, text_width: int | None, text_length: int, num_labels: int, generator: torch.Generator
) -> Conditioning:
    """Three samples with all conditions that core knows; texts have different lengths."""
    _, height, width = (8.0 * side for side in latent_size)
    lengths = torch.linspace(text_length, 1, _BATCH).round()[:, None]
    has_text = text_width is not None
    return Conditioning(
        text_embedding=torch.randn(_BATCH, text_length, text_width or 0, generator=generator) if has_text else None,
        text_mask=torch.arange(text_length)[None] < lengths if has_text else None,
        labels=None if has_text else torch.arange(_BATCH) % num_labels,
        fps=torch.tensor([8.0, 24.0, 120.0]),
        height=torch.full((_BATCH,), height),
        width=torch.full((_BATCH,), width),
        num_frames=torch.full((_BATCH,), float(latent_size[0])),
        aspect_ratio=torch.full((_BATCH,), height / width),
    )
