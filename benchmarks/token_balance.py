"""How evenly the work of a step is dealt out to processes, with and without ``balance = "tokens"``.

    python benchmarks/token_balance.py

On 60,000 random rows (sizes and lengths as they occur among clips) and the buckets of Open-Sora 1.2's first stage. For each
step of an epoch, the latent tokens of the process that has most are divided by the mean over processes: the others wait that
long. Printed are the worst step, and the sum over steps: how much longer the epoch takes than with equal work. Tokens are
what the autoencoder makes of a bucket's size (8 x 8 pixels to 1, 17 frames to 5), in patches of 1 x 2 x 2. Each row
is in one batch, or listed as waiting for the next epoch, or has no bucket, for one of the reasons that are counted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from attrs import frozen

from opensora.core.config.evaluate import evaluate
from opensora.core.config.names import resolve
from opensora.core.config.structure import structure
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Size
from opensora.core.tokens import count_tokens
from opensora.data.balancing import balanced_batches
from opensora.data.bucket_odds import NO_BUCKET, Fate
from opensora.data.buckets import Buckets, EpochBatches

NUM_ROWS, SEED, EPOCHS = 60_000, 42, 3


def random_rows() -> tuple[npt.NDArray[np.int64], ...]:
    """Frames, height and width of rows: three in ten are images, videos have 1 to 20 seconds, most of both are landscape."""
    generator = np.random.default_rng(SEED)
    frames = np.where(generator.random(NUM_ROWS) < 0.3, 1, generator.integers(24, 480, NUM_ROWS))
    short = generator.choice([240, 360, 480, 720, 1080, 2160], NUM_ROWS, p=[0.05, 0.15, 0.2, 0.35, 0.2, 0.05])
    ratios, shares = (
        [9 / 16, 3 / 4, 2 / 3, 1, 0.43, 16 / 9, 4 / 3, 3 / 2],
        [0.5, 0.15, 0.06, 0.06, 0.03, 0.1, 0.05, 0.05],
    )
    ratio = generator.choice(ratios, NUM_ROWS, p=shares)  # height / width
    height = np.where(ratio < 1, short, short * ratio).astype(np.int64)
    width = np.where(ratio < 1, short / ratio, short).astype(np.int64)
    return frames, height, width


@frozen
class Evenness:
    """Of one epoch on some processes."""

    steps: int
    worst: float
    """Most tokens over the mean, in the worst step."""
    longer: float
    """Sum over steps of the most, over that of the means."""

    @classmethod
    def of(cls, batches: EpochBatches, tokens: Callable[[Size], float], num_processes: int) -> Evenness:
        """Measure it; batches that don't fill the last step are left aside."""
        whole = len(batches) // num_processes * num_processes
        costs = np.array([len(batch) * tokens(batch[0].size) for batch in map(batches.__getitem__, range(whole))])
        steps = costs.reshape(-1, num_processes)
        return cls(len(steps), (steps.max(1) / steps.mean(1)).max(), steps.max(1).sum() / steps.mean(1).sum())


def main() -> None:
    """Compare the orders on 8 and 64 processes."""
    spec = structure(TrainSpec, evaluate(resolve("opensora-v1-2/train/stage1")).values)
    tokens, buckets, rows = count_tokens(spec), Buckets.from_config(spec.bucket_config or {}), random_rows()
    for num_processes in (8, 64):
        for epoch in range(EPOCHS):
            assigned, fates = buckets.explain(*rows, frame_interval=1, seed=SEED, epoch=epoch)
            options = {"seed": SEED, "epoch": epoch}
            plain = EpochBatches(assigned, buckets.buckets, **options)
            even = balanced_batches(assigned, buckets.buckets, cost=tokens, num_processes=num_processes, **options)
            used = np.concatenate([even.rows_before(len(even)), even.left_out])
            if sorted(used) != np.flatnonzero(assigned != NO_BUCKET).tolist():
                raise SystemExit("A row is neither used once nor listed.")
            counts = zip(Fate, np.bincount(fates, minlength=len(Fate)).tolist(), strict=True)
            print(f"epoch {epoch}: " + ", ".join(f"{count} rows {fate.name}" for fate, count in counts if count))
            for name, batches in (("unbalanced", plain), ("balanced", even)):
                one = Evenness.of(batches, tokens, num_processes)
                waiting = f"; {len(even.left_out)} of {len(used)} rows wait" if batches is even else ""
                print(
                    f"{num_processes:2} processes, epoch {epoch}, {name:10}: slowest / mean tokens of a step "
                    f"{one.worst:.3f} at most, {one.longer:.3f} over the epoch, in {one.steps} steps{waiting}"
                )


if __name__ == "__main__":
    main()
