"""A small training problem that one process or several can solve."""

from __future__ import annotations

import torch
from torch import nn

from opensora.core.conditioning import Conditioning

SAMPLES = 8
STEPS = 3


class Small(nn.Module):
    """Two layers over the channels, and a parameter that only conditions use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 3)
        self.rate = nn.Parameter(torch.tensor(0.1))

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        x = self.second(self.first(latents.movedim(1, -1)).tanh()).movedim(-1, 1)
        return x if conditioning.fps is None else x + self.rate * conditioning.fps.view(-1, 1, 1, 1, 1)


def step_data(step: int) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """All samples of a step."""
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(SAMPLES, 3, 2, 4, 4, generator=generator)
    return latents, torch.rand(SAMPLES, generator=generator), Conditioning(fps=torch.arange(SAMPLES) / SAMPLES)


def train(accelerator, *, micro_batches: list[list[slice]]) -> dict[str, torch.Tensor]:
    """Weights after some steps, gradient norms and losses, in a process that sees ``micro_batches`` of each step."""
    torch.manual_seed(accelerator.rank)  # the main process's initial weights are to win
    denoiser = Small()
    predict = accelerator.prepare(denoiser)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(denoiser.parameters(), lr=0.01))
    norms, losses = [], []
    for step in range(STEPS):
        latents, timestep, conditioning = step_data(step)
        own = micro_batches[step]
        total = 0.0
        for index, part in enumerate(own):
            with accelerator.micro_step(last=index == len(own) - 1):
                output = predict(latents[part], timestep[part], conditioning[part])
                loss = (output - latents[part].roll(1, dims=1)).square().mean() / len(own)
                accelerator.backward(loss)
            total += loss.detach()
        losses.append(accelerator.mean(total))
        norms.append(accelerator.update(optimizer, list(denoiser.parameters()), grad_clip=0.05))
    return {**denoiser.state_dict(), "norms": torch.tensor(norms), "losses": torch.stack(losses)}
