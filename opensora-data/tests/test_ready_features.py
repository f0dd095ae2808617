"""Latents and embeddings in files, in place of videos and captions."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora.core import ConfigError, DataError, SampleKey
from opensora.data.ready_features import FeatureDataset, FeatureDatasetSpec


def tensors(count: int, *, frames: int = 2, side: int = 16) -> dict[str, torch.Tensor]:
    return {
        "latents": torch.arange(count).float().reshape(-1, 1, 1, 1, 1).expand(-1, 4, frames, 2, 2).contiguous(),
        "text_embedding": torch.randn(count, 5, 8),
        "text_mask": torch.arange(5) < torch.arange(1, count + 1)[:, None],
        "num_frames": torch.full((count,), float(frames)),
        "height": torch.full((count,), float(side)),
        "width": torch.full((count,), float(side)),
        "fps": 8.0 + torch.arange(count),
    }


def dataset(folder: Path, *, batch_size: int = 2, **options: object) -> FeatureDataset:
    spec = FeatureDatasetSpec(data_path=str(folder), **{"text_width": 8, "text_length": 6, **options})
    return FeatureDataset(spec, batch_size=batch_size)


def test_rows_of_all_files_are_there_in_order(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    saved = {"a.safetensors": tensors(3), "more/b.safetensors": tensors(2)}
    for name, each in saved.items():
        save_file(each, tmp_path / name)
    rows = dataset(tmp_path)
    assert len(rows) == 5
    assert not hasattr(rows, "batches")
    assert rows.size == (2, 16, 16)
    assert rows.latent_size((2, 16, 16)) == (2, 2, 2)
    for index in range(5):
        clip = rows[SampleKey(0, index)]
        own = saved["a.safetensors" if index < 3 else "more/b.safetensors"]
        row = index if index < 3 else index - 3
        assert clip.features is not None
        assert clip.features.moments is not None
        assert clip.features.text is not None
        assert torch.equal(clip.features.moments["latents"], own["latents"][row])
        assert torch.equal(clip.features.text.text_embedding[0, :5], own["text_embedding"][row])  # type: ignore[index]
        assert clip.features.text.text_mask[0].tolist() == [*own["text_mask"][row].tolist(), False]  # type: ignore[index]
        assert (clip.fps, clip.size) == (8.0 + row, (2, 16, 16))


def test_sizes_come_in_batches_of_their_own(tmp_path: Path) -> None:
    save_file(tensors(5), tmp_path / "a.safetensors")
    save_file(tensors(3, frames=4, side=32), tmp_path / "b.safetensors")
    rows = dataset(tmp_path)
    batches = [list(batch) for batch in rows.batches(0, 0)]
    assert sorted(key.index for batch in batches for key in batch) == list(range(8))
    for batch in batches:
        assert len({key.size for key in batch}) == 1
        assert len(batch) <= 2
        assert all(rows[key].size == key.size for key in batch)


@pytest.mark.parametrize("is_packed", [False, True])
def test_files_of_open_sora(is_packed: bool, tmp_path: Path) -> None:
    own = tensors(3)
    old = {
        "x": own["latents"],
        "text": ["a", "b", "c"],
        **{name: own[name] for name in ("fps", "height", "width", "num_frames")},
        "y": own["text_embedding"][:, None],
        "mask": own["text_mask"].long(),
    }
    if is_packed:  # as a model's embedder left them: tokens of all samples in a row
        old["y"], old["mask"] = torch.cat([own["text_embedding"][row, : row + 1] for row in range(3)])[None], [1, 2, 3]
    torch.save([old, old], tmp_path / "00000000.bin")
    rows = dataset(tmp_path)
    assert len(rows) == 6
    clip = rows[SampleKey(0, 4)]
    assert clip.text == "b"
    assert clip.features is not None
    assert clip.features.text is not None
    assert torch.equal(clip.features.text.text_embedding[0, :2], own["text_embedding"][1, :2])  # type: ignore[index]
    assert clip.features.text.text_mask.tolist() == [[True, True, False, False, False, False]]  # type: ignore[union-attr]


class Evil:
    """What a pickle may hold."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("run",)


def test_a_pickle_with_code_is_refused_with_the_way_to_convert_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save([{"x": Evil()}], tmp_path / "0.bin")
    with pytest.raises(DataError, match=r"could run code.*convert it once"):
        dataset(tmp_path)
    assert capsys.readouterr().out == ""


def test_labels_in_place_of_text(tmp_path: Path) -> None:
    own = {**tensors(2), "labels": torch.tensor([3, 7])}
    save_file({name: each for name, each in own.items() if not name.startswith("text")}, tmp_path / "a.safetensors")
    clip = dataset(tmp_path, text_width=None)[SampleKey(0, 1)]
    assert clip.features is not None
    assert clip.features.text is not None
    assert clip.features.text.labels.tolist() == [7]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "has no .safetensors"),
        (lambda path: path.write_bytes(b"nothing"), "can't be read"),
        (lambda path: save_file({"latents": torch.zeros(1, 4, 1, 1, 1)}, path), "lacks text_embedding, fps"),
        (lambda path: save_file({**tensors(1), "latents": torch.zeros(1, 3, 1, 1, 1)}, path), "not .N, 4, T, H, W."),
    ],
)
def test_files_that_do_not_fit(make, message: str, tmp_path: Path) -> None:
    make(tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=message):
        dataset(tmp_path)


def test_embeddings_that_are_too_long(tmp_path: Path) -> None:
    save_file(tensors(1), tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"5 tokens, more than dataset\.text_length = 4"):
        dataset(tmp_path, text_length=4)[SampleKey(0, 0)]


def test_it_lives_in_loader_workers(tmp_path: Path) -> None:
    save_file(tensors(2), tmp_path / "a.safetensors")
    save_file(tensors(1, frames=4), tmp_path / "b.safetensors")
    rows = pickle.loads(pickle.dumps(dataset(tmp_path)))
    assert len(list(rows.batches(0, 0))) == 2


def test_no_path_yet() -> None:
    with pytest.raises(DataError, match="data_path is not set"):
        FeatureDataset(FeatureDatasetSpec())


def test_a_run_with_ready_features_asks_for_nothing_else(tmp_path: Path) -> None:
    from opensora.core.config.structure import ComponentConfig
    from opensora.core.pipelines.train_spec import FeaturesSpec, TrainSpec
    from opensora.core.ready_features import ready_encoders

    rows = FeatureDatasetSpec()
    config = ComponentConfig(type="FeatureDataset", options={})
    spec = TrainSpec(model=config, scheduler=config, dataset=config)
    assert ready_encoders(spec, rows)["vae"].latent_channels == 4
    with pytest.raises(ConfigError, match="already"):
        ready_encoders(
            TrainSpec(model=config, scheduler=config, dataset=config, features=FeaturesSpec(folder="x")), rows
        )
    with pytest.raises(ConfigError, match="Previews need"):
        ready_encoders(TrainSpec(model=config, scheduler=config, dataset=config, preview_every=1), rows)
