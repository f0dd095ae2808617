"""What a step of the denoisers costs: DiT, PixArt and Latte against the classes of diffusers, all against the machine.

    python benchmarks/denoisers.py [--quick] [--only PixArt,STDiT3] [--rounds 9]

Both sides have the same weights and inputs (float32, two threads), and their outputs are checked to agree within 1e-5. They
are timed in one process, in turns, and printed is the ratio of the medians, ours / theirs, of

- step: a forward pass of sampling, with the prompts of the step before it, so that what is remembered of them serves;
- first: a forward pass with prompts that are new;
- train: a forward and a backward pass.

The share of the peak is the work of the model's matrix products per second over that of one matrix product of fitting size,
timed in the same turns with both of torch's libraries, of which the faster counts. Memory is what a process (one for each)
grows by at most while passes run, after a first pass; it is read from Linux and left out elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opensora.core import Conditioning
from opensora.models import dit, latte_t2v, pixart, stdit, stdit2, stdit3
from opensora.models._layers.linear import Linear

THREADS = 2
TOLERANCE = 1e-5
TEXT_TOKENS = 120
Run = Callable[[], Tensor]


@frozen(kw_only=True)
class Scale:
    """How large a model and its inputs are."""

    width: int
    heads: int
    depth: int
    side: int
    """Of the latents of an image; a video has half of it, and four frames."""
    text_width: int
    prompts: tuple[int, ...]
    """How many of the text tokens each prompt has; as many samples make the batch."""
    rounds: int


SCALES = {
    "small": Scale(width=288, heads=4, depth=4, side=32, text_width=512, prompts=(77, 30), rounds=40),
    "XL": Scale(width=1152, heads=16, depth=4, side=64, text_width=4096, prompts=(77,), rounds=9),
}
MODELS = {
    "DiT": (dit.DiT, {"condition": "label_1000", "no_temporal_pos_emb": True, "frequency_shift": 1}),
    "PixArt": (pixart.PixArt, {"no_temporal_pos_emb": True}),
    "Latte": (latte_t2v.LatteT2V, {}),
    "STDiT": (stdit.STDiT, {}),
    "STDiT2": (stdit2.STDiT2, {}),
    "STDiT3": (stdit3.STDiT3, {}),
}
IMAGES, PAIRS = ("DiT", "PixArt"), ("Latte", "STDiT3")
MODES = ("step", "first", "train")


class Case:
    """A model of this project with its inputs and, if diffusers has the same, its peer."""

    def __init__(self, name: str, scale: Scale) -> None:
        self.name, self.scale = name, scale
        cls, options = MODELS[name]
        depth = scale.depth // 2 if name in PAIRS else scale.depth  # of pairs of blocks
        spec = cls.Spec(hidden_size=scale.width, num_heads=scale.heads, depth=depth, **options)
        frames, side = (1, scale.side) if name in IMAGES else (4, scale.side // 2)
        given = {"latent_channels": 4, "text_width": None if name == "DiT" else scale.text_width}
        given |= {} if name in ("STDiT2", "STDiT3") else {"latent_size": (frames, side, side)}
        given |= {} if name == "DiT" else {"text_length": TEXT_TOKENS}
        torch.manual_seed(0)
        self.model = cls(spec, **given).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))  # what starts at zero too
        batch = len(scale.prompts)
        self.latents = torch.randn(batch, 4, frames, side, side)
        self.timestep = torch.linspace(100, 900, batch).long()
        lengths = (
            (TEXT_TOKENS,) * batch if name == "Latte" else scale.prompts
        )  # its pipeline in diffusers gives no mask
        self.text = torch.randn(batch, TEXT_TOKENS, scale.text_width)
        self.mask = torch.arange(TEXT_TOKENS) < torch.tensor(lengths)[:, None]
        self.labels = torch.arange(batch)
        self.prompts = self.new_prompts()

    def new_prompts(self) -> Conditioning:
        """What the model is told, as an object that it has not seen."""
        sizes = {key: torch.full((len(self.latents),), 8.0 * self.latents.shape[-1]) for key in ("height", "width")}
        others = {"aspect_ratio": 1.0, "fps": 24.0, "num_frames": 16.0}
        sizes |= {key: torch.full((len(self.latents),), value) for key, value in others.items()}
        if self.name == "DiT":
            return Conditioning(labels=self.labels, **sizes)
        return Conditioning(text_embedding=self.text, text_mask=self.mask, **sizes)

    def ours(self, mode: str) -> Run:
        """One pass of this project's model."""
        if mode == "first":
            return lambda: self.model(self.latents, self.timestep, self.new_prompts())
        return lambda: self.model(self.latents, self.timestep, self.prompts)

    def peer(self) -> nn.Module | None:
        """Diffusers' model with the same weights."""
        if self.name not in ("DiT", "PixArt", "Latte"):
            return None
        import diffusers

        exported = type(self.model).interop.to_diffusers(self.model)
        cls = getattr(diffusers, exported.config["_class_name"])
        peer = cls.from_config({key: value for key, value in exported.config.items() if not key.startswith("_open")})
        peer.load_state_dict({key: value.clone() for key, value in exported.tensors.items()})
        return peer.eval()

    def theirs(self, peer: nn.Module) -> Run:
        """One pass of diffusers' model, [B, C, T, H, W] as ours."""
        image, text = self.latents[:, :, 0], {"encoder_hidden_states": self.text}
        if self.name == "DiT":
            return lambda: peer(image, self.timestep, self.labels).sample[:, :, None]
        if self.name == "PixArt":
            sizes = {"resolution": None, "aspect_ratio": None}
            text |= {"encoder_attention_mask": self.mask, "added_cond_kwargs": sizes}
            return lambda: peer(image, timestep=self.timestep, **text).sample[:, :, None]
        return lambda: peer(self.latents, timestep=self.timestep, **text).sample

    def work(self, mode: str) -> int:
        """Floating-point operations of the matrix products, attention included."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            execute(self.ours(mode), mode, self.model)
        return counter.get_total_flops()


def execute(run: Run, mode: str, model: nn.Module) -> Tensor:
    """A pass in sampling or training."""
    if mode != "train":
        with torch.inference_mode():
            return run()
    output = run()
    output.square().mean().backward()
    model.zero_grad(set_to_none=True)
    return output


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


class Peak:
    """A matrix product of a size that occurs in the model: tokens by the first layer of the feed-forward network."""

    def __init__(self, scale: Scale) -> None:
        tokens = len(scale.prompts) * (scale.side // 2) ** 2
        self.x, self.layer = torch.randn(tokens, scale.width), Linear(scale.width, 4 * scale.width, bias=False)
        self.work = 2 * tokens * self.layer.weight.numel()
        self.seconds: list[tuple[float, float]] = []

    @torch.inference_mode()
    def measure(self) -> None:
        """Time it with torch's own choice of library and with this project's."""
        own, plain = seconds(lambda: self.layer(self.x)), seconds(lambda: self.x @ self.layer.weight.t())
        self.seconds.append((own, plain))

    @property
    def rate(self) -> float:
        """Operations a second, of the faster."""
        return self.work / min(map(statistics.median, zip(*self.seconds, strict=True)))


@frozen(kw_only=True)
class Row:
    """One line of the table."""

    name: str
    scale: str
    mode: str
    ms: float
    share: float
    ratio: float | None = None
    peer_share: float | None = None
    memory: float | None = None

    def __str__(self) -> str:
        def percent(value: float | None) -> str:
            return "" if value is None else f"{value:.0%}"

        ratio, memory = ("" if each is None else f"{each:.3f}" for each in (self.ratio, self.memory))
        return (
            f"{self.name:7} {self.scale:6} {self.mode:6} {self.ms:8.1f} {percent(self.share):>6} {ratio:>7} "
            f"{percent(self.peer_share):>6} {memory:>7}"
        )


HEADER = "model   scale  pass    ms ours   peak   ratio   peer  memory"


def compare(name: str, label: str, rounds: int | None) -> Iterator[Row]:
    """Time all passes of one model."""
    scale = SCALES[label]
    case = Case(name, scale)
    peer = case.peer()
    if peer is not None:
        check_agreement(case, peer)
    for mode in ("step", "train") if name == "DiT" else MODES:  # a class label needs nothing that is worth remembering
        runs = {"ours": lambda mode=mode: execute(case.ours(mode), mode, case.model)}
        if peer is not None:
            runs["theirs"] = lambda mode=mode: execute(case.theirs(peer), mode, peer)
        medians, peak = time_in_turns(runs, scale, rounds or scale.rounds)
        rate = case.work(mode) / peak.rate
        theirs = medians.get("theirs")
        yield Row(
            name=name,
            scale=label,
            mode=mode,
            ms=1000 * medians["ours"],
            share=rate / medians["ours"],
            ratio=None if theirs is None else medians["ours"] / theirs,
            peer_share=None if theirs is None else case.work("first" if mode == "step" else mode) / peak.rate / theirs,
            memory=None if theirs is None else memory_ratio(name, label, mode),
        )


def check_agreement(case: Case, peer: nn.Module) -> None:
    """Stop if the two do not compute the same, in a first pass and in one that follows it."""
    with torch.inference_mode():
        expected = case.theirs(peer)()
        for mode in ("first", "step", "step"):
            torch.testing.assert_close(case.ours(mode)(), expected, atol=TOLERANCE, rtol=0)


def time_in_turns(runs: Mapping[str, Callable[[], Any]], scale: Scale, rounds: int) -> tuple[dict[str, float], Peak]:
    """Median seconds of each, after one round of warming up; who is first changes from round to round."""
    peak = Peak(scale)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        peak.measure()
        for name in sorted(runs, reverse=turn % 2 == 1):
            times[name].append(seconds(runs[name]))
    peak.seconds.pop(0)
    return {name: statistics.median(values[1:]) for name, values in times.items()}, peak


def memory_ratio(name: str, label: str, mode: str) -> float | None:
    """How much a pass adds to the memory of a process of its own, ours / theirs."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    grown = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, "--memory", name, label, mode, side]
        # Freed memory goes back to the system at once, so that what is in use is what is counted.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        grown[side] = int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    return grown["ours"] / grown["theirs"]


