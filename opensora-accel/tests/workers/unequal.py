"""One process has much more to do than the time limit allows the others to wait for."""

import time

from opensora.accel import DDP, DDPSpec

with DDP(DDPSpec(timeout_s=2), device="cpu") as accelerator:
    if accelerator.rank == 1:
        time.sleep(5)
    accelerator.wait()
    accelerator.from_main(lambda: time.sleep(4))
