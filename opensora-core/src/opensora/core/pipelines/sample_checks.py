"""Whether a model can do what is asked of it, found out before its weights are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from opensora.core.composing import Parts, build_parts
from opensora.core.errors import OpenSoraError
from opensora.core.pipelines.dry_run import meta_inputs
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.protocols import Size
from opensora.core.reference_latents import Overlap
from opensora.core.requests import Request
from opensora.core.video_sampler import build_scheduler

__all__ = ["check_requests"]

log = logging.getLogger(__name__)


def check_requests(spec: SampleSpec, requests: Iterable[Request]) -> None:
    """Let the parts, on the meta device, say whether they can do each size, long videos of it, and numbers of steps.

    Raises:
        ShapeError: A size can't be done; its message has the nearest that can.
        ConfigError: Rounds would have nothing new or are cut wrongly, or a number of steps can't be.
    """
    requests = list(requests)
    parts = build_parts(spec, size_of=lambda: spec.size, meta=True)
    parts.denoiser.eval()
    for size in sorted({request.size for request in requests}):
        _check_size(spec, parts, size)
    for size in sorted({request.size for request in requests if request.loop > 1}):
        Overlap.of(spec).frames(parts.vae, size)
    for steps in {request.num_sampling_steps for request in requests} - {None}:
        build_scheduler(spec.scheduler, num_sampling_steps=steps)


def _check_size(spec: SampleSpec, parts: Parts, size: Size) -> None:
    inputs = meta_inputs(parts, 1, size)
    try:
        with torch.inference_mode():
            parts.denoiser(*inputs)
    except OpenSoraError:
        raise
    except RuntimeError as error:  # a model that meta tensors can't go through: the run will tell
        log.debug("%s on the meta device: %s", spec.model.type, error)