def print_growth(name: str, label: str, mode: str, side: str) -> None:
    """In a process of its own: bytes by which it grows at most in two passes."""
    case = Case(name, SCALES[label])
    peer = case.peer() if side == "theirs" else None
    if peer is not None:
        case.model = nn.Module()
    run, model = (case.ours(mode), case.model) if peer is None else (case.theirs(peer), peer)
    # Once before, for the libraries' own memory; with other prompts, so that what is remembered of the prompts counts.
    execute(case.ours("first") if peer is None else run, mode, model)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    for _ in range(2):
        execute(run, mode, model)
    print(resident("VmHWM") - before)


def resident(which: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(which)))


def summarize(rows: list[Row]) -> dict[str, float]:
    """The worst and the mean of what is compared."""
    ratios = [row.ratio for row in rows if row.ratio is not None]
    memories = [row.memory for row in rows if row.memory is not None]
    shares = [row.share for row in rows if row.scale == "XL"]
    found = {"worst share of the peak, XL": min(shares)} if shares else {}
    if ratios:
        found |= {"worst ratio": max(ratios), "mean ratio": statistics.mean(ratios)}
    return found | ({"worst memory ratio": max(memories)} if memories else {})


def main() -> None:
    """Print a table, and a line of JSON with its summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small scale only, in fewer rounds")
    parser.add_argument("--only", metavar="MODELS", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, help="how often each is timed")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(MODELS)
    if unknown := set(names) - set(MODELS):
        parser.error(f"no model is named {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    torch.set_num_threads(THREADS)
    if arguments.memory:
        print_growth(*arguments.memory)
        return
    rows = []
    print(HEADER)
    for label in ("small",) if arguments.quick else SCALES:
        for name in names:
            for row in compare(name, label, arguments.rounds or (10 if arguments.quick else None)):
                rows.append(row)
                print(row, flush=True)
    print(json.dumps({key: round(value, 3) for key, value in summarize(rows).items()}))


if __name__ == "__main__":
    main()
