"""One process fails while the other waits for it."""

from __future__ import annotations

from opensora.accel import DDP, DDPSpec

with DDP(DDPSpec(timeout_s=60), device="cpu") as accelerator:
    if accelerator.rank == 1:
        raise SystemExit("process 1 gives up")
    accelerator.barrier()
