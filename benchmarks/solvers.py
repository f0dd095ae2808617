"""Solvers: how far from the exact solution they end, by the number of times that the denoiser is asked.

    python benchmarks/solvers.py [RUN_FOLDER [SEEDS]]

First on data whose best denoiser is known: a mixture of 5 normals in 8 dimensions, as a flow and as a diffusion process.
Then, if RUN_FOLDER is that of `opensora-run quickstart`, on its model: 40 captions with SEEDS (10) seeds each, the distance
of the latents to those of 50 steps of Heun, and the grades. Distances are root mean squares, where the data's deviation from
0 is about 1. The model takes about a quarter of an hour on an idle CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import torch
from torch import Tensor

from opensora.core import Conditioning, build
from opensora.core.config.evaluate import evaluate
from opensora.core.config.write import write_config
from opensora.core.sampling import SamplingPipeline, load
from opensora.schedulers import SOLVERS, DPMSolver, DPMSolverSpec, Levels, Sampler
from opensora.schedulers.sampling import from_clean
from opensora.schedulers.solvers import NOISY_SOLVERS

EVALUATIONS = (6, 10, 20, 40)
EXACT_SOLVERS = [name for name in SOLVERS if name not in NOISY_SOLVERS]
PEER: dict[str, Any] = {"solver": "euler", "num_sampling_steps": 20}
"""What grades are compared with, sample by sample."""
STEPS = (("euler", (6, 10, 20, 40)), ("heun", (5, 10)), ("dpm++2m", (10, 20)), ("unipc", (6, 10, 20)))
AT_HIGH_NOISE = {"cfg_interval": (0.4, 1.0), "sampling_shift": 2.0}
MODEL_RUNS: list[dict[str, Any]] = [
    *(
        {"solver": name, "num_sampling_steps": steps, "sampling_shift": shift}
        for shift in (1.0, 2.0)
        for name, all_steps in STEPS
        for steps in all_steps
    ),
    *(
        {"solver": name, "num_sampling_steps": steps, **AT_HIGH_NOISE}
        for name, steps in (("euler", 20), ("heun", 10), ("unipc", 10))
    ),
    {"solver": "unipc", "num_sampling_steps": 10, "sampling_shift": 2.0, "cfg_interval": (0.0, 0.9)},
    *(
        {"solver": name, "num_sampling_steps": steps}
        for name, steps in (("euler-ancestral", 10), ("euler-ancestral", 40), ("dpm++2m-sde", 40))
    ),
]


def main() -> None:
    on_a_mixture()
    if len(sys.argv) > 1:
        on_a_model(Path(sys.argv[1]), seeds=int(sys.argv[2]) if len(sys.argv) > 2 else 10)


# ---- data whose best denoiser is known


def best_denoiser(levels: Levels, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The expected clean latents, of a mixture of normals."""
    level = (levels.timesteps[:, 0] - timestep[0]).abs().argmin()
    alpha, sigma, deviation = levels.alphas[level, 0], levels.sigmas[level, 0], 0.3
    x = latents.flatten(1).double()[:, None]  # [B, 1, 8]
    means = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variance = (alpha * deviation) ** 2 + sigma**2
    odds = (-(x - alpha * means).square().sum(-1) / (2 * variance)).softmax(-1)
    expected = means + alpha * deviation**2 / variance * (x - alpha * means)  # [B, 5, 8]
    return (odds[..., None] * expected).sum(1).float().view_as(latents)


def flow(steps: int, shift: float = 1.0) -> Levels:
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:, None]
    u = shift * u / (1 + (shift - 1) * u)
    return Levels(timesteps=1000 * u, alphas=1 - u, sigmas=u)


def diffusion(steps: int, spacing: Any) -> Levels:
    return DPMSolver(DPMSolverSpec(num_sampling_steps=steps, spacing=spacing)).levels()


def solved(name: str, levels: Levels, noise: Tensor) -> Tensor:
    """Where a solver ends."""
    sampler = Sampler(levels=levels, weights=SOLVERS[name](levels, eta=0.0), foresee=from_clean)
    steps = sampler.sample(partial(best_denoiser, levels), noise, Conditioning(), draws=None)  # type: ignore[arg-type]
    *_, last = steps
    return last.latents


