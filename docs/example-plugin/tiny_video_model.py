"""A denoiser and a hook in one file: pip install it, then `model = dict(type="Tiny/2", width=64)` in any config."""

import logging

import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor, nn

from opensora.core import Conditioning, hook

log = logging.getLogger("opensora.plugins.tiny_video_model")


@frozen(kw_only=True)
class TinySpec:
    """Options of `Tiny`."""

    width: int = field(default=64, validator=gt(0))
    """Channels of the hidden layer."""


class Tiny(nn.Module):
    """Two convolutions that predict velocity, told the time and the text by one shift of the hidden layer."""

    Spec = TinySpec
    condition_dropout = 0.1

    def __init__(self, spec: TinySpec, *, latent_channels: int, text_width: int) -> None:
        super().__init__()
        self.before = nn.Conv3d(latent_channels, spec.width, 3, padding=1)
        self.after = nn.Conv3d(spec.width, latent_channels, 3, padding=1)
        self.time = nn.Linear(1, spec.width)
        self.text = nn.Linear(text_width, spec.width)
        self.null = nn.Parameter(torch.zeros(spec.width))

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        text = self.text(conditioning.text_embedding.mean(1))  # [B, D]
        if conditioning.dropped is not None:
            text = torch.where(conditioning.dropped[:, None], self.null, text)
        shift = self.time(timestep[:, None].to(text) / 1000) + text
        hidden = nn.functional.silu(self.before(latents) + shift[:, :, None, None, None])
        return self.after(hidden).float()  # [B, C, T, H, W]


@frozen(kw_only=True)
class BestLossSpec:
    """Options of `BestLoss`."""

    after: int = 0
    """Steps before which nothing is said."""


class BestLoss:
    """Says at the end which step had the lowest loss."""

    Spec = BestLossSpec

    def __init__(self, spec: BestLossSpec) -> None:
        self.spec, self.best = spec, None

    @hook
    def log(self, record):
        if record["step"] > self.spec.after and (self.best is None or record["loss"] < self.best["loss"]):
            self.best = dict(record)

    @hook
    def train_end(self):
        if self.best:
            log.info("Lowest loss %.4f at step %d", self.best["loss"], self.best["step"])
