"""What sequence parallelism sends, against the formula, and what it leaves in the memory of a process.

    python benchmarks/sequence_parallel.py [--depth 2] [--processes 2 4]

Real gloo processes on this machine make one training step each (float32, a video of 5 latent frames of 15 x 27 tokens, width
1152, 16 heads). Counted is what each hands to ``all_to_all_single`` and ``all_gather`` for the others (its own part, which
stays, is left out), summed over the processes. The formula, of B x N = B x T x S tokens in p processes, whose shares of
sequences, positions, tokens and heads are R_i, S_i, N_i, H_i (if all are even, what stays is one p-th of the whole):

- attention within frames, one in two blocks: 2 D (B T S - sum R_i S_i) numbers;
- attention among all tokens, each block: 4 D / H (B N H - sum B N_i H_i) numbers;
- the output, once: p (p - 1) times the largest share of B N O numbers, O of them a token; forward alone.

Backward sends the same but for the output. What is saved for backward is counted by torch's saved-tensor hooks, parameters
left out, and compared with one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora.accel.sequence_parallel import parallelize_sequence, share_sizes
from opensora.core import Conditioning
from opensora.models import pixart, stdit3

WIDTH, HEADS, CHANNELS, TEXT_WIDTH, TEXT_LENGTH, BATCH = 1152, 16, 4, 64, 20, 1
SIZE = (5, 30, 54)
FRAMES, POSITIONS = 5, 15 * 27
TOKENS, OUT = FRAMES * POSITIONS, 4 * 2 * CHANNELS
NAMES = {"switch": "STDiT3, switch", "heads": "PixArt, Ulysses"}


def build(name: str, depth: int) -> nn.Module:
    """A denoiser with attention of that kind."""
    torch.manual_seed(0)
    common: dict[str, Any] = {"hidden_size": WIDTH, "num_heads": HEADS, "depth": depth}
    given: dict[str, Any] = {"latent_channels": CHANNELS, "text_width": TEXT_WIDTH, "text_length": TEXT_LENGTH}
    if name == "switch":
        return stdit3.STDiT3(stdit3.STDiT3Spec(**common), **given)
    return pixart.PixArt(pixart.PixArtSpec(**common), latent_size=SIZE, **given)


class Sent:
    """Bytes that this process hands over for others."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what is sent inside the block."""
        all_to_all, all_gather = dist.all_to_all_single, dist.all_gather

        def counting_all_to_all(output: Tensor, given: Tensor, out: list[int], sizes: list[int], **options: Any) -> Any:
            self.bytes += (sum(sizes) - sizes[dist.get_rank()]) * given.element_size()
            return all_to_all(output, given, out, sizes, **options)

        def counting_all_gather(outputs: list[Tensor], given: Tensor, **options: Any) -> Any:
            self.bytes += (len(outputs) - 1) * given.nbytes
            return all_gather(outputs, given, **options)

        dist.all_to_all_single, dist.all_gather = counting_all_to_all, counting_all_gather  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.all_to_all_single, dist.all_gather = all_to_all, all_gather


class Saved:
    """Bytes that are kept for backward, each piece of memory once."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self._seen: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Count it."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        """Of all."""
        return sum(self._seen.values())


def step(module: nn.Module) -> dict[str, int]:
    """One forward and backward pass."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, CHANNELS, *SIZE, generator=generator)
    conditioning = Conditioning(
        text_embedding=torch.randn(BATCH, TEXT_LENGTH, TEXT_WIDTH, generator=generator),
        fps=torch.full((BATCH,), 24.0),
        height=torch.full((BATCH,), 240.0),
        width=torch.full((BATCH,), 432.0),
    )
    forward, backward, saved = Sent(), Sent(), Saved(module)
    with forward.counted(), torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        output = module(latents, torch.full((BATCH,), 500.0), conditioning)
    with backward.counted():
        output.square().mean().backward()
    return {"forward": forward.bytes, "backward": backward.bytes, "saved": saved.bytes}


def formula(name: str, depth: int, processes: int) -> dict[str, int]:
    """Bytes of all processes, by what the docstring says."""

    def stays(one: int, other: int) -> int:
        return sum(a * b for a, b in zip(share_sizes(one, processes), share_sizes(other, processes), strict=True))

    if name == "switch":
        sequences = BATCH * FRAMES
        exchanged = 2 * WIDTH * (sequences * POSITIONS - stays(sequences, POSITIONS))
        tokens, rest = POSITIONS, FRAMES
    else:
        exchanged = 4 * WIDTH // HEADS * BATCH * (TOKENS * HEADS - stays(TOKENS, HEADS))
        tokens, rest = TOKENS, 1
    largest = share_sizes(tokens, processes)[0]  # the output's shares are padded to it
    output = (processes - 1) * processes * BATCH * rest * largest * OUT
    return {"forward": 4 * (depth * exchanged + output), "backward": 4 * depth * exchanged}


def work(folder: Path, depth: int) -> None:
    """What one of the processes does."""
    dist.init_process_group("gloo")
    results = {}
    for name in NAMES:
        module = build(name, depth)
        assert dist.group.WORLD is not None
        parallelize_sequence(module, dist.group.WORLD)
        results[name] = step(module)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def launch(folder: Path, processes: int, depth: int) -> list[dict[str, dict[str, int]]]:
    """What each process counted."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={processes}", __file__, "--depth", str(depth), "--folder", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    """Print the table."""
    from tempfile import TemporaryDirectory

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=2, help="of PixArt; STDiT3 has as many pairs of blocks [2]")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="how many share the sample [2 4]")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        work(options.folder, options.depth)
        return
    alone = {name: step(build(name, options.depth))["saved"] for name in NAMES}
    print(f"MB a step, of all processes; {BATCH} x {TOKENS} tokens of {WIDTH} float32, {options.depth} blocks or pairs")
    print("| model | processes | forward | formula | backward | formula | saved in a process, of one alone |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for processes in options.processes:
        with TemporaryDirectory() as folder:
            results = launch(Path(folder), processes, options.depth)
        for name, title in NAMES.items():
            expected = formula(name, options.depth, processes)
            cells = [title, str(processes)]
            for way in ("forward", "backward"):
                counted = sum(result[name][way] for result in results)
                cells += [f"{counted / 1e6:.3f}", f"{expected[way] / 1e6:.3f}"]
            saved = max(result[name]["saved"] for result in results)
            print("| " + " | ".join([*cells, f"{saved / alone[name]:.2f}"]) + " |")


if __name__ == "__main__":
    main()
