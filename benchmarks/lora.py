"""LoRA teaches the quickstart's model a new word, and its own weights stay as they are, bit for bit.

    python benchmarks/lora.py RUN_FOLDER [STEPS]

RUN_FOLDER is that of `opensora-run quickstart`. Adapters beside the attention to text and the embedding of text are trained
for STEPS (300) steps on clips of sevens whose captions say "sieben", a word that the model never met, and on as many clips of
all other digits with their usual captions. Samples of the new captions, and of the usual ones, are graded before and after.
Needs about a minute on one core.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from opensora.core.config.evaluate import Config, evaluate
from opensora.core.config.structure import structure
from opensora.core.config.write import write_config
from opensora.core.pipelines.train import Train
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.sampling import load
from opensora.data.digits.clips import DIGITS, DIRECTIONS, captions
from opensora.data.digits.grader import Grader

NEW, OLD = "sieben", "seven"
ADAPTERS = {"type": "lora", "rank": 16, "target_modules": ["y_embedder", ".*cross_attn"]}
SEEDS = 8
"""Samples of each new caption; of the usual ones there is one each."""


class Watched(Train):
    """Remembers the weights that training begins with."""

    def build_run(self, *arguments: Any, **keywords: Any) -> Any:
        """As that of the base, of which this keeps what it makes."""
        self.training = super().build_run(*arguments, **keywords)
        self.before = {name: weight.detach().clone() for name, weight in frozen(self.training.denoiser).items()}
        return self.training


def main() -> None:
    run_folder, steps = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 300
    rows = [("before", *grades(run_folder, run_folder / "train"))]
    with TemporaryDirectory() as folder:
        pipeline = train(run_folder, Path(folder), steps)
        after = frozen(pipeline.training.denoiser)
        assert after.keys() == pipeline.before.keys()
        assert all(torch.equal(after[name], weight) for name, weight in pipeline.before.items()), "the base has changed"
        trained = sum(parameter.numel() for parameter in pipeline.training.parameters)
        rows.append(("after", *grades(run_folder, Path(folder) / "run")))
    own = sum(weight.numel() for weight in after.values())
    print(f"{trained:,} parameters were trained for {steps} steps; all {own:,} of the model are equal, bit for bit.\n")
    print(f'| | "{NEW}": digit | direction | usual captions: digit | direction |\n| --- | --- | --- | --- | --- |')
    for name, *shares in rows:
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |")


def frozen(module: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own weights."""
    return {name: parameter for name, parameter in module.named_parameters() if ".lora_" not in name}


def train(run_folder: Path, folder: Path, steps: int) -> Watched:
    """Train adapters into ``folder``/run."""
    values: dict[str, Any] = dict(evaluate(run_folder / "train" / "config.py").values)
    values["model"] = {**values["model"], "from_pretrained": str(run_folder / "train")}
    values["dataset"] = {**values["dataset"], "data_path": str(write_table(run_folder / "data", folder / "clips.csv"))}
    values |= {
        "hooks": [ADAPTERS],
        "run_folder": str(folder / "run"),
        "mask_ratios": None,
        "max_steps": steps,
        "warmup_steps": 20,
        "ckpt_every": 0,
        "ema_decay": 0.98,
        "without_hooks": ["progress", "tensorboard"],
    }
    pipeline = Watched(structure(TrainSpec, values), config=Config(values=values, locations={}))
    pipeline.run()
    return pipeline


def write_table(data: Path, path: Path) -> Path:
    """All sevens with the new word, and as many other clips as they are."""
    with (data / "clips.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sevens = [row for row in rows if f" {OLD} " in row["text"]]
    others = [row for row in rows if f" {OLD} " not in row["text"]]
    others = others[:: len(others) // len(sevens)]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "text"])
        table.writerows([data / row["path"], row["text"].replace(f" {OLD} ", f" {NEW} ")] for row in sevens + others)
    return path


def grades(run_folder: Path, weights: Path) -> list[float]:
    """Shares of samples with the right digit, and with the right direction: of the new captions, and of the usual ones."""
    new = [(DIGITS.index(OLD), way, f"a handwritten {NEW} moving {way}") for way in DIRECTIONS] * SEEDS
    values: dict[str, Any] = dict(evaluate(run_folder / "samples" / "config.py").values)
    values["model"] = {**values["model"], "from_pretrained": str(weights)}
    shares: list[float] = []
    with TemporaryDirectory() as folder:
        write_config(Path(folder) / "config.py", values, "The quickstart's model.")
        pipeline, grader = load(Path(folder) / "config.py"), Grader()
        for kinds in (new, [kind for kind in captions() if kind[0] != DIGITS.index(OLD)]):
            latents = pipeline.start([caption for _, _, caption in kinds], seed=0).finish()
            readings = [grader.read(frames.numpy()) for frames in pipeline.decode(latents)]
            right = zip(readings, kinds, strict=True)
            found = [(reading.digit == digit, reading.direction == way) for reading, (digit, way, _) in right]
            shares += [sum(column) / len(column) for column in zip(*found, strict=True)]
    return shares


if __name__ == "__main__":
    main()
