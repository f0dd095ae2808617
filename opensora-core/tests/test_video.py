"""Video and image files: what is written comes back, only what is needed is read, and bad files are named."""

import resource
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from opensora.core import DataError, MachineError, ShapeError
from opensora.core import video as video_module
from opensora.core.video import (
    VideoFile,
    is_image,
    is_video,
    load_image,
    probe_video,
    read_image,
    read_video,
    to_uint8,
    write_image,
    write_video,
)

NUM_FRAMES = 51


def numbered_frames(num_frames: int = NUM_FRAMES, height: int = 32, width: int = 48) -> torch.Tensor:
    """Frames whose index can be read back from their brightness: frame i is gray of level 4 * i + 20."""
    levels = torch.arange(num_frames, dtype=torch.uint8) * 4 + 20
    return levels[:, None, None, None].expand(-1, height, width, 3).contiguous()


def indices_in(frames: torch.Tensor) -> list[int]:
    """The inverse of `numbered_frames`."""
    return [round((level - 20) / 4) for level in frames.float().mean(dim=(1, 2, 3)).tolist()]


def encode(path: Path, *, container_format: str, codec: str = "libx264", **options: str) -> Path:
    """A 51-frame file in any format, key frames every 12 frames, not written by the code under test."""
    flags = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    with av.open(str(path), "w", format=container_format, options=flags) as container:
        stream = container.add_stream(codec, rate=Fraction(24000, 1001), options={"g": "12", **options})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for frame in numbered_frames().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        "mp4": encode(folder / "clip.mp4", container_format="mp4", movflags="+faststart"),
        "mp4, index last": encode(folder / "last.mp4", container_format="mp4"),
        "mp4, fragmented": encode(
            folder / "fragmented.mp4", container_format="mp4", movflags="frag_keyframe+empty_moov"
        ),
        "mp4, fragmented later": encode(folder / "later.mp4", container_format="mp4", movflags="frag_keyframe"),
        "mov": encode(folder / "clip.mov", container_format="mov"),
        "mkv": encode(folder / "clip.mkv", container_format="matroska"),
        "avi, MPEG-4": encode(folder / "clip.avi", container_format="avi", codec="mpeg4", qmax="2", b="4M"),
        "avi, H.264": encode(folder / "reordered.avi", container_format="avi"),
        "open groups": encode(
            folder / "open.mp4", container_format="mp4", **{"x264-params": "open-gop=1:bframes=3:scenecut=0"}
        ),
    }