def on_a_mixture() -> None:
    """Print a table for each process."""
    noise = torch.randn(1000, 8, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    processes = {
        "flow": flow,
        "flow, sampling_shift 3": partial(flow, shift=3.0),
        "diffusion, time_uniform": partial(diffusion, spacing="time_uniform"),
        "diffusion, logSNR": partial(diffusion, spacing="logSNR"),
    }
    for process, levels in processes.items():
        exact = solved("heun", levels(1000), noise)
        rows = []
        for name in EXACT_SOLVERS:
            errors = [distance(solved(name, levels(steps_for(name, count)), noise), exact) for count in EVALUATIONS]
            rows.append([name, *(f"{error:.3f}" for error in errors)])
        table([f"{process}: evaluations", *map(str, EVALUATIONS)], rows)


def steps_for(name: str, evaluations: int) -> int:
    """Heun's steps take two, the last of a flow one."""
    return (evaluations + 1) // 2 if name == "heun" else evaluations


# ---- the quickstart's model


def on_a_model(run_folder: Path, *, seeds: int) -> None:
    """Print a table of distances and grades."""
    from opensora.data.digits.clips import captions
    from opensora.data.digits.grader import Grader

    pipeline, grader, kinds = quickstart_pipeline(run_folder), Grader(), captions()
    starts = [
        pipeline.start([caption for _, _, caption in kinds], seed=pipeline.spec.seed + 1000 * each)
        for each in range(seeds)
    ]

    def sampled(**options: Any) -> Tensor:
        """The latents of all captions, by seed."""
        scheduler = build("schedulers", {"type": "rflow", **pipeline.spec.scheduler.options, **options})
        guided = scheduler.guide(pipeline.sampler.parts.denoiser)
        return torch.cat(
            [attrs.evolve(start, scheduler=scheduler, guided=guided, denoiser=guided).finish() for start in starts]
        )

    def read_right(latents: Tensor) -> Tensor:
        """Which samples show their caption's digit, and which its direction, [N, 2]."""
        readings = [grader.read(frames.numpy()) for frames in pipeline.decode(latents)]
        wanted = [kind[:2] for kind in kinds] * seeds
        return torch.tensor(
            [
                [reading.digit == digit, reading.direction == direction]
                for reading, (digit, direction) in zip(readings, wanted, strict=True)
            ]
        ).float()

    exact = sampled(solver="heun", num_sampling_steps=50, sampling_shift=2.0)
    peer = read_right(sampled(**PEER))[:, 0]
    rows = [["exact", "", "", "", "0", *shares(read_right(exact), peer)]]
    for options in MODEL_RUNS:
        found, steps = sampled(**options), options["num_sampling_steps"]
        is_same_path = options["solver"] not in NOISY_SOLVERS and "cfg_interval" not in options
        others = {name: value for name, value in options.items() if name not in ("solver", "num_sampling_steps")}
        rows.append(
            [
                options["solver"],
                ", ".join(f"{name} {value}" for name, value in others.items() if value != 1.0),
                str(steps),
                str(2 * steps - 1 if options["solver"] == "heun" else steps),
                f"{distance(found, exact):.3f}" if is_same_path else "",
                *shares(read_right(found), peer),
            ]
        )
        print(rows[-1], file=sys.stderr, flush=True)
    table(["solver", "options", "steps", "calls", "distance", "digits", "against euler 20", "directions"], rows)


def shares(right: Tensor, peer: Tensor) -> list[str]:
    """Of digits; by how much that is more than the peer's, with its standard error; of directions."""
    digits, directions = right.unbind(dim=1)
    more = digits - peer
    error = more.std().item() / len(more) ** 0.5
    return [f"{digits.mean():.1%}", f"{100 * more.mean():+.1f} ± {100 * error:.1f}", f"{directions.mean():.1%}"]


def quickstart_pipeline(run_folder: Path) -> SamplingPipeline:
    """The model that the quickstart has trained."""
    values = evaluate(run_folder / "samples" / "config.py").values
    values["model"]["from_pretrained"] = str((run_folder / "train").resolve())
    with TemporaryDirectory() as folder:
        config = Path(folder) / "config.py"
        write_config(config, values, "The quickstart's model.")
        return load(config)


def distance(found: Tensor, exact: Tensor) -> float:
    """Root mean square."""
    return (found - exact).square().mean().sqrt().item()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print in Markdown."""
    for line in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(line)} |")
    print(flush=True)


if __name__ == "__main__":
    main()
