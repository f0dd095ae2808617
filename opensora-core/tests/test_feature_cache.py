"""A folder of computed tensors: whole or not there, never stale, within its size, shared."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
import torch
from torch import nn

from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import DataError, MachineError
from opensora.core.feature_cache import FeatureCache, hash_tensor
from opensora.core.feature_keys import IdentityRecords, Sources, digest, identify, latents_name, text_name
from opensora.core.protocols import ClipRecipe, SourceFacts
from opensora.core.video import write_image, write_video

NAME = digest("an entry")


def entry(number: int = 0) -> dict[str, torch.Tensor]:
    return {
        "mean": torch.full((4, 2, 3), float(number)),
        "mask": torch.tensor([True, False]),
        "scale": torch.tensor(2.0),
    }


def assert_same(found: dict[str, torch.Tensor] | None, expected: dict[str, torch.Tensor]) -> None:
    assert found is not None
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype is tensor.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_put_is_found_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    cache, tensors = FeatureCache(tmp_path), {**entry(), "latents": torch.randn(3, 2).to(dtype)}
    assert cache.get("latents", NAME) is None
    cache.put("latents", NAME, tensors, about="clip.mp4")
    assert_same(cache.get("latents", NAME), tensors)
    assert cache.get("texts", NAME) is None
    assert cache.usage().entries == {"latents": 1}


def test_part_of_a_larger_tensor_is_kept_alone(tmp_path: Path) -> None:
    cache, whole = FeatureCache(tmp_path), torch.randn(1000, 4)
    cache.put("latents", NAME, {"row": whole[7], "column": whole[:, 1]})
    assert_same(cache.get("latents", NAME), {"row": whole[7], "column": whole[:, 1]})
    assert cache.usage().size < 8000


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_with_text(path: Path) -> None:
    path.write_text("no tensors " * 10)


def drop_checksum(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


@pytest.mark.parametrize("harm", [damage_bit, cut_short, empty, fill_with_text, drop_checksum])
def test_a_damaged_entry_is_said_counted_and_made_again(harm, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("latents", NAME, entry())
    harm(cache.path("latents", NAME))
    with caplog.at_level(logging.WARNING, logger="opensora"):
        assert cache.get("latents", NAME) is None
    assert cache.damaged == 1
    assert "is damaged" in caplog.text
    cache.put("latents", NAME, entry())
    assert_same(cache.get("latents", NAME), entry())
    assert cache.damaged == 1


def test_what_was_unused_for_longest_goes_first(tmp_path: Path) -> None:
    names = [digest(number) for number in range(6)]
    FeatureCache(tmp_path).put("latents", names[0], entry())
    size = FeatureCache(tmp_path).usage().size
    cache = FeatureCache(tmp_path, max_bytes=5 * size)
    for age, name in enumerate(names[1:5]):
        cache.put("texts" if age % 2 else "latents", name, entry())
    now = time.time()
    for age, name in enumerate(names[:5]):
        for kind in ("latents", "texts"):
            if (path := cache.path(kind, name)).exists():
                os.utime(path, (now - 10_000 + age,) * 2)
    assert cache.get("latents", names[0]) is not None  # used just now
    assert cache.evicted == 0
    cache.put("latents", names[5], entry())
    assert cache.evicted == 2  # down to nine tenths
    assert cache.usage().size <= 5 * size
    assert cache.get("latents", names[0]) is not None
    assert cache.get("latents", names[1]) is None
    assert cache.get("texts", names[2]) is None
    assert cache.get("latents", names[5]) is not None


def test_the_limit_holds_whoever_wrote_before(tmp_path: Path) -> None:
    unlimited = FeatureCache(tmp_path)
    for number in range(8):
        unlimited.put("latents", digest(number), entry())
    size = unlimited.usage().size // 8
    (tmp_path / ".size").write_text("")  # as a kill may leave it
    FeatureCache(tmp_path, max_bytes=4 * size).put("latents", digest("new"), entry())
    assert unlimited.usage().size <= 4 * size


FILLER = """
import sys, torch
from pathlib import Path
from opensora.core.feature_cache import FeatureCache
from opensora.core.feature_keys import digest
cache = FeatureCache(Path(sys.argv[1]), max_bytes=int(sys.argv[2]) or None)
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    cache.put("latents", digest(number), {"x": torch.full((50_000,), float(number))})
    found = cache.get("latents", digest(number))
    assert found is None or (found["x"] == number).all(), number