KINDS = [
    "mp4",
    "mp4, index last",
    "mp4, fragmented",
    "mp4, fragmented later",
    "mov",
    "mkv",
    "avi, MPEG-4",
    "avi, H.264",
    "open groups",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_probed_exactly(videos, kind):
    info = probe_video(videos[kind])
    assert (info.num_frames, info.height, info.width) == (NUM_FRAMES, 32, 48)
    assert info.fps == pytest.approx(24000 / 1001, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [[0], [50], [7, 8, 9], [30, 33, 36, 40], [12], [11, 12], [49, 3, 3, 20]], ids=str)
def test_frames_are_found_by_index(videos, kind, wanted):
    frames, _ = read_video(videos[kind], wanted)
    assert indices_in(frames) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_all_frames_are_read_without_indices(videos, kind):
    frames, _ = read_video(videos[kind])
    assert frames.dtype == torch.uint8
    assert frames.shape == (NUM_FRAMES, 32, 48, 3)
    assert indices_in(frames) == list(range(NUM_FRAMES))


def test_frames_that_an_edit_list_hides_do_not_count(videos, tmp_path):
    """As left by cutting a file without decoding it: the packets from the key frame on are there, but hidden."""
    with av.open(str(videos["mp4"])) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        offset = int(20 * 1001 / 24000 / stream.time_base)
        source.seek(offset, stream=stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, copy
                target.mux(packet)
    num_frames = probe_video(tmp_path / "cut.mp4").num_frames
    assert num_frames == 31
    assert indices_in(read_video(tmp_path / "cut.mp4")[0]) == list(range(20, 51))
    assert indices_in(read_video(tmp_path / "cut.mp4", [3, 30])[0]) == [23, 50]


def test_an_open_file_reads_many_times(videos):
    with VideoFile(videos["mp4"]) as file:
        assert [indices_in(file.read(wanted)) for wanted in ([40], [2], [13, 14])] == [[40], [2], [13, 14]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_file_reads_later_frames_after_the_first(videos, kind):
    with VideoFile(videos[kind]) as file:
        assert [indices_in(file.read(wanted)) for wanted in ([0], [3, 4], [50])] == [[0], [3, 4], [50]]


def test_frames_are_handed_on_without_being_held(videos):
    with VideoFile(videos["mp4"]) as file:
        shapes = file.map(lambda picture: (picture.shape, int(picture.mean())), [40, 2, 40])
    assert shapes == [((32, 48, 3), pytest.approx(4 * index + 20, abs=1)) for index in (40, 2, 40)]


@pytest.mark.parametrize("kind", KINDS)
def test_times_are_those_of_the_frames(videos, kind):
    with VideoFile(videos[kind]) as file:
        file.read([0])
        times = file.times()
    assert times == pytest.approx([index * 1001 / 24000 for index in range(NUM_FRAMES)], abs=0.0015, rel=0.01)


def test_times_of_a_file_without_an_even_rate(tmp_path):
    stamps = [0, 40, 80, 200, 240, 1000]  # milliseconds
    with av.open(str(tmp_path / "uneven.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for stamp, picture in zip(stamps, numbered_frames(6).numpy(), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with VideoFile(tmp_path / "uneven.mkv") as file:
        assert file.times() == pytest.approx([stamp / 1000 for stamp in stamps])


def cornered(path: Path, *, display_matrix: tuple[int, int, int, int] | None = None, pixel_width: int = 1) -> Path:
    """A gray 32 x 48 video whose top left corner is white, with a matrix (a, b, c, d) in its header if given."""
    frames = torch.full((4, 32, 48, 3), 60, dtype=torch.uint8)
    frames[:, :10, :10] = 250
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_width)
        for picture in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    if (
        display_matrix is not None
    ):  # ISO 14496-12: of the track header, a b u c d v x y w, where x' = a x + c y, y' = b x + d y
        data = bytearray(path.read_bytes())
        start = data.index(b"tkhd") + 4 + 40
        assert struct.unpack_from(">9i", data, start) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
        a, b, c, d = (value << 16 for value in display_matrix)
        struct.pack_into(">9i", data, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("matrix", "size", "corner", "way"),
    [
        ((0, 1, -1, 0), (48, 32), (0, -1), "90 degrees to the right"),  # as phones write it that are held upright
        ((-1, 0, 0, -1), (32, 48), (-1, -1), "180 degrees"),
        ((0, -1, 1, 0), (48, 32), (-1, 0), "90 degrees to the left"),
    ],
    ids=["right", "half", "left"],
)
def test_frames_are_turned_as_shown(tmp_path, matrix, size, corner, way):
    path = cornered(tmp_path / "turned.mp4", display_matrix=matrix)
    with VideoFile(path, as_shown=True) as file:
        frames = file.read([0, 3])
        assert (file.info.height, file.info.width) == size
        assert file.remarks == [f"turned by {way}, as it asks players to"]
    assert frames.shape == (2, *size, 3)
    corners = {(row, column): int(frames[1, row, column, 0]) for row in (0, -1) for column in (0, -1)}
    assert max(corners, key=corners.__getitem__) == corner
    assert sorted(corners.values())[-2] < 100
    with VideoFile(path) as file:
        assert file.read([0]).shape == (1, 32, 48, 3)
        assert file.read([0])[0, 0, 0, 0] > 200
        assert file.remarks == []


def test_pixels_that_are_not_square_are_stretched_as_shown(tmp_path):
    path = cornered(tmp_path / "wide.mp4", pixel_width=2)
    with VideoFile(path, as_shown=True) as file:
        frames = file.read([0])
        assert (file.info.height, file.info.width) == (32, 96)
        assert file.remarks == ["stretched from 32 x 48, since its pixels aren't square"]
    assert frames[0, 5, :, 0].gt(150).sum() == pytest.approx(20, abs=2)
    assert read_video(path)[0].shape == (4, 32, 48, 3)


def test_ordinary_files_are_the_same_as_shown(videos):
    with VideoFile(videos["mp4"], as_shown=True) as file:
        assert torch.equal(file.read([0, 30]), read_video(videos["mp4"], [0, 30])[0])
        assert file.remarks == []


def test_only_the_frames_from_the_nearest_key_frame_are_decoded(videos, tmp_path):
    data = videos["mp4"].read_bytes()
    with av.open(str(videos["mp4"])) as container:
        early = next(packet for packet in container.demux(video=0) if not packet.is_keyframe)
        start, size = early.pos, early.size
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data[:start] + bytes(size) + data[start + size :])
    assert indices_in(read_video(damaged, [30, 31])[0]) == [30, 31]  # fails if it decodes what it doesn't need
    with pytest.raises(DataError, match="damaged"):
        read_video(damaged, range(8))


def test_written_frames_come_back(tmp_path):
    frames = torch.zeros(8, 32, 48, 3, dtype=torch.uint8)
    frames[..., 0], frames[..., 1] = 200, torch.arange(48).mul(5).to(torch.uint8)
    write_video(tmp_path / "new" / "clip.mp4", frames, 23.976, crf=4, metadata={"comment": '{"prompt": "Grüße 波"}'})
    back, fps = read_video(tmp_path / "new" / "clip.mp4")
    assert fps == pytest.approx(23.976)
    assert (
        back.float() - frames.float()
    ).abs().mean() < 3  # the colours are those written: matrix and range are tagged
    assert probe_video(tmp_path / "new" / "clip.mp4").metadata["comment"] == '{"prompt": "Grüße 波"}'
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_written_video_plays_in_a_browser(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered_frames(8), 8)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.profile, codec.pix_fmt) == ("h264", "High", "yuv420p")
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(16, 16), (288, 512)])
def test_same_frames_give_the_same_bytes(tmp_path, height, width):
    frames = torch.randint(0, 256, (9, height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, 24)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_lossless_gray_is_exact_up_to_rounding(tmp_path):
    frames = torch.randint(0, 256, (4, 16, 16, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_video(tmp_path / "gray.mp4", frames.expand(-1, -1, -1, 3), 8, crf=0)
    assert (read_video(tmp_path / "gray.mp4")[0].int() - frames.int()).abs().max() <= 2


def test_odd_sizes_are_extended_by_their_edge(tmp_path):
    frames = torch.full((3, 15, 17, 3), 40, dtype=torch.uint8)
    frames[:, -1] = 200
    write_video(tmp_path / "odd.mp4", frames, 8, crf=1)
    back, _ = read_video(tmp_path / "odd.mp4")
    assert back.shape == (3, 16, 18, 3)
    assert back[:, 14:].float().mean() == pytest.approx(200, abs=6)


@pytest.mark.parametrize(
    "frames",
    [torch.zeros(4, 8, 8, 3), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(0, 8, 8, 3, dtype=torch.uint8)],
    ids=["float", "channels first", "no frames"],
)
def test_frames_of_another_shape_or_type_are_refused(tmp_path, frames):
    with pytest.raises(ShapeError, match=r"uint8 \[T, H, W, 3\]; got"):
        write_video(tmp_path / "clip.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


def test_to_uint8_clamps_and_rounds():
    video = torch.tensor([-5.0, -1.0, -0.999, 0.0, 0.5, 1.0, 7.0]).reshape(1, 7, 1, 1).expand(3, -1, -1, -1)
    assert to_uint8(video)[:, 0, 0, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]
    assert to_uint8(torch.zeros(3, 2, 4, 5)).shape == (2, 4, 5, 3)


def test_images_round_trip_with_their_text(tmp_path):
    frame = numbered_frames(1)[0]
    write_image(tmp_path / "a.png", frame, metadata={"prompt": "波"})
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), frame.numpy())
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"prompt": "波"}


def test_images_of_other_modes_become_rgb(tmp_path):
    Image.new("RGBA", (5, 4), (255, 0, 0, 10)).save(tmp_path / "a.png")
    Image.new("L", (5, 4), 7).save(tmp_path / "b.webp")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
    assert read_image(tmp_path / "b.webp").mode == "RGB"


@pytest.mark.parametrize(
    ("name", "image", "video"),
    [
        ("a.mp4", False, True),
        ("b.MOV", False, True),
        ("c.jpeg", True, False),
        ("e.gif", False, False),
        ("f", False, False),
        ("g.tar.mp4", False, True),
        ("h.JPG", True, False),
        ("i.webm", False, False),
        ("k.mkv", False, True),
        ("l.tiff", True, False),
    ],
)
def test_kinds_are_told_by_extension(name, image, video):
    assert (is_image(name), is_video(name)) == (image, video)


# Bad files


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.3, 0.5, 0.75, 0.9, 0.98, 0.999])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_refused_or_read_right_but_never_garbled(videos, kind, share, tmp_path):
    data = videos[kind].read_bytes()
    cut = tmp_path / f"cut{videos[kind].suffix}"
    cut.write_bytes(data[: int(len(data) * share)])
    try:
        frames, _ = read_video(cut)
    except DataError:
        return
    # a cut between fragments, or in an index that isn't needed
    assert indices_in(frames) == list(range(len(frames)))
    assert len(frames) == NUM_FRAMES or kind.startswith("mp4, fragmented")


