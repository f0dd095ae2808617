"""What sorting ten million rows into buckets costs, against a plain loop over the rows.

    python benchmarks/buckets.py

The buckets are those of Open-Sora 1.2's first stage. The loop is the documented rule (docs/data.md) written row by row in
plain Python, with Python's own random numbers, and then shuffles each bucket and deals it out in batches. It is run on 20,000
rows of the same table; CPU times are compared per row, in one process. Memory is the highest resident size while buckets are
assigned and batches made, above that of the table's columns. Seeking is what it takes to hand out the batch in the middle of
an epoch.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import psutil

from opensora.core.config.evaluate import evaluate
from opensora.core.config.names import resolve
from opensora.core.sizes import RESOLUTIONS, nominal_pixels
from opensora.data.buckets import Buckets, EpochBatches

NUM_ROWS, SAMPLE, SEED = 10_000_000, 20_000, 0


def plain_loop(
    rows: list[tuple[int, int, int]], config: Mapping[str, Any], seed: int
) -> dict[tuple[str, int, str], list[int]]:
    """{(resolution, frames, aspect key): rows}, one row after another."""
    draw = random.Random(seed).random
    ordered = [
        (name, sorted(config[name].items(), reverse=True)) for name in sorted(config, key=nominal_pixels, reverse=True)
    ]
    pixels = {name: 0.8 * nominal_pixels(name) for name in config}
    aspects = {name: [(float(key), key) for key in RESOLUTIONS[name]] for name in config}
    found: dict[tuple[str, int, str], list[int]] = {}

    def bucket_of(frames: int, height: int, width: int) -> tuple[str, int, str] | None:
        for name, lengths in ordered:
            if height * width < pixels[name]:
                continue
            for length, (probability, _) in lengths:
                if not (frames == 1 if length == 1 else frames > length):
                    continue
                accept, choose = probability if isinstance(probability, tuple) else (probability, 1)
                if choose < 1 and draw() > choose:
                    continue
                if accept >= 1 or draw() < accept:
                    ratio = height / width
                    return name, length, min(aspects[name], key=lambda pair: abs(pair[0] - ratio))[1]
                break
        return None

    for row, (frames, height, width) in enumerate(rows):
        bucket = bucket_of(frames, height, width)
        if bucket is not None:
            found.setdefault(bucket, []).append(row)
    return found


def plain_batches(
    found: dict[tuple[str, int, str], list[int]], config: Mapping[str, Any], seed: int
) -> list[list[int]]:
    """Batches in random order."""
    generator = random.Random(seed)
    batches = []
    for (name, length, _), rows in found.items():
        generator.shuffle(rows)
        size = config[name][length][1]
        batches += [rows[start : start + size] for start in range(0, len(rows), size)]
    generator.shuffle(batches)
    return batches


def measured(function: Callable[[], Any]) -> tuple[Any, float, int]:
    """What it returns, its CPU seconds, and how many bytes the process grew meanwhile at most."""
    process, highest, over = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.thread_time()
    result = function()
    seconds = time.thread_time() - begin
    over.set()
    watcher.join()
    return result, seconds, max(highest, process.memory_info().rss) - before


def main() -> None:
    """Build an epoch of ten million rows, and print ratios."""
    config = evaluate(resolve("opensora-v1-2/train/stage1")).values["bucket_config"]
    generator = np.random.default_rng(SEED)
    frames = np.where(generator.random(NUM_ROWS) < 0.3, 1, generator.integers(2, 480, NUM_ROWS))
    height, width = generator.integers(100, 2200, (2, NUM_ROWS))
    buckets = Buckets.from_config(config)
    sample = list(zip(*(column[:SAMPLE].tolist() for column in (frames, height, width)), strict=True))
    begin = time.thread_time()
    found = plain_loop(sample, config, SEED)
    loop = (time.thread_time() - begin) / SAMPLE
    plain_batches(found, config, SEED)
    loop_and_batches = (time.thread_time() - begin) / SAMPLE

    options = {"seed": SEED, "epoch": 0}
    assigned, seconds, grown = measured(lambda: buckets.assign(frames, height, width, frame_interval=1, **options))
    batches, more_seconds, grown_more = measured(lambda: EpochBatches(assigned, buckets.buckets, **options))
    both, rows = seconds + more_seconds, f"{NUM_ROWS:,} rows"
    share = sum(map(len, found.values())) / SAMPLE
    print(f"rows with a bucket: {batches.num_samples / NUM_ROWS:.3f} of all, {share:.3f} by the loop")
    print(f"buckets: loop / columns, per row: {loop * NUM_ROWS / seconds:.0f} times ({seconds:.2f} s for {rows})")
    print(
        f"buckets and batches: loop / columns: {loop_and_batches * NUM_ROWS / both:.0f} times ({both:.2f} s for {rows})"
    )
    highest = max(grown, assigned.nbytes + grown_more)
    print(f"memory above the table: {highest / NUM_ROWS:.1f} bytes a row at most")
    begin = time.perf_counter()
    list(batches[len(batches) // 2])
    print(f"seeking to the middle of the epoch: {(time.perf_counter() - begin) / both:.1e} of building it")


if __name__ == "__main__":
    main()
