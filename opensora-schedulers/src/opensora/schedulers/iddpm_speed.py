"""IDDPM trained faster: timesteps that teach little are drawn less often, and noisy ones weigh more.

Source: Wang et al., "A Closer Look at Time Steps is Worthy of Triple Speed-Up for Diffusion Model Training" (SpeeD),
https://arxiv.org/abs/2405.17403.

Shapes: B batch, N steps after respacing. Step 0 is next to the data.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.protocols import Denoiser
from opensora.core.randomness import Draws
from opensora.schedulers.iddpm import IDDPM, IDDPMSpec

__all__ = ["IDDPMSpeed", "IDDPMSpeedSpec"]

_SLOW, _FLAT = 1e-4, 5e-5
"""Growth of the noise's share a step, below which steps are drawn less often, and from which on they are "meaningless"."""


@frozen(kw_only=True)
class IDDPMSpeedSpec(IDDPMSpec):
    """Options of `IDDPMSpeed`: those of `IDDPM`, whose ``loss_weighting`` would be a second weight of the error."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.loss_weighting != "none":
            raise ConfigError(
                f'loss_weighting="{self.loss_weighting}" is not for iddpm-speed, which has its own weights. Use iddpm.'
            )


class IDDPMSpeed(IDDPM):
    """`IDDPM` with another law of timesteps and another weight of the error. Samples as that does."""

    Spec = IDDPMSpeedSpec

    def __init__(self, spec: IDDPMSpec) -> None:
        """Compute the noise schedule, and from it the law of timesteps."""
        super().__init__(spec)
        noise_share = (1 - self.schedule.alphas_cumprod).sqrt()
        growth = torch.gradient(noise_share)[0] if self.num_timesteps > 1 else noise_share
        flat = (growth < _FLAT).nonzero()
        self.meaningful_steps = int(flat[0]) + 1 if len(flat) else self.num_timesteps
        """How many steps come before noise hardly grows any more."""
        odds = (1e6 * (growth - _SLOW)).tanh() + 1.5
        self.probabilities = odds / odds.sum()
        """[N] float64, of the steps in the half of a batch that is drawn; see `dual`."""
        self.weights = 1 - self.schedule.alphas_cumprod
        """[N] float64, of the error at each step: 1 / (1 + signal to noise ratio)."""

    def loss_terms(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        conditioning: Conditioning,
        *,
        draws: Draws,
        timestep: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As `IDDPM.loss_terms`, with timesteps from `draw_timestep` and a weighted ``mse``; ``vb`` is not weighted."""
        if timestep is None:
            timestep = self.draw_timestep(draws)
        terms = super().loss_terms(denoiser, latents, conditioning, draws=draws, timestep=timestep)
        if "mse" in terms:  # not of the full bound
            weights = self.weights.to(terms["mse"].device, torch.float32)[timestep.long()]
            terms["mse"] = terms["mse"] * weights
            terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def draw_timestep(self, draws: Draws) -> Tensor:
        """Training steps [B] int64: drawn from ``probabilities``, and of about every other sample the `dual` of that.

        The reference draws half of a batch and fills up with the duals of that half. Here each sample tosses a coin, from the
        draw "dual", so that what it sees does not depend on its batch.
        """
        uniform = draws.uniform("timestep")
        cumulated = self.probabilities.cumsum(dim=0).to(uniform.device, torch.float32)
        step = torch.searchsorted(cumulated, uniform, right=True).clamp(max=self.num_timesteps - 1)
        return torch.where(draws.integers("dual", 2) == 1, self.dual(step), step)

    def dual(self, step: Tensor) -> Tensor:
        """The step that balances another: mirrored among the meaningful ones, carried to the front from the others."""
        mirrored = (self.meaningful_steps - step).clamp(max=self.num_timesteps - 1)
        return torch.where(step < self.meaningful_steps, mirrored, step - self.meaningful_steps)
