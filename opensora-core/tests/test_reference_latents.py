"""Which frames of a reference become latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora.core.errors import ShapeError
from opensora.core.reference_latents import Overlap, ReferenceLatents
from opensora.core.requests import GivenFrames, Request
from opensora.core.video import write_video

CPU = torch.device("cpu")


class Chunks:
    """An autoencoder of 17 frames to 5 latents, as published: each latent is the last frame that it stands for."""

    latent_channels = 3
    latent_chunk: int | None = 5

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        whole, rest = divmod(size[0], 17)
        return 5 * whole + -(-rest // 4), *size[1:]

    def encode(self, video: Tensor, *, draws: object = None) -> Tensor:
        return torch.cat([chunk.flip(2)[:, :, ::4].flip(2) for chunk in video.split(17, dim=2)], dim=2)

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        raise AssertionError("nothing is decoded")


class Fours(Chunks):
    """An autoencoder of whole fours."""

    latent_chunk = None

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        if size[0] % 4:
            raise ShapeError("no four")
        return size[0] // 4, *size[1:]

    def encode(self, video: Tensor, *, draws: object = None) -> Tensor:
        return video[:, :, ::4]


def clip(path: Path, num_frames: int) -> str:
    """Each frame as bright as its number."""
    numbers = torch.arange(num_frames, dtype=torch.uint8)
    write_video(path, numbers[:, None, None, None].expand(num_frames, 16, 16, 3), 8, crf=0)
    return str(path)


def load(vae: Chunks, num_frames: int, **given: str) -> ReferenceLatents:
    request = Request(
        prompt="a",
        text="a",
        path=Path("a.mp4"),
        seed=0,
        size=(num_frames, 16, 16),
        fps=8,
        file_fps=8,
        frame_fps=8,
        given=GivenFrames(**given),
    )
    return ReferenceLatents.load(request, vae, CPU, Overlap())


def numbers_of(latents: Tensor) -> list[int]:
    return [round(value) for value in ((latents[0, :, 0, 0] + 1) * 127.5).tolist()]


@pytest.mark.parametrize(("clip_frames", "num_frames"), [(51, 51), (20, 51), (60, 51), (40, 24)])
def test_extending_goes_on_from_the_last_frame_whatever_the_lengths(
    clip_frames: int, num_frames: int, tmp_path: Path
) -> None:
    loaded = load(Chunks(), num_frames, extend=clip(tmp_path / "clip.mp4", clip_frames))
    (latents,) = loaded.latents
    last = clip_frames - 1
    assert latents.shape[1] == 5
    assert numbers_of(latents) == pytest.approx([last - 16, last - 12, last - 8, last - 4, last], abs=1)


def test_frames_far_from_the_end_are_found(tmp_path: Path) -> None:
    path = clip(tmp_path / "clip.mp4", 102)
    loaded = load(Chunks(), 51, reference_path=path, mask_strategy="0,0,-20,0,5")
    assert numbers_of(loaded.latents[0])[0] == pytest.approx(102 - 4 * 17, abs=1)


def test_a_clip_that_is_no_whole_number_of_fours_loses_its_first_frames_where_it_is_used_from_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = clip(tmp_path / "clip.mp4", 10)
    caplog.set_level("INFO", "opensora")
    assert numbers_of(load(Fours(), 16, extend=path).latents[0]) == pytest.approx([2, 6], abs=1)
    assert "the last 8 of its 10 frames" in caplog.text
    assert numbers_of(load(Fours(), 16, edit=path).latents[0]) == pytest.approx([0, 4], abs=1)
    assert "the first 8 of its 10 frames" in caplog.text


def test_a_clip_that_the_autoencoder_can_not_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=r"clip\.mp4: the autoencoder can't encode 3 frames of 16 x 16"):
        load(Fours(), 16, edit=clip(tmp_path / "clip.mp4", 3))


def test_a_reference_that_is_not_used_is_not_held(tmp_path: Path) -> None:
    paths = [clip(tmp_path / name, 40) for name in ("a.mp4", "b.mp4")]
    loaded = load(Chunks(), 51, reference_path=";".join(paths), mask_strategy="0,1")
    assert [latents.shape[1] for latents in loaded.latents] == [1, 12]
