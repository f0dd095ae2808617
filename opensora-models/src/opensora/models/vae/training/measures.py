"""How alike originals and reconstructions are, and what the latents between them look like.

Shapes: B videos, C channels, T H W frames and size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from attrs import define, field, frozen
from einops import rearrange
from torch import Tensor

from opensora.core.accelerator import Accelerator
from opensora.core.protocols import Size
from opensora.core.similarity import WINDOW, psnr, ssim
from opensora.models.vae.losses import ReconstructionLoss
from opensora.models.vae.lpips import LPIPS, SMALLEST, downloaded_weights, load_lpips
from opensora.models.vae.posterior import Posterior
from opensora.models.vae.training.specs import SampleVAESpec

__all__ = ["ChannelStatistics", "Measures", "Rebuilt", "choose_lpips", "in_pieces", "shades"]

FRAMES_AT_ONCE = 8
"""That LPIPS looks at, to bound its memory."""


@frozen(kw_only=True, eq=False)
class Rebuilt:
    """What an autoencoder makes of videos. Float32."""

    video: Tensor
    """[B, 3, T, H, W]."""
    latents: Tensor
    """[B, C, t, h, w], before any shift and scale."""
    posterior: Posterior | None = None
    image_latents: Tensor | None = None
    """[B, C', T, h, w], of the image autoencoder."""
    rebuilt_image_latents: Tensor | None = None
    """The same, as the temporal autoencoder gives them back."""
    of_image_vae: Tensor | None = None
    """[B, 3, T, H, W], from the image latents as they were."""


@define(eq=False)
class Measures:
    """Measures clips, and keeps running means."""

    loss: ReconstructionLoss
    lpips: LPIPS | None
    count: int = 0
    _sums: dict[str, float] = field(factory=dict)

    @classmethod
    def of(cls, spec: SampleVAESpec, lpips: LPIPS | None) -> Self:
        """As configured."""
        loss = ReconstructionLoss(
            logvar_init=spec.logvar_init,
            perceptual_loss_weight=spec.perceptual_loss_weight if lpips else 0.0,
            kl_loss_weight=spec.kl_loss_weight,
            perceptual=None if lpips is None else in_pieces(lpips),
        )
        return cls(loss.requires_grad_(False), lpips)

    def of_each(self, video: Tensor, rebuilt: Rebuilt) -> Iterator[dict[str, float]]:
        """The measures of each clip.

        PSNR, SSIM and LPIPS are means over the frames as files have them, in 256 shades; losses are of the tensors.
        """
        loss = self.loss.to(video.device)
        pixels = loss(video, rebuilt.video, rebuilt.posterior)
        columns = {"nll_loss": pixels.nll}
        if rebuilt.posterior is not None:
            columns["kl_loss"] = pixels.weighted_kl
        if rebuilt.image_latents is not None and rebuilt.rebuilt_image_latents is not None:
            columns["z_nll_loss"] = loss(rebuilt.image_latents, rebuilt.rebuilt_image_latents, no_perceptual=True).nll
        for row in range(len(video)):
            frames, others = (shades(each[row]) for each in (video, rebuilt.video))
            measured = {"psnr": psnr(frames, others).mean().item()}
            if min(frames.shape[2:]) >= WINDOW:
                measured["ssim"] = ssim(frames, others).mean().item()
            if rebuilt.of_image_vae is not None:  # a bound for the whole
                measured["psnr_of_image_vae"] = psnr(frames, shades(rebuilt.of_image_vae[row])).mean().item()
            if self.lpips is not None:
                measured["lpips"] = in_pieces(self.lpips)(frames * 2 - 1, others * 2 - 1).mean().item()
            measured |= {name: values[row].item() for name, values in columns.items()}
            self.count += 1
            for name, value in measured.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            yield measured

    def __str__(self) -> str:
        return "Means: " + ", ".join(f"{name} {total / self.count:.4f}" for name, total in self._sums.items())


@define(eq=False)
class ChannelStatistics:
    """Mean and standard deviation of each channel of all latents."""

    count: int = 0
    _sum: Tensor = field(factory=lambda: torch.zeros(0, dtype=torch.float64))
    _squares: Tensor = field(factory=lambda: torch.zeros(0, dtype=torch.float64))

    def add(self, latents: Tensor) -> None:
        """Take some more, [B, C, t, h, w]."""
        each = latents.detach().double().cpu().transpose(0, 1).flatten(1)  # [C, n]
        if not self.count:
            self._sum, self._squares = torch.zeros(2, len(each), dtype=torch.float64)
        self.count += each.shape[1]
        self._sum = self._sum + each.sum(1)
        self._squares = self._squares + each.square().sum(1)

    @property
    def mean(self) -> Tensor:
        """[C]."""
        return self._sum / self.count

    @property
    def std(self) -> Tensor:
        """[C]."""
        return (self._squares / self.count - self.mean.square()).clamp(min=0).sqrt()

    def over_processes(self, accelerator: Accelerator) -> ChannelStatistics:
        """Those of all processes' latents; all must call it. A process that had none takes part with zeros."""
        channels = accelerator.highest(len(self._sum))
        own = torch.zeros(2 * channels + 1, dtype=torch.float64)
        if self.count:
            own = torch.cat([self._sum, self._squares, torch.tensor([self.count], dtype=torch.float64)])
        total = (accelerator.mean(own.to(accelerator.device)) * accelerator.world_size).cpu()
        return ChannelStatistics(round(total[-1].item()), total[:channels], total[channels:-1])

    def as_dict(self) -> dict[str, Any]:
        """For json. What a denoiser wants is (latents - shift) / scale with mean 0 and deviation 1: these are they."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist(), "numbers_a_channel": self.count}

    def __str__(self) -> str:
        return f"mean {_short(self.mean)}, standard deviation {_short(self.std)}"


def choose_lpips(weights: str | list[str] | None, size: Size) -> tuple[LPIPS | None, str]:
    """LPIPS and an empty text, or None and the reason.

    Args:
        weights: As configured; "download" fetches the published files, None takes them if they were fetched before.
        size: (T, H, W) of the clips.

    Raises:
        WeightsError: Those that are named can't be had.
    """
    if min(size[1:]) < SMALLEST:
        return None, f"{size[1]}x{size[2]} is too small for it"
    if weights is None and downloaded_weights() is None:
        return None, (
            'there are no weights. Give perceptual_weights the folder with VGG16 and the heads, or "download" to fetch them.'
        )
    return load_lpips(None if weights == "download" else weights), ""


def in_pieces(lpips: LPIPS) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS a few frames at a time."""

    def call(frames: Tensor, others: Tensor) -> Tensor:
        pieces = zip(
            torch.split(frames.float(), FRAMES_AT_ONCE), torch.split(others.float(), FRAMES_AT_ONCE), strict=True
        )
        return torch.cat([lpips(ours, theirs) for ours, theirs in pieces])

    return call


def shades(video: Tensor) -> Tensor:
    """[3, T, H, W] in [-1, 1] -> [T, 3, H, W] in [0, 1], in the 256 shades of files."""
    frames = video.float().clamp(-1, 1).add(1).mul(127.5).round().div(255)
    return rearrange(frames, "c t h w -> t c h w")


def _short(values: Tensor) -> str:
    return json.dumps([round(value, 3) for value in values.tolist()])
