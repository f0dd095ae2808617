"""Accelerators of opensora, how a step runs on the hardware; and caches that spare work between sampling steps."""

from opensora.accel.ddp import DDP, DDPSpec
from opensora.accel.fsdp import FSDP, FSDPSpec
from opensora.accel.pyramid_broadcast import PyramidBroadcast, PyramidBroadcastSpec
from opensora.accel.step_cache import StepCache, StepCacheSpec

__all__ = ["DDP", "DDPSpec", "FSDP", "FSDPSpec", "PyramidBroadcast", "PyramidBroadcastSpec", "StepCache", "StepCacheSpec"]
