"""How well plans of training steps hold: predicted against measured, for 30 small configs.

    ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 python benchmarks/planner.py [--only STDiT3] [--no-bf16]

Predicted is what `opensora.core.pipelines.step_cost` rehearses, without memory. Measured is the same step really made on the
CPU, after one that allocates what lasts:

- saved: bytes of the unique storages that autograd's saved-tensor hooks are given, without parameters;
- peak: of what torch's CPU allocator hands out from the encoders to the averaged weights, as the profiler reports each
  allocation, above what lives before the step. So the kernels' own buffers count, which a rehearsal can't know;
- FLOPs: of torch's counter, with attention computed by matrix products, since it doesn't know torch's kernel for CPUs.

Printed are ratios, predicted / measured, and at the end the worst of each. Half precision needs a CPU that computes it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from opensora.core.composing import build_accelerator
from opensora.core.config.structure import structure
from opensora.core.pipelines.lone_step import LoneStep, made_up_batch
from opensora.core.pipelines.step_cost import StepRehearsal, build_on_meta
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Size

PROMPT = " ".join(f"word{index}" for index in range(40))  # fills the encoder's length
SMALL = {"hidden_size": 96, "depth": 2, "num_heads": 4}
WIDE = {"hidden_size": 384, "depth": 2, "num_heads": 8}
DEEP = {"hidden_size": 72, "depth": 8, "num_heads": 4}
LABELS = {"text_encoder": {"type": "classes", "num_classes": 10}}
VIDEO, LONG, IMAGE = (4, 32, 32), (16, 16, 24), (1, 64, 64)


@frozen
class Case:
    """One config, at one size."""

    model: str
    options: Mapping[str, Any]
    size: Size
    batch_size: int
    changes: Mapping[str, Any] = {}

    @property
    def spec(self) -> TrainSpec:
        """As a config would say it."""
        model = {"type": self.model, "patch_size": (1, 2, 2), **self.options}
        if "text_encoder" in self.changes:
            model["condition"] = "label_10"
        scheduler = {"type": "rflow" if self.model == "STDiT3" else "iddpm"}
        dataset = {"type": "VideoTextDataset", "data_path": "none.csv", "num_frames": self.size[0]}
        values = {"model": model, "scheduler": scheduler, "dataset": dataset, "dtype": "fp32", **self.changes}
        return structure(TrainSpec, values)

    def __str__(self) -> str:
        shape = "x".join(map(str, (self.batch_size, *self.size)))
        changes = [
            str(value) if key == "dtype" else f"{key}={value}"
            for key, value in self.changes.items()
            if key != "text_encoder"
        ]
        return (
            f"{self.model:8} {self.options['hidden_size']:4} x {self.options['depth']}  {shape:12} {' '.join(changes)}"
        )


CASES = [
    Case("STDiT3", SMALL, VIDEO, 2),
    Case("STDiT3", SMALL, VIDEO, 2, {"grad_checkpoint": True}),
    Case("STDiT3", SMALL, VIDEO, 2, {"grad_checkpoint": 2}),
    Case("STDiT3", SMALL, VIDEO, 2, {"grad_checkpoint": "selective"}),
    Case("STDiT3", SMALL, VIDEO, 2, {"dtype": "bf16"}),
    Case("STDiT3", WIDE, VIDEO, 2),
    Case("STDiT3", WIDE, VIDEO, 1, {"grad_checkpoint": True}),
    Case("STDiT3", DEEP, LONG, 1),
    Case("STDiT3", DEEP, LONG, 4, {"grad_checkpoint": True}),
    Case("STDiT3", DEEP, VIDEO, 3, {"mask_ratios": {"image_head": 1.0}}),
    Case("STDiT2", SMALL, VIDEO, 2),
    Case("STDiT2", WIDE, VIDEO, 2, {"grad_checkpoint": True}),
    Case("STDiT2", SMALL, VIDEO, 4, {"dtype": "bf16", "grad_checkpoint": True}),
    Case("STDiT2", DEEP, LONG, 2),
    Case("STDiT", SMALL, VIDEO, 2),
    Case("STDiT", WIDE, VIDEO, 2, {"grad_checkpoint": 2}),
    Case("STDiT", SMALL, LONG, 4, {"dtype": "bf16"}),
    Case("STDiT", DEEP, VIDEO, 2, {"ema_decay": 0.0}),
    Case("DiT", SMALL, IMAGE, 4, {**LABELS}),
    Case("DiT", WIDE, IMAGE, 2, {**LABELS, "grad_checkpoint": True}),
    Case("DiT", DEEP, VIDEO, 2, {**LABELS}),
    Case("DiT", SMALL, IMAGE, 4, {**LABELS, "dtype": "bf16"}),
    Case("Latte", SMALL, VIDEO, 2, {**LABELS}),
    Case("Latte", WIDE, VIDEO, 2, {**LABELS, "grad_checkpoint": True}),
    Case("Latte", DEEP, (16, 16, 16), 2, {**LABELS}),
    Case("Latte", SMALL, VIDEO, 2, {**LABELS, "dtype": "bf16"}),
    Case("PixArt", SMALL, IMAGE, 2),
    Case("PixArt", WIDE, IMAGE, 2, {"grad_checkpoint": True}),
    Case("PixArt", DEEP, IMAGE, 4, {"grad_checkpoint": "selective"}),
    Case("PixArt", SMALL, IMAGE, 4, {"dtype": "bf16"}),
]


@frozen(kw_only=True)
class Numbers:
    """Of a step."""

    saved: int
    peak: int
    flops: int


def predict(case: Case, *, exact: bool = True) -> Numbers:
    """By a rehearsal."""
    with StepRehearsal(case.spec, build_on_meta(case.spec, case.size), exact=exact) as rehearsal:
        cost = rehearsal.step(case.size, case.batch_size)
    return Numbers(saved=cost.saved, peak=cost.peak, flops=cost.flops)


class RealStep(LoneStep):
    """The step itself."""

    def __init__(self, case: Case) -> None:
        spec = case.spec
        super().__init__(spec, build_accelerator(spec), case.size)
        prompt = "3" if "text_encoder" in case.changes else PROMPT
        self.batch = made_up_batch(case.size, case.batch_size, prompt=prompt)
        self.make(self.batch)

    def saved(self) -> int:
        """Bytes that hooks see, each storage once."""
        own = {each.untyped_storage().data_ptr() for each in self.parts.denoiser.parameters()}
        found: dict[int, int] = {}
        kept = []  # so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward(self.batch)
        self.backward(loss)
        self.optimizer.zero_grad()
        return sum(found.values())

    def peak(self) -> int:
        """Bytes of the allocator."""
        before = self.resident()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.backward(self.forward(self.batch))
            self.finish()
        events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
        events.sort(key=lambda one: one.start_ns())
        return before + max(accumulate(one.nbytes() for one in events))

    def resident(self) -> int:
        """What lasts from step to step."""
        tensors: list[Tensor] = [*self.average.averages.values()] if self.average else []
        for part in (self.parts.denoiser, self.parts.vae, self.parts.text_encoder):
            tensors += [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else []
        tensors += [each for state in self.optimizer.state.values() for each in state.values()]
        return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())

    def flops(self) -> int:
        """Of torch's counter: the denoiser's, forward and backward."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.backward(self.forward(self.batch))
        self.optimizer.zero_grad()
        return counter.get_total_flops()


