"""Whether a model can do the sizes that are asked of it, found out before its weights are read."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from opensora.core.composing import build_parts
from opensora.core.errors import OpenSoraError
from opensora.core.pipelines.dry_run import meta_inputs
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.protocols import Size

__all__ = ["check_sizes"]

log = logging.getLogger(__name__)


def check_sizes(spec: SampleSpec, sizes: Iterable[Size]) -> None:
    """Let the autoencoder and the denoiser, on the meta device, say whether they can do each size (T, H, W).

    Raises:
        ShapeError: One can't; its message has the nearest that it can.
    """
    parts = build_parts(spec, size_of=lambda: spec.size, meta=True)
    parts.denoiser.eval()
    for size in sorted(sizes):
        inputs = meta_inputs(parts, 1, size)
        try:
            with torch.inference_mode():
                parts.denoiser(*inputs)
        except OpenSoraError:
            raise
        except (
            RuntimeError,
            NotImplementedError,
        ) as error:  # a model that meta tensors can't go through: the run will tell
            log.debug("%s on the meta device: %s", spec.model.type, error)
