"""Accelerators of opensora, how a step runs on the hardware; and caches that spare work between sampling steps."""

from opensora.accel.colossalai import Zero2, Zero2Seq, Zero2SeqSpec, Zero2Spec
from opensora.accel.ddp import DDP, DDPSpec
from opensora.accel.fsdp import FSDP, FSDPSpec
from opensora.accel.pyramid_broadcast import PyramidBroadcast, PyramidBroadcastSpec
from opensora.accel.step_cache import StepCache, StepCacheSpec

__all__ = [
    "DDP",
    "DDPSpec",
    "FSDP",
    "FSDPSpec",
    "Zero2",
    "Zero2Seq",
    "Zero2SeqSpec",
    "Zero2Spec",
    "PyramidBroadcast",
    "PyramidBroadcastSpec",
    "StepCache",
    "StepCacheSpec",
]
