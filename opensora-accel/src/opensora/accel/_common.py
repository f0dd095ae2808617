"""What step caches share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from opensora.core.components import build
from opensora.core.errors import ConfigError
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.protocols import Scheduler

if TYPE_CHECKING:
    from opensora.core.accelerator import Accelerator

__all__ = ["check_run", "check_scheduler", "total"]


def check_run(name: str, spec: object, *, others: tuple[str, ...]) -> None:
    """See that a cache can serve a run of this config.

    Args:
        name: Of the cache.
        spec: Of the run.
        others: Hooks that can't take part beside it.

    Raises:
        ConfigError: It can't: the scheduler adds noise, this is training, or one of ``others`` takes part.
    """
    if not isinstance(spec, SampleSpec):
        raise ConfigError(
            f'hooks: "{name}" reuses what was computed at earlier sampling steps; training has none. Leave it out.'
        )
    if beside := next((hook.type for hook in spec.hooks if hook.type.rpartition(":")[2] in others), None):
        raise ConfigError(f'hooks: "{name}" and "{beside}" can\'t take part in one run. Leave one out.')
    check_scheduler(name, build("schedulers", spec.scheduler), called=spec.scheduler.type)


def check_scheduler(name: str, scheduler: Scheduler, *, called: str | None = None) -> None:
    """See that sampling draws no noise on the way.

    Raises:
        ConfigError: It does.
    """
    if not getattr(scheduler, "adds_noise", False):
        return
    raise ConfigError(
        f'hooks: "{name}" can\'t be used with this scheduler ({called or type(scheduler).__name__}): it adds fresh noise at '
        "each step, so that what was computed at earlier steps says too little about the next. Choose one that adds none: "
        'rflow with solver "euler", "heun", "dpm++2m", "dpm++3m" or "unipc", or with eta = 0; dpm-solver; or iddpm with '
        "ddim_eta = 0."
    )


def total(accelerator: Accelerator, *counts: float) -> list[float]:
    """Sums over all processes, once for those that share samples; to be called in all of them."""
    mine = torch.tensor(counts, dtype=torch.float64, device=accelerator.device) * accelerator.writes_samples
    return (accelerator.mean(mine) * accelerator.world_size).tolist()
