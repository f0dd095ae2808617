"""What an autoencoder's encoder says of a video: for each latent number a mean and a variance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import field, frozen
from torch import Tensor

from opensora.core.randomness import Draws

__all__ = ["Posterior"]


def _clamped(logvar: Tensor) -> Tensor:
    return logvar.clamp(-30.0, 20.0)


@frozen(eq=False)
class Posterior:
    """Independent normal distributions, [B, C, T, h, w] of them."""

    mean: Tensor
    logvar: Tensor = field(converter=_clamped)

    @classmethod
    def of_moments(cls, moments: Tensor) -> Posterior:
        """From an encoder's output [B, 2C, ...]: the first half of the channels are means, the second log variances."""
        return cls(*moments.chunk(2, dim=1))

    @classmethod
    def cat(cls, posteriors: Sequence[Posterior]) -> Posterior:
        """One after the other in time."""
        means, logvars = zip(*((each.mean, each.logvar) for each in posteriors), strict=True)
        return cls(torch.cat(means, dim=2), torch.cat(logvars, dim=2))

    @property
    def std(self) -> Tensor:
        """Standard deviations, like `mean`."""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variances, like `mean`."""
        return torch.exp(self.logvar)

    def moments(self) -> dict[str, Tensor]:
        """``mean`` and ``logvar`` by name, as they are kept."""
        return {"mean": self.mean, "logvar": self.logvar}

    def mode(self) -> Tensor:
        """The most likely latents: the mean."""
        return self.mean

    def at(self, noise: Tensor) -> Tensor:
        """The latents that standard normal ``noise``, shaped like `mean`, stands for."""
        return torch.addcmul(self.mean, self.std, noise.to(self.mean))

    def sample(self, source: Draws | torch.Generator | None = None, *, name: str = "posterior") -> Tensor:
        """Latents at noise made on the CPU.

        Args:
            source: Draws, of which the one called ``name`` is taken, or a generator. None: torch's own, as its seed stands.
        """
        if isinstance(source, torch.Generator | None):
            return self.at(torch.randn(self.mean.shape, generator=source, device="cpu"))
        return self.at(source.normal(name, self.mean.shape[1:]))

    def kl(self, other: Posterior | None = None) -> Tensor:
        """Kullback-Leibler divergence from ``other``, by default from the standard normal distribution, [B]."""
        if other is None:
            return 0.5 * (self.mean.square() + self.var - 1 - self.logvar).flatten(1).sum(1)
        distance = (self.mean - other.mean).square() / other.var
        return 0.5 * (distance + self.var / other.var - 1 - self.logvar + other.logvar).flatten(1).sum(1)

    def nll(self, latents: Tensor) -> Tensor:
        """Negative log likelihood of ``latents``, [B]."""
        distance = (latents - self.mean).square() / self.var
        return 0.5 * (math.log(2 * math.pi) + self.logvar + distance).flatten(1).sum(1)
