"""What two processes hold while they make two steps under ZeRO-2, written to ``<folder>/<rank>.pt``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from problem import Small, step_data

from opensora.accel.colossalai import Zero2, Zero2Spec
from opensora.core.errors import ConfigError

FOLDER = Path(sys.argv[1])


def second_network(accelerator: Zero2) -> str:
    try:
        accelerator.prepare(Small())
    except ConfigError as error:
        return str(error)
    return "no error"


with Zero2(Zero2Spec(timeout_s=60, bucket_size=60), device="cpu") as accelerator:  # several exchanges a step
    torch.manual_seed(accelerator.rank)  # the main process's initial weights are to win
    denoiser = Small()
    predict = accelerator.prepare(denoiser)
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(denoiser.parameters(), lr=0.01))

    def make_step(factor: float) -> dict[str, object]:
        before = {name: each.clone() for name, each in denoiser.state_dict().items()}
        accelerator.backward(predict(*step_data(accelerator.rank)).square().mean() * factor)
        left = [name for name, each in denoiser.named_parameters() if each.grad is not None]
        gradients = {
            name: optimizer.zero.get_working_grad_by_param_id(id(p)) for name, p in denoiser.named_parameters()
        }
        sizes = {name: each.numel() for name, each in gradients.items()}
        norm = accelerator.update(optimizer, list(denoiser.parameters()), grad_clip=0.0)
        states = [optimizer.optim.state[each] for group in optimizer.param_groups for each in group["params"]]
        return {
            "norm": norm,
            "whole gradients": left,
            "gradients": sizes,
            "states": [state["exp_avg"].numel() for state in states],
            "changed": [name for name, each in denoiser.state_dict().items() if not torch.equal(each, before[name])],
            "weights": {name: each.clone() for name, each in denoiser.state_dict().items()},
        }

    results = {
        "step": make_step(1.0),
        "infinite in one process": make_step(float("inf") if accelerator.rank else 1.0),
        "second network": second_network(accelerator),
    }
    torch.save(results, FOLDER / f"{accelerator.rank}.pt")
