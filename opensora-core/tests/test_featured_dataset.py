"""Features are looked up where clips are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attrs import define, field

from opensora.core.errors import ConfigError, DataError
from opensora.core.feature_cache import FeatureCache
from opensora.core.feature_keys import Sources, text_name
from opensora.core.features import FeaturedDataset
from opensora.core.loading import iter_batches
from opensora.core.orders import SampleOrder, Slicing
from opensora.core.protocols import Clip, ClipRecipe, SourceFacts
from opensora.core.randomness import SampleKey
from opensora.core.video import write_image


@define
class Pixels:
    """A dataset that can't say how it makes a clip."""

    reads: int = field(default=0, init=False)
    brightness: float = 0.5

    def __len__(self) -> int:
        return 3

    def __getitem__(self, key: SampleKey) -> Clip:
        self.reads += 1
        return Clip(video=torch.full((3, 1, 4, 4), self.brightness * key.index), text="a", fps=8.0, key=key)


@define
class Images(Pixels):
    """One that can."""

    folder: Path = field(kw_only=True)
    on_read: Callable[[Path], object] = field(default=lambda _: None, kw_only=True)

    def __getitem__(self, key: SampleKey) -> Clip:
        self.on_read(self.folder / f"{key.index}.png")
        return super().__getitem__(key)

    def recipe(self, key: SampleKey, look: Callable[[Path], SourceFacts]) -> ClipRecipe:
        path = self.folder / f"{key.index}.png"
        return ClipRecipe(path=path, frames=(0,), size=(1, 4, 4), transform={}, text="a", fps=8.0)


def featured(dataset: Pixels, folder: Path, **options: object) -> FeaturedDataset:
    defaults = {"autoencoder": "vae", "text_encoder": "t5", "cache": FeatureCache(folder)}
    return FeaturedDataset(dataset=dataset, sources=Sources(folder / "sources"), **{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture
def images(tmp_path: Path) -> Images:
    for index in range(3):
        write_image(tmp_path / f"{index}.png", torch.full((4, 4, 3), index, dtype=torch.uint8))
    return Images(folder=tmp_path)


def test_a_clip_without_features_has_its_pixels_and_the_names_to_keep_them_by(images: Images, tmp_path: Path) -> None:
    clip = featured(images, tmp_path)[SampleKey(0, 1)]
    assert clip.features is not None
    assert clip.video.shape == (3, 1, 4, 4)
    assert clip.features.moments is None
    assert clip.features.text is None
    assert clip.features.text_name == text_name("a", "t5")
    assert clip.size == (1, 4, 4)


def test_a_clip_with_latents_is_not_read(images: Images, tmp_path: Path) -> None:
    rows = featured(images, tmp_path)
    name = rows[SampleKey(0, 1)].features.latents_name  # type: ignore[union-attr]
    rows.cache.put("latents", name, {"latents": torch.ones(4, 1, 2, 2)})
    images.reads = 0
    clip = rows[SampleKey(7, 1, epoch=5)]
    assert images.reads == 0
    assert clip.video.numel() == 0
    assert torch.equal(clip.features.moments["latents"], torch.ones(4, 1, 2, 2))  # type: ignore[union-attr, index]
    assert rows[SampleKey(0, 2)].features.moments is None  # type: ignore[union-attr]
    assert clip.path == str(tmp_path / "1.png")


def test_without_recipe_the_pixels_name_the_latents(tmp_path: Path) -> None:
    rows = featured(Pixels(), tmp_path)
    name = rows[SampleKey(0, 1)].features.latents_name  # type: ignore[union-attr]
    rows.cache.put("latents", name, {"latents": torch.ones(4, 1, 2, 2)})
    assert rows[SampleKey(0, 1)].features.moments is not None  # type: ignore[union-attr]
    assert rows[SampleKey(0, 1)].video.numel() == 0
    assert featured(Pixels(0.6), tmp_path)[SampleKey(0, 1)].features.moments is None  # type: ignore[union-attr]


def test_a_file_that_changes_while_it_is_read_is_not_taken(images: Images, tmp_path: Path) -> None:
    images.on_read = lambda path: write_image(path, torch.full((4, 4, 3), 99, dtype=torch.uint8))
    with pytest.raises(DataError, match="changed while it was read"):
        featured(images, tmp_path)[SampleKey(0, 1)]


def test_missing_features_are_refused_with_row_caption_and_hint(images: Images, tmp_path: Path) -> None:
    rows = featured(images, tmp_path, is_filled=False, hint="Do this.")
    with pytest.raises(ConfigError, match=r'latents of row 2, epoch 4 \(.*2.png, "a"\) are not in .*False. Do this.'):
        rows[SampleKey(0, 2, epoch=4)]
    with pytest.raises(ConfigError, match="text embedding of row 2"):
        featured(images, tmp_path, is_filled=False, autoencoder=None)[SampleKey(0, 2)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_has_the_pixels_of_those_that_miss_theirs(num_workers: int, images: Images, tmp_path: Path) -> None:
    rows = featured(images, tmp_path, text_encoder=None)
    name = rows[SampleKey(0, 1)].features.latents_name  # type: ignore[union-attr]
    rows.cache.put("latents", name, {"latents": torch.ones(4, 1, 2, 2)})
    batch = next(iter_batches(rows, SampleOrder(3, 0), Slicing(batch_size=3), num_workers=num_workers))
    assert len(batch) == 3
    assert batch.moments is None
    assert len(batch.video) == 2
    assert sorted(each.moments is None for each in batch.features) == [False, True, True]
    assert [key.index for key, each in zip(batch.keys, batch.features, strict=True) if each.moments] == [1]


def test_a_batch_that_has_all_is_stacked(images: Images, tmp_path: Path) -> None:
    rows = featured(images, tmp_path)
    for index in range(3):
        features = rows[SampleKey(0, index)].features
        assert features is not None
        rows.cache.put("latents", features.latents_name, {"latents": torch.full((4, 1, 2, 2), float(index))})
        rows.cache.put("texts", features.text_name, {"text_embedding": torch.ones(1, 5, 8)})
    batch = next(iter_batches(rows, SampleOrder(3, 0), Slicing(batch_size=3)))
    assert batch.moments is not None
    assert batch.text is not None
    assert batch.moments["latents"][:, 0, 0, 0, 0].tolist() == [key.index for key in batch.keys]
    assert batch.text.text_embedding.shape == (3, 5, 8)  # type: ignore[union-attr]
    assert batch.video.numel() == 0
    assert batch.conditioning.height.tolist() == [4, 4, 4]  # type: ignore[union-attr]


def test_a_damaged_feature_counts_and_the_clip_is_read(images: Images, tmp_path: Path) -> None:
    rows = featured(images, tmp_path)
    name = rows[SampleKey(0, 1)].features.latents_name  # type: ignore[union-attr]
    rows.cache.put("latents", name, {"latents": torch.ones(4, 1, 2, 2)})
    rows.cache.path("latents", name).write_bytes(b"damaged")
    clip = rows[SampleKey(0, 1)]
    assert clip.features.num_damaged == 1  # type: ignore[union-attr]
    assert clip.video.numel() > 0