print("damaged", cache.damaged)
"""


def start_filler(folder: Path, limit: int, count: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", FILLER, str(folder), str(limit), str(count)]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_fill_at_once_and_keep_the_limit(tmp_path: Path) -> None:
    limit = 4_000_000
    processes = [start_filler(tmp_path, limit, 40) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        begin(process)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all("damaged 0" in output for output in outputs)
    usage = FeatureCache(tmp_path).usage()
    assert 10 < usage.entries["latents"] <= 20
    assert usage.size <= limit
    assert not list(tmp_path.rglob(".*.[0-9]*"))  # no temporary file is left


def test_kills_leave_whole_entries_or_none(tmp_path: Path) -> None:
    process = start_filler(tmp_path, 0, 100_000)
    assert process.stdout is not None
    process.stdout.readline()
    begin(process)
    while len(list(tmp_path.rglob("*.safetensors"))) < 20:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    cache = FeatureCache(tmp_path)
    found = [cache.get("latents", digest(number)) for number in range(cache.usage().entries["latents"])]
    assert cache.damaged == 0
    for number, tensors in enumerate(found):
        assert tensors is not None
        assert (tensors["x"] == number).all()
    cache.put("latents", digest("next"), entry())
    assert_same(cache.get("latents", digest("next")), entry())


def test_what_a_kill_left_unfinished_goes_after_an_hour(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("latents", NAME, entry())
    folder = cache.path("latents", NAME).parent
    old, new = folder / ".abc.host.1", folder / ".abc.host.2"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    assert cache.usage().entries == {"latents": 1}
    assert not old.exists()
    assert new.exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "latents").write_text("a file where a folder should be")
    with pytest.raises(MachineError, match="can't be written"):
        FeatureCache(tmp_path).put("latents", NAME, entry())


# ---- names


def test_hashes_see_every_bit_the_shape_and_the_dtype() -> None:
    tensor = torch.zeros(2, 3)
    others = [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3)]
    others[2][1, 2] = -0.0
    assert len({hash_tensor(each) for each in (tensor, *others)}) == 4
    assert hash_tensor(tensor.T.contiguous().T) == hash_tensor(tensor)


RECIPE = ClipRecipe(path=Path("a.mp4"), frames=[0, 2], size=(2, 8, 8), transform={"name": "center"}, text="a", fps=8.0)


@pytest.mark.parametrize(
    "change",
    [{"frames": [0, 1]}, {"size": (2, 8, 16)}, {"transform": {"name": "resize_crop"}}],
    ids=lambda change: next(iter(change)),
)
def test_latents_have_another_name_whatever_changes_in_the_preprocessing(change: dict[str, object]) -> None:
    source = SourceFacts(digest="x")
    assert latents_name(attrs.evolve(RECIPE, **change), source, "vae") != latents_name(RECIPE, source, "vae")


def test_latents_are_named_by_content_and_encoder_not_by_path_or_caption() -> None:
    name = latents_name(RECIPE, SourceFacts(digest="x"), "vae")
    elsewhere = attrs.evolve(RECIPE, path=Path("b.mp4"), text="other", fps=3.0)
    assert latents_name(elsewhere, SourceFacts(digest="x", num_frames=9), "vae") == name
    assert latents_name(RECIPE, SourceFacts(digest="y"), "vae") != name
    assert latents_name(RECIPE, SourceFacts(digest="x"), "other") != name
    assert text_name("a", "t5") != text_name("b", "t5") != text_name("b", "clip")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A video that was not changed for a minute."""
    path = tmp_path / "clip.mp4"
    write_video(path, torch.randint(0, 255, (5, 16, 16, 3), dtype=torch.uint8), 8)
    return path


