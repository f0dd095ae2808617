"""What two processes make of a few tasks, written to ``<folder>/<rank>.pt``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from problem import STEPS, Small, step_data, train

from opensora.accel import DDP, DDPSpec
from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError

FOLDER = Path(sys.argv[1])


def exchanged_gradients(accelerator: DDP) -> dict[str, torch.Tensor]:
    """The gradient after a micro-step that is not the last of its step, and after the last."""
    torch.manual_seed(0)
    denoiser = Small()
    predict = accelerator.prepare(denoiser)
    latents, timestep, conditioning = step_data(accelerator.rank)
    seen = {}
    for name, last in (("kept back", False), ("exchanged", True)):
        with accelerator.micro_step(last=last):
            accelerator.backward(predict(latents, timestep, conditioning).square().mean())
        seen[name] = denoiser.first.weight.grad.clone()
    return seen


def unused_parameter(accelerator: DDP) -> str:
    """The error of a denoiser that does not use one of its parameters."""
    predict = accelerator.prepare(Small())
    latents, timestep, _ = step_data(0)
    try:
        for _ in range(2):
            accelerator.backward(predict(latents, timestep, Conditioning()).mean())
    except ConfigError as error:
        return str(error)
    return "no error"


def error_of_main(accelerator: DDP) -> str:
    """What every process gets of an error that only the main one had."""

    def fail() -> None:
        raise ConfigError(f"rank {accelerator.rank} failed")

    try:
        accelerator.from_main(fail)
    except ConfigError as error:
        return str(error)
    return "no error"


with DDP(DDPSpec(timeout_s=60), device="cpu") as accelerator:
    rank = accelerator.rank
    whole, halves = [slice(4 * rank, 4 * rank + 4)], [slice(2 * rank, 2 * rank + 2), slice(2 * rank + 4, 2 * rank + 6)]
    results = {
        "place": (rank, accelerator.world_size, accelerator.is_main, str(accelerator.device)),
        "trained": train(accelerator, micro_batches=[whole] * STEPS),
        "trained with accumulation": train(accelerator, micro_batches=[halves] * STEPS),
        "gradients": exchanged_gradients(accelerator),
        "highest": [accelerator.highest(value) for value in (0, 1, 2 * rank)],
        "mean": accelerator.mean(torch.tensor([rank, 10.0 + 2 * rank])),
        "broadcast": accelerator.broadcast({"folder": FOLDER / str(rank), "error": None}),
        "from main": accelerator.from_main(lambda: accelerator.rank),
        "error of main": error_of_main(accelerator),
        "unused": unused_parameter(accelerator),
    }
    torch.save(results, FOLDER / f"{rank}.pt")
    if rank == 0:
        time.sleep(0.5)  # the other one waits on leaving
        (FOLDER / "main left").touch()
assert (FOLDER / "main left").exists()
assert not torch.distributed.is_initialized()
