"""Cheap looks at videos while they are denoised, without the autoencoder's decoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor

from opensora.core.contact_sheet import write_contact_sheet
from opensora.core.hookspecs import hook
from opensora.core.protocols import VideoAutoencoder
from opensora.core.randomness import generator_for
from opensora.core.recipes import recipe_path
from opensora.core.video import to_uint8

if TYPE_CHECKING:
    from opensora.core.pipelines.sample_loop import SampleRun
    from opensora.core.protocols import SampleState
    from opensora.core.requests import Request
    from opensora.core.video_sampler import Piece

__all__ = ["LinearDecoder", "SamplePreviews", "SamplePreviewsSpec"]

log = logging.getLogger(__name__)
_IMAGES, _LATENTS = 16, 8  # images that the map is fitted to, and latents on each of their sides
_COLOURS = 3  # on a side: smooth images, as photographs are


@frozen(eq=False)
class LinearDecoder:
    """Latents to small pictures by one matrix, which is fitted to an autoencoder: each latent becomes a pixel."""

    weights: Tensor
    """[C + 1, 3]: red, green and blue of each channel, and of 1."""
    explained: float
    """Share of the variance of the pictures that it was fitted to, at most 1."""

    @classmethod
    @torch.inference_mode()
    def fit(cls, vae: VideoAutoencoder, device: torch.device) -> LinearDecoder:
        """By least squares on what ``vae`` makes of smooth random images. Takes one encoding of 16 small images."""
        factor = 256 // vae.latent_size((1, 256, 256))[1]
        colours = torch.rand(_IMAGES, 3, _COLOURS, _COLOURS, generator=generator_for("linear decoder"))
        side = _LATENTS * factor
        images = F.interpolate(colours * 2 - 1, size=(side, side), mode="bicubic", align_corners=False).clamp(-1, 1)
        latents = vae.encode(images[:, :, None].to(device)).float().cpu()[:, :, 0]  # [N, C, h, w]
        wanted = F.adaptive_avg_pool2d(images, _LATENTS).movedim(1, -1).reshape(-1, 3)
        known = _with_one(latents.movedim(1, -1)).reshape(len(wanted), -1)
        weights = torch.linalg.lstsq(known.double(), wanted.double()).solution
        rest = (known.double() @ weights - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
        return cls(weights.float(), 1 - rest.item())

    def decode(self, latents: Tensor) -> Tensor:
        """[C, T, h, w] to frames uint8 [T, h, w, 3]."""
        return to_uint8((_with_one(latents.float().cpu().movedim(0, -1)) @ self.weights).movedim(-1, 0))


def _with_one(latents: Tensor) -> Tensor:
    return torch.cat([latents, torch.ones_like(latents[..., :1])], dim=-1)


@frozen(kw_only=True)
class SamplePreviewsSpec:
    """Show what each video is going to be, every so many denoising steps."""

    every: int = field(default=5, validator=gt(0))
    """Steps."""


class SamplePreviews:
    """Writes ``previews/NAME.png``: a row for each look, the clean frames as the denoiser foresees them.

    A video of several rounds has a sheet a round, ``NAME-round-2.png``, so that nothing grows with their number.
    """

    Spec = SamplePreviewsSpec

    def __init__(self, spec: SamplePreviewsSpec) -> None:
        self.spec = spec
        self._decoder: LinearDecoder | None = None
        self._requests: Sequence[Request] = ()
        self._rows: list[list[tuple[str, Tensor]]] = []
        self._round = 0

    @hook
    def sample_batch(self, run: SampleRun, requests: Sequence[Request]) -> None:
        """Begin new sheets."""
        self._requests, self._round, self._rows = requests, 0, [[] for _ in requests]

    @hook
    def sample_step(self, run: SampleRun, state: SampleState) -> None:
        """Add a row to each sheet, every so many steps."""
        if (state.step + 1) % self.spec.every or not run.accelerator.writes_samples:
            return
        if self._decoder is None:
            self._decoder = LinearDecoder.fit(run.sampler.parts.vae, run.accelerator.device)
            log.info("Previews explain %.0f %% of what the autoencoder shows", 100 * self._decoder.explained)
        folder = run.folder / "previews"
        folder.mkdir(exist_ok=True)
        for request, rows, latents in zip(self._requests, self._rows, state.denoised, strict=True):
            rows.append((f"step {state.step + 1} of {state.num_steps}", self._decoder.decode(latents)))
            name = recipe_path(request.path).stem + (f"-round-{self._round + 1}" if request.loop > 1 else "")
            write_contact_sheet(folder / f"{name}.png", rows, title=request.prompt[:60] or None)

    @hook
    def sample_frames(self, run: SampleRun, requests: Sequence[Request], piece: Piece) -> None:
        """A round is denoised: the next begins."""
        if piece.is_first:
            self._round, self._rows = piece.round + 1, [[] for _ in requests]
