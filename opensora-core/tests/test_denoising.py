"""Denoising in progress: what hooks see of it, how it goes on after an error, and what may be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.core import Conditioning, ConfigError
from opensora.core.denoising import Denoising
from opensora.core.protocols import SampleState
from opensora.core.randomness import SampleKey


class Steps:
    """A scheduler of three steps, each of which adds what the denoiser says and fresh noise."""

    def sample(
        self, denoiser: Any, noise: Tensor, conditioning: Conditioning, *, draws: Any, frame_mask: Any, after: Any
    ) -> Iterator[SampleState]:
        latents = noise if after is None else after.latents
        for step in range(0 if after is None else after.step + 1, 3):
            latents = latents + denoiser(latents) + draws.normal(f"step {step}", latents.shape[1:])
            yield SampleState(step=step, num_steps=3, timestep=0.0, latents=latents, denoised=latents)


def halve(latents: Tensor) -> Tensor:
    return latents / 2


def denoising(
    denoiser: Callable[[Tensor], Tensor] = halve, *, watch: Callable[..., None] = lambda denoising: None, **changes: Any
) -> Denoising:
    parts: dict[str, Any] = {
        "scheduler": Steps(),
        "guided": denoiser,
        "denoiser": denoiser,
        "noise": torch.ones(2, 1, 1, 1, 1),
        "conditioning": Conditioning(),
        "keys": [SampleKey(1, 0), SampleKey(2, 0)],
        "hooks": SimpleNamespace(denoising_step=watch),
    }
    return Denoising(**{**parts, **changes})


def test_hooks_are_called_once_before_each_step() -> None:
    seen: list[int | None] = []
    going = denoising(watch=lambda denoising: seen.append(denoising.state.step if denoising.state else None))
    assert [state.step for state in going] == [0, 1, 2]
    assert seen == [None, 0, 1]
    assert list(going) == []
    assert len(seen) == 3


def test_after_an_error_the_step_is_tried_again() -> None:
    failing = [False]

    def sometimes(latents: Tensor) -> Tensor:
        if failing[0]:
            raise RuntimeError("out of memory")
        return halve(latents)

    going = denoising(sometimes)
    next(going)
    failing[0] = True
    with pytest.raises(RuntimeError, match="out of memory"):
        going.finish()
    failing[0] = False
    assert torch.equal(going.finish(), denoising().finish())
    assert going.state is not None
    assert going.state.step == 2


def test_forks_draw_by_seeds_of_their_own() -> None:
    going = denoising()
    next(going)
    same, other = going.fork(seeds=[1, 2]).finish(), going.fork(seeds=[1, 3]).finish()
    assert torch.equal(same, going.finish())
    assert torch.equal(other[0], same[0])
    assert not torch.equal(other[1], same[1])
    with pytest.raises(ConfigError, match="1 seeds for 2 videos"):
        going.fork(seeds=[1])


def test_a_scale_that_guidance_has_not_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="no scale"):
        denoising(guidance_scale=2.0)
    with pytest.raises(ConfigError, match="no scale"):
        denoising().fork(guidance_scale=2.0)
    guided = SimpleNamespace(scale=4.0)
    with pytest.raises(ConfigError, match="guidance_scale is -1"):
        denoising(guided=guided, guidance_scale=-1.0)
    assert denoising(guided=guided).guidance_scale == 4.0
    assert denoising(guided=guided, guidance_scale=2.0).guidance_scale == 2.0
