"""What two processes make of a few tasks under ZeRO-2, written to ``<folder>/<rank>.pt``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from problem import STEPS, Small, step_data, train

from opensora.accel.colossalai import Zero2, Zero2Spec
from opensora.core.errors import ConfigError

FOLDER = Path(sys.argv[1])


def make_step(accelerator: Zero2, denoiser: Small, factor: float) -> dict[str, object]:
    """Sizes of what this process holds while a step is made, and the norm of its gradients."""
    predict = accelerator.prepare(denoiser)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(denoiser.parameters(), lr=0.01))
    before = {name: each.clone() for name, each in denoiser.state_dict().items()}
    latents, timestep, conditioning = step_data(0)
    accelerator.backward(predict(latents, timestep, conditioning).mean() * factor)
    left = [name for name, each in denoiser.named_parameters() if each.grad is not None]
    gradients = {name: optimizer.zero.get_working_grad_by_param_id(id(p)) for name, p in denoiser.named_parameters()}
    norm = accelerator.update(optimizer, list(denoiser.parameters()), grad_clip=0.0)
    states = [optimizer.optim.state[each] for group in optimizer.param_groups for each in group["params"]]
    return {
        "norm": norm,
        "whole gradients": left,
        "gradients": {name: each.numel() for name, each in gradients.items()},
        "states": [state["exp_avg"].numel() if state else 0 for state in states],
        "changed": [name for name, each in denoiser.state_dict().items() if not torch.equal(each, before[name])],
    }


def second_network(accelerator: Zero2) -> str:
    try:
        accelerator.prepare(Small())
    except ConfigError as error:
        return str(error)
    return "no error"


def accelerated() -> Zero2:
    return Zero2(Zero2Spec(timeout_s=60, bucket_size=60), device="cpu")  # several exchanges a step


with accelerated() as accelerator:
    rank = accelerator.rank
    halves = [slice(2 * rank, 2 * rank + 2), slice(2 * rank + 4, 2 * rank + 6)]
    results = {"trained with accumulation": train(accelerator, micro_batches=[halves] * STEPS)}
    results["second network"] = second_network(accelerator)
for name, factor in (("step", 1.0), ("infinite in one process", float("inf") if rank else 1.0)):
    with accelerated() as accelerator:
        results[name] = make_step(accelerator, Small(), factor)
torch.save(results, FOLDER / f"{rank}.pt")
