"""Solvers: how far from the exact solution they end, by the number of times that the denoiser is asked.

    python benchmarks/solvers.py [RUN_FOLDER]

First on data whose best denoiser is known: a mixture of 5 normals in 8 dimensions, as a flow and as a diffusion process.
Then, if RUN_FOLDER is that of `opensora-run quickstart`, on its model: 40 captions with 6 seeds each, the distance of the
latents to those of 100 steps of Heun, and the grades. Distances are root mean squares, where the data's deviation from 0 is
about 1. The model takes about 12 minutes on an idle CPU.
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
SEEDS = 6
MODEL_RUNS = [  # solver, steps, sampling_shift
    *(("euler", steps, shift) for shift in (1.0, 2.0, 3.0) for steps in (6, 10, 20, 40)),
    *(("dpm++2m", steps, shift) for shift in (1.0, 2.0) for steps in (6, 10, 20)),
    *(("dpm++3m", steps, 1.0) for steps in (10, 20)),
    *(("unipc", steps, shift) for shift in (1.0, 2.0, 3.0) for steps in (6, 10, 20)),
    *(("heun", steps, shift) for shift in (1.0, 2.0) for steps in (3, 5, 10)),
    *((name, steps, 1.0) for name in sorted(NOISY_SOLVERS) for steps in (10, 20, 40)),
]


def main() -> None:
    on_a_mixture()
    if len(sys.argv) > 1:
        on_a_model(Path(sys.argv[1]))


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


def on_a_model(run_folder: Path) -> None:
    """Print a table of distances and grades."""
    from opensora.data.digits.clips import captions
    from opensora.data.digits.grader import Grader

    pipeline, grader = quickstart_pipeline(run_folder), Grader()
    kinds = captions()
    seeds = [pipeline.spec.seed + 1000 * each for each in range(SEEDS)]

    def sampled(**options: Any) -> list[Tensor]:
        """The latents of all captions, by seed."""
        scheduler = build("schedulers", {"type": "rflow", **pipeline.spec.scheduler.options, **options})
        starts = (pipeline.start([caption for _, _, caption in kinds], seed=seed) for seed in seeds)
        return [attrs.evolve(start, scheduler=scheduler).finish() for start in starts]

    def graded(latents: Iterable[Tensor]) -> tuple[float, float]:
        """Shares of digits and directions."""
        videos = [frames.numpy() for each in latents for frames in pipeline.decode(each)]
        readings = [grader.read(frames) for frames in videos]
        wanted = list(kinds) * SEEDS
        digits = sum(reading.digit == kind[0] for reading, kind in zip(readings, wanted, strict=True))
        directions = sum(reading.direction == kind[1] for reading, kind in zip(readings, wanted, strict=True))
        return digits / len(wanted), directions / len(wanted)

    exact = sampled(solver="heun", num_sampling_steps=100)
    rows = [["exact", "", "", "", "0", *(f"{share:.1%}" for share in graded(exact))]]
    for name, steps, shift in MODEL_RUNS:
        found = sampled(solver=name, num_sampling_steps=steps, sampling_shift=shift)
        far = "" if name in NOISY_SOLVERS else f"{distance(torch.cat(found), torch.cat(exact)):.3f}"
        evaluations = 2 * steps - 1 if name == "heun" else steps
        grades = (f"{share:.1%}" for share in graded(found))
        rows.append([name, f"{shift:g}", str(steps), str(evaluations), far, *grades])
        print(rows[-1], file=sys.stderr, flush=True)
    table(["solver", "sampling_shift", "steps", "evaluations", "distance", "digit", "direction"], rows)


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
