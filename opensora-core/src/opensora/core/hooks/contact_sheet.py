"""``contact-sheet.png``: all samples of a run at a glance, prompts as rows and frames as columns."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from attrs import field, frozen
from attrs.validators import gt

from opensora.core.contact_sheet import write_contact_sheet
from opensora.core.errors import DataError
from opensora.core.frame_sources import open_frames
from opensora.core.hookspecs import hook

if TYPE_CHECKING:
    from pathlib import Path

    from opensora.core.pipelines.sample_loop import SampleRun

__all__ = ["ContactSheet", "ContactSheetSpec"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class ContactSheetSpec:
    """One picture of all samples."""

    max_rows: int = field(default=100, validator=gt(0))
    """Samples shown at most."""
    max_frames: int = field(default=8, validator=gt(0))
    """Frames shown of each, evenly spaced."""


class ContactSheet:
    """Reads the files back, those of other processes and earlier runs too, so it shows what is really on the disk."""

    Spec = ContactSheetSpec

    def __init__(self, spec: ContactSheetSpec) -> None:
        self.spec = spec

    @hook
    def sample_end(self, run: SampleRun) -> None:
        """Write the sheet of what is there."""
        if not run.accelerator.is_main:
            return
        rows = []
        for request in run.requests[: self.spec.max_rows]:
            if request.path.exists():
                try:
                    rows.append((request.prompt, self.frames(request.path)))
                except DataError as error:  # of an earlier run, say: the others are shown all the same
                    log.warning("Not on the contact sheet: %s", error)
        if rows:
            path = run.folder / "contact-sheet.png"
            write_contact_sheet(path, rows)
            log.info("Contact sheet %s", path)

    def frames(self, path: Path) -> torch.Tensor:
        """[T, H, W, 3] uint8 of any kind of result, at most ``max_frames``."""
        with open_frames(path) as source:
            shown = min(source.info.num_frames, self.spec.max_frames)
            return source.read(torch.linspace(0, source.info.num_frames - 1, shown).round().int().tolist())
