"""Which frames of a training clip are given instead of noised, so that a model learns to animate images and extend videos."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from opensora.core.errors import ConfigError, did_you_mean
from opensora.core.randomness import SampleKey

__all__ = ["FRAME_MASKS", "check_mask_ratios", "draw_frame_mask"]


def _run(num_frames: int, start: int, length: int) -> Tensor:
    mask = torch.ones(num_frames, dtype=torch.bool)
    mask[start : start + length] = False
    return mask


def _uniform(generator: torch.Generator, low: int, high: int) -> int:
    """An integer in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _at_random(num_frames: int, length: int, generator: torch.Generator) -> Tensor:
    return _run(num_frames, _uniform(generator, 0, num_frames - length), length)


def _at_head(num_frames: int, length: int, generator: torch.Generator) -> Tensor:
    return _run(num_frames, 0, length)


def _at_tail(num_frames: int, length: int, generator: torch.Generator) -> Tensor:
    return _run(num_frames, num_frames - length, length)


def _at_head_and_tail(num_frames: int, length: int, generator: torch.Generator) -> Tensor:
    return _at_head(num_frames, length, generator) & _at_tail(num_frames, length, generator)


def _every_second(num_frames: int, _: int, generator: torch.Generator) -> Tensor:
    mask = torch.ones(num_frames, dtype=torch.bool)
    mask[_uniform(generator, 0, 1) :: 2] = False
    return mask


def _each_by_chance(num_frames: int, _: int, generator: torch.Generator) -> Tensor:
    given = 0.1 + 0.8 * torch.rand((), generator=generator)
    mask = torch.rand(num_frames, generator=generator) >= given
    mask[-1] |= not mask.any()
    return mask


def _nothing(num_frames: int, _: int, generator: torch.Generator) -> Tensor:
    return torch.ones(num_frames, dtype=torch.bool)


FRAME_MASKS: Mapping[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "identity": _nothing,
    "random": _each_by_chance,
    "intepolate": _every_second,  # spelled so in every published config
    **{
        f"{length}_{place.__name__.removeprefix('_at_').replace('_and_', '_')}": place
        for length in ("quarter", "image")
        for place in (_at_random, _at_head, _at_tail, _at_head_and_tail)
    },
}
"""By the names of ``mask_ratios``: (num_frames, length, generator) -> bool [T], True is noised, False is given."""


def check_mask_ratios(ratios: Mapping[str, float]) -> dict[str, float]:
    """Probabilities that sum to 1; ``identity`` takes what the others leave.

    Raises:
        ConfigError: An unknown name, a probability outside [0, 1], or a sum other than 1.
    """
    for name, share in ratios.items():
        if name not in FRAME_MASKS:
            raise ConfigError(f'mask_ratios: "{name}" is no frame mask.{did_you_mean(name, FRAME_MASKS)}')
        if not 0 <= share <= 1:
            raise ConfigError(f"mask_ratios.{name} is {share}; a probability is from 0 to 1.")
    total = sum(ratios.values())
    complete = {**ratios} if "identity" in ratios else {**ratios, "identity": 1 - total}
    if complete["identity"] < -1e-6 or abs(sum(complete.values()) - 1) > 1e-6:
        raise ConfigError(f"mask_ratios sum to {total:g}; they must sum to 1, or to less without identity.")
    return complete


def draw_frame_mask(ratios: Mapping[str, float], num_frames: int, key: SampleKey) -> Tensor:
    """The frame mask of one showing of one sample.

    Args:
        ratios: From `check_mask_ratios`.
        num_frames: Latent frames T. A single one is always noised.

    Returns:
        [T] bool, True = noised, False = given. At least one is True.
    """
    generator = key.generator("frame mask")
    if num_frames <= 1:
        return torch.ones(num_frames, dtype=torch.bool)
    shares = torch.tensor(list(ratios.values()), dtype=torch.float64).clamp(min=0)
    name = list(ratios)[int(torch.multinomial(shares, 1, generator=generator))]
    longest = max(1, num_frames // 4)  # at two or three frames a quarter is one frame
    length = _uniform(generator, 1, longest) if name.startswith("quarter") else 1
    mask = FRAME_MASKS[name](num_frames, length, generator)
    return mask if mask.any() else torch.ones_like(mask)
