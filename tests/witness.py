"""A hook that tests install into a run: it writes down which samples each step had, and what each process holds.

``ids.jsonl`` gets a line for each process and step; ``held-RANK.json`` is written when training ends.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from attrs import frozen

from opensora.core import hook
from opensora.core.run_folder import append_jsonl, read_jsonl

METADATA = "Metadata-Version: 2.1\nName: witness\nVersion: 1.0\n"
ENTRY_POINTS = "[opensora.hooks]\nwitness = witness:Witness\n"


def install(folder: Path) -> dict[str, str]:
    """Make the hook known to commands that are started with these variables."""
    metadata = folder / "witness-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(METADATA)
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(Path(__file__).parent)))}


def samples_of_steps(run_folder: Path) -> dict[int, list[tuple[int, int]]]:
    """(epoch, row) of each step's samples, as the last run had them that made the step."""
    steps: dict[int, tuple[int, list[tuple[int, int]]]] = {}
    for record in read_jsonl(run_folder / "ids.jsonl"):
        step, run, keys = record["step"], record["run"], [tuple(key) for key in record["keys"]]
        before = steps.get(step)
        steps[step] = (run, [*before[1], *keys] if before and before[0] == run else keys)
    return {step: keys for step, (_, keys) in sorted(steps.items())}


@frozen(kw_only=True)
class WitnessSpec:
    """No options."""


class Recording:
    """A dataset that remembers the keys that it was asked for."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.keys: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def __getitem__(self, key: Any) -> Any:
        self.keys.append([key.epoch, key.index])
        return self.dataset[key]


class Witness:
    """Needs ``num_workers = 0``."""

    Spec = WitnessSpec

    def __init__(self, spec: WitnessSpec) -> None:
        self.dataset: Recording | None = None

    @hook
    def train_start(self, run: Any) -> None:
        """Look over the dataset's shoulder."""
        self.dataset = run.dataset = Recording(run.dataset)

    @hook(tryfirst=True)
    def step_end(self, run: Any, update: Any) -> None:
        """Write the step's samples down, before a checkpoint says that it was made."""
        append_jsonl(run.folder / "ids.jsonl", {"run": os.getppid(), "step": update.step, "keys": self.dataset.keys})
        self.dataset.keys = []

    @hook
    def train_end(self, run: Any) -> None:
        """Write down what this process holds."""
        state = run.optimizer.state_dict()["state"]
        named = dict(run.module.named_parameters())
        report = {
            "types": sorted({type(part).__name__ for part in run.module.modules()}),
            "parameters": {name: sizes(each) for name, each in named.items() if each.requires_grad},
            "averages": {name: sizes(each) for name, each in run.ema.averages.items()},
            "momenta": {index: sizes(each["exp_avg"]) for index, each in state.items()},
        }
        (run.folder / f"held-{run.accelerator.rank}.json").write_text(json.dumps(report))


def sizes(tensor: Any) -> list[int]:
    """Numbers in the whole tensor, and in this process's part."""
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return [tensor.numel(), own.numel()]