def test_a_truncated_video_says_where_it_stops(videos, tmp_path):
    cut = tmp_path / "clip_0031.mp4"
    data = videos["mp4"].read_bytes()
    cut.write_bytes(data[: len(data) * 3 // 4])
    for attempt in (probe_video, read_video):
        with pytest.raises(DataError, match=r"clip_0031\.mp4: stops at frame \d+ of 51 \(truncated file\)\."):
            attempt(cut)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("text.mp4", b"path,text\na.mp4,a wave\n" * 50, "text.mp4 can't be read as a video .it holds text"),
        ("subtitles.mp4", b"1\n00:00:01,000 --> 00:00:02,000\nhello\n\n", "no video frames .*subtitle"),
        ("empty.mp4", b"", "the file is empty"),
        ("zeros.mp4", bytes(5000), "no known format"),
        ("half.mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "truncated or damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("mp4") else "",
)
def test_files_that_are_no_video_are_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_video(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("fragmented", [False, True], ids=["plain", "fragmented"])
def test_a_video_without_frames_is_refused(tmp_path, fragmented):
    flags = {"movflags": "frag_keyframe+empty_moov"} if fragmented else {}
    with av.open(str(tmp_path / "none.mp4"), "w", format="mp4", options=flags) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    with pytest.raises(DataError, match=r"none\.mp4 has no video frames"):
        probe_video(tmp_path / "none.mp4")


def test_a_sound_file_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match=r"has no video frames .*audio"):
        read_video(tmp_path / "sound.mp4")


def test_the_cover_of_a_sound_file_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.height = cover.width = 16
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
    with pytest.raises(DataError, match=r"song\.m4a has no video frames"):
        read_video(tmp_path / "song.m4a")


def test_images_are_loaded_as_they_are(tmp_path):
    Image.new("RGBA", (5, 4), (255, 0, 0, 10)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0, 10)
    with pytest.raises(DataError, match=r"gone\.png is missing"):
        load_image(tmp_path / "gone.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_an_image_named_as_a_video_is_refused(tmp_path, kind):
    Image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "image.mp4", format=kind)
    with pytest.raises(DataError, match=r"image\.mp4 is an image \(\w+\), not a video"):
        probe_video(tmp_path / "image.mp4")


def test_a_video_named_as_an_image_is_refused(videos, tmp_path):
    (tmp_path / "video.png").write_bytes(videos["mp4"].read_bytes())
    with pytest.raises(DataError, match=r"video\.png is not an image but a video of 51 frames"):
        read_image(tmp_path / "video.png")


@pytest.mark.parametrize("read", [read_video, probe_video, read_image])
def test_missing_files_and_folders_are_named(tmp_path, read):
    with pytest.raises(DataError, match=r"gone\.mp4 is missing"):
        read(tmp_path / "gone.mp4")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)


def test_broken_images_are_refused(tmp_path):
    write_image(tmp_path / "a.png", torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"cut\.png can't be read as an image"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(DataError, match=r"text\.png is not an image that Pillow can read"):
        read_image(tmp_path / "text.png")


def test_frames_out_of_range_are_refused(videos):
    for wanted in ([51], [-1], []):
        with pytest.raises(DataError, match=r"clip\.mp4"):
            read_video(videos["mp4"], wanted)


def test_a_name_that_looks_like_a_protocol_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("http:a.mp4", numbered_frames(2), 8)
    assert probe_video("http:a.mp4").num_frames == 2


def test_a_folder_that_can_not_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match=r"clip\.mp4 can't be written: "):
        write_video(tmp_path / "file" / "clip.mp4", numbered_frames(2), 8)
    with pytest.raises(MachineError, match=r"a\.png can't be written: "):
        write_image(tmp_path / "file" / "a.png", numbered_frames(1)[0])


FULL_DISK = """
import resource, sys, torch
from opensora.core.errors import MachineError
from opensora.core.video import write_video
frames = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writing beyond fails, as on a full disk
try:
    write_video(sys.argv[1], frames, 8)
except MachineError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered_frames(3), 8)
    result = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=False)
    assert "clip.mp4 can't be written" in result.stdout, result
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert probe_video(path).num_frames == 3


def test_no_file_stays_open_and_nothing_reaches_stderr(videos, tmp_path, capfd):
    open_files = Path("/proc/self/fd")
    (tmp_path / "cut.mkv").write_bytes(videos["mkv"].read_bytes()[:2000])
    (tmp_path / "cut.mp4").write_bytes(videos["mp4"].read_bytes()[:2000])
    (tmp_path / "text.mp4").write_text("hello")
    before = len(list(open_files.iterdir()))
    for _ in range(3):
        read_video(videos["mkv"], [30])
        for name in ("cut.mkv", "cut.mp4", "text.mp4", "gone.mp4"):
            with pytest.raises(DataError):
                read_video(tmp_path / name)
    assert len(list(open_files.iterdir())) == before
    assert capfd.readouterr().err == ""


def test_reading_many_files_keeps_memory(videos):
    for _ in range(20):
        read_video(videos["mp4"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        read_video(videos["mp4"], [20, 30])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_everything_public_is_listed():
    public = {
        name
        for name, value in vars(video_module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == video_module.__name__
    }
    written = {"Sink", "VideoWriter", "open_sink", "to_uint8", "write_image", "write_video"}  # by video_writing
    assert public | written | {"IMAGE_EXTENSIONS", "VIDEO_EXTENSIONS"} == set(video_module.__all__)