def measure(case: Case) -> Numbers:
    """By making it."""
    step = RealStep(case)
    return Numbers(saved=step.saved(), peak=step.peak(), flops=step.flops())


def compare(cases: list[Case]) -> Iterator[dict[str, float]]:
    """Print a line for each, and give the ratios."""
    print(f"{'':52} {'saved':>22} {'peak':>22} {'FLOPs':>7}")
    for case in cases:
        predicted, measured = predict(case), measure(case)
        ratios = {name: getattr(predicted, name) / getattr(measured, name) for name in ("saved", "peak", "flops")}
        columns = [f"{getattr(predicted, name) / 2**20:7.1f} MiB {ratios[name]:9.4f}" for name in ("saved", "peak")]
        print(f"{case!s:52} {columns[0]:>22} {columns[1]:>22} {ratios['flops']:9.6f}", flush=True)
        yield ratios


def main() -> None:
    """Print a table, and a line of JSON with the worst ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a model's name")
    parser.add_argument("--no-bf16", action="store_true", help="leave out what this CPU may not compute")
    arguments = parser.parse_args()
    cases = [
        case
        for case in CASES
        if arguments.only in (None, case.model) and not (arguments.no_bf16 and case.changes.get("dtype") == "bf16")
    ]
    rows = list(compare(cases))
    worst = {name: max((row[name] for row in rows), key=lambda ratio: abs(ratio - 1)) for name in rows[0]}
    print(json.dumps({"configs": len(rows), **{f"worst {name}": round(ratio, 4) for name, ratio in worst.items()}}))


if __name__ == "__main__":
    main()
