"""``metrics.jsonl``: one line each time the loop logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import frozen

from opensora.core.hookspecs import hook
from opensora.core.run_folder import append_jsonl, read_jsonl, write_atomically

if TYPE_CHECKING:
    from opensora.core.pipelines.loop import LoopRun

__all__ = ["JsonLines", "JsonLinesSpec"]


@frozen(kw_only=True)
class JsonLinesSpec:
    """Log to ``metrics.jsonl`` in the run folder."""


class JsonLines:
    """Appends; a resumed run first drops the lines that it will write again."""

    Spec = JsonLinesSpec

    def __init__(self, spec: JsonLinesSpec) -> None:
        self.spec = spec

    @hook
    def train_start(self, run: LoopRun) -> None:
        """Drop lines of steps after the checkpoint."""
        path = run.folder / "metrics.jsonl"
        if run.accelerator.is_main and path.exists():
            kept = [record for record in read_jsonl(path) if int(str(record["step"])) <= run.counters.step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))

    @hook
    def log(self, run: LoopRun, record: Mapping[str, float]) -> None:
        """Append the record."""
        if run.accelerator.is_main:
            append_jsonl(run.folder / "metrics.jsonl", record)
