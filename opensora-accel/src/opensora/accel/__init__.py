"""Accelerators of opensora: how a step runs on the hardware."""

from opensora.accel.ddp import DDP, DDPSpec

__all__ = ["DDP", "DDPSpec"]
