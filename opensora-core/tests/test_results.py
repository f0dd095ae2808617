"""What becomes of a result whose writing fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora.core.errors import MachineError
from opensora.core.results import ResultWriter

FRAMES = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)


def writer(path: Path, *, watermark: bool = False) -> ResultWriter:
    return ResultWriter(path, fps=8, crf=18, recipe={"version": 1}, watermark=watermark)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_a_result_whose_recipe_can_not_be_written_leaves_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()  # in the recipe's way
    with pytest.raises(MachineError, match=r"a\.json can't be written"), writer(tmp_path / name) as result:
        result.append(FRAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_result_whose_marked_copy_can_not_be_opened_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a_watermark.mp4").mkdir()
    with pytest.raises(MachineError, match=r"a_watermark\.mp4"):
        writer(tmp_path / "a.mp4", watermark=True).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["a_watermark.mp4"]