def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time pass."""
    now = time.time
    monkeypatch.setattr("opensora.core.feature_keys.time.time", lambda: now() + 60)


def test_a_file_is_read_once_for_all_runs(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    facts = Sources(tmp_path / "sources").look(clip)
    assert (facts.num_frames, facts.fps) == (5, 8.0)
    monkeypatch.setattr("opensora.core.feature_keys._hash_file", lambda path: pytest.fail(f"{path} was read again"))
    assert Sources(tmp_path / "sources").look(clip) == facts


@pytest.mark.parametrize("keeps_mtime", [False, True])
def test_one_changed_byte_is_noticed(
    keeps_mtime: bool, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(monkeypatch)
    sources = Sources(tmp_path / "sources")
    before, stat = sources.look(clip), clip.stat()
    time.sleep(0.02)  # file systems tell times apart by some milliseconds
    damage_bit(clip)
    if keeps_mtime:
        os.utime(clip, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = sources.look(clip)
    assert after.digest != before.digest
    assert Sources(tmp_path / "sources").look(clip).digest == after.digest


def test_a_file_that_changed_just_now_is_not_taken_on_trust(clip: Path, tmp_path: Path) -> None:
    Sources(tmp_path / "sources").look(clip)
    assert not (tmp_path / "sources").exists()


def test_same_name_in_two_folders_are_two_sources(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "x.png", torch.full((4, 4, 3), 100 * number, dtype=torch.uint8))
    sources = Sources(tmp_path / "sources")
    assert sources.look(tmp_path / "a/x.png").digest != sources.look(tmp_path / "b/x.png").digest


def test_a_missing_or_broken_source_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for name in ("missing.mp4", "broken.mp4"):
        with pytest.raises(DataError, match=name):
            Sources(tmp_path / "sources").look(tmp_path / name)


# ---- encoders


@attrs.frozen(kw_only=True)
class NetworkSpec:
    from_pretrained: str = "here"
    scale: float = 1.0


class Network(nn.Module):
    Spec = NetworkSpec

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.body = nn.Linear(3, 2)
        self.config = {"scaling_factor": 0.5, "_name_or_path": spec.from_pretrained}


def network(**options: object) -> Network:
    torch.manual_seed(0)
    return Network(NetworkSpec(**options))  # type: ignore[arg-type]  # a test's


def test_an_encoder_is_its_class_options_settings_weights_and_dtype() -> None:
    same = identify(network(), dtype=torch.float32)
    assert same == identify(network(from_pretrained="elsewhere"), dtype=torch.float32)
    weight = network()
    weight.body.weight.data[1, 2] = torch.nextafter(weight.body.weight.data[1, 2], torch.tensor(9.0))
    settings = network()
    settings.config["scaling_factor"] = 0.6
    words = network()
    words.fingerprint = lambda: "other tokens"  # type: ignore[assignment]  # added by a test
    others = [identify(each, dtype=torch.float32) for each in (weight, settings, words, network(scale=2.0))]
    assert len({same, *others, identify(network(), dtype=torch.bfloat16)}) == 6


def test_an_identity_is_known_while_its_files_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    config = ComponentConfig(type="vae", options={"parts": [{"from_pretrained": str(folder)}]})
    records, facts = IdentityRecords(tmp_path / "encoders"), {"dtype": torch.float32, "seed": 1}
    records.keep(config, "identity", **facts)  # type: ignore[arg-type]
    assert records.find(config, **facts) is None  # type: ignore[arg-type]  # the file changed just now
    settled(monkeypatch)
    records.keep(config, "identity", **facts)  # type: ignore[arg-type]
    assert records.find(config, **facts) == "identity"  # type: ignore[arg-type]
    assert records.find(config, dtype=torch.bfloat16, seed=1) is None
    assert (
        records.find(config, dtype=torch.float32, seed=2) is None
    )  # no from_pretrained at its top: maybe random weights
    (folder / "model.safetensors").write_bytes(b"weighty")
    assert records.find(config, **facts) is None  # type: ignore[arg-type]


def test_many_threads_may_look_at_once(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        facts = list(pool.map(lambda _: Sources(tmp_path / "sources").look(clip), range(16)))
    assert len({each.digest for each in facts}) == 1
