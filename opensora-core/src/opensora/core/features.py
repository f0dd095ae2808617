"""Latents and embeddings that are computed once: looked up where clips are read, made where they are missing.

Loader workers look each clip up (`FeaturedDataset`) and hand its features over instead of pixels. What they don't find the
training process makes, one clip at a time, so that a feature doesn't depend on the others of a batch, and keeps. The
encoders are built and placed on the device when the first feature is missing: if none is, they never are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from opensora.core.accelerator import Accelerator
from opensora.core.components import build, structure_spec
from opensora.core.composing import choose_text_placement, on_meta, split_options
from opensora.core.conditioning import Conditioning
from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import ConfigError, DataError, MachineError
from opensora.core.feature_cache import FeatureCache, hash_tensor
from opensora.core.feature_keys import IdentityRecords, Sources, digest, identify, latents_name, text_name
from opensora.core.loading import Batch
from opensora.core.pipelines.train_spec import FeaturesSpec, TrainSpec
from opensora.core.protocols import Clip, ClipFeatures, ClipRecipe, Dataset, TextEncoder, VideoAutoencoder
from opensora.core.randomness import Draws, SampleKey
from opensora.core.run_folder import make_folder
from opensora.core.text_cache import CachedTextEncoder

__all__ = [
    "FeatureCounts",
    "FeaturedDataset",
    "Features",
    "LazyEncoder",
    "draw_latents",
    "narrowed",
    "open_features",
    "stack",
]

log = logging.getLogger(__name__)
LATENTS, TEXTS = "latents", "texts"
"""Kinds of entries."""
_OF_SHAPES = frozenset(
    (
        "latent_channels",
        "latent_size",
        "latent_chunk",
        "latent_frames",
        "latents_of",
        "width",
        "max_length",
        "max_tokens",
    )
)
"""What an encoder can tell before it has its weights."""


class LazyEncoder:
    """An autoencoder or text encoder that is built, with its weights, when it has something to encode or decode."""

    def __init__(self, shapes: Any, build: Callable[[], Any]) -> None:
        """``shapes`` is the same one on the meta device."""
        self._shapes, self._build, self._real = shapes, build, None

    @property
    def is_built(self) -> bool:
        """Whether it was needed."""
        return self._real is not None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(self._shapes, name):
            raise AttributeError(name)
        if name in _OF_SHAPES and self._real is None:
            return getattr(self._shapes, name)
        if self._real is None:
            self._real = self._build()
        return getattr(self._real, name)


@define(kw_only=True, eq=False)
class EncoderSource:
    """How to come by an encoder: its identity without loading it if that is known, and itself if it is needed."""

    kind: str
    config: ComponentConfig
    spec: TrainSpec
    accelerator: Accelerator
    device: torch.device
    dtype: torch.dtype
    records: IdentityRecords
    _identity: str = ""
    _fresh: Any = None
    """Built to be identified, on the CPU, not yet placed."""

    def identity(self) -> str:
        """See `identify`; the same in all processes, and found out by one of them."""
        self._identity = self.accelerator.from_main(self._find_identity)
        return self._identity

    def shapes(self) -> Any:
        """The encoder without weights."""
        with on_meta(True):
            return build(self.kind, self.config, meta=True)

    def lazy(self) -> LazyEncoder:
        """The encoder, to be built and placed when it is needed."""
        return LazyEncoder(self.shapes(), self._place)

    def _find_identity(self) -> str:
        known = self.records.find(self.config, dtype=self.dtype, seed=self.spec.seed)
        if known is not None:
            return known
        self._fresh = self._construct()
        identity = identify(self._fresh, dtype=self.dtype)
        self.records.keep(self.config, identity, dtype=self.dtype, seed=self.spec.seed)
        return identity

    def _construct(self) -> Any:
        with torch.random.fork_rng(devices=[]):  # as if it had been built before the denoiser
            torch.manual_seed(self.spec.seed)
            encoder = build(self.kind, self.config)
        return encoder.requires_grad_(False).eval() if isinstance(encoder, nn.Module) else encoder

    @torch.inference_mode(False)  # previews are in it, and may be the first to ask
    def _place(self) -> Any:
        encoder, self._fresh = self._fresh, None
        if encoder is None:
            encoder = self._construct()
            if self._identity and identify(encoder, dtype=self.dtype) != self._identity:
                raise ConfigError(f'The weights of "{self.config.type}" changed since the run started. Start it again.')
        log.info('"%s" is needed, and placed on %s', self.config.type, self.device.type)
        if isinstance(encoder, nn.Module):
            self.accelerator.place(encoder, device=self.device, dtype=self.dtype)
        return encoder


@define(eq=False)
class FeatureCounts:
    """What became of the features that were asked for, in this process."""

    found: dict[str, int] = field(factory=lambda: {LATENTS: 0, TEXTS: 0})
    made: dict[str, int] = field(factory=lambda: {LATENTS: 0, TEXTS: 0})
    damaged: int = 0

    def add(self, batch: Batch, kinds: Sequence[str]) -> float:
        """Count what the loader found for a batch, and return its share."""
        found = 0
        for kind in kinds:
            whole, part = (batch.moments, "moments") if kind == LATENTS else (batch.text, "text")
            rows = sum(getattr(each, part) is not None for each in batch.features)
            self.found[kind] += len(batch) if whole is not None else rows
            found += len(batch) if whole is not None else rows
        self.damaged += sum(each.num_damaged for each in batch.features)
        return found / max(1, len(batch) * len(kinds))


@frozen(kw_only=True, eq=False)
class FeaturedDataset:
    """A dataset whose clips have their features instead of pixels, where those were computed. Lives in loader workers."""

    dataset: Any
    cache: FeatureCache
    sources: Sources
    autoencoder: str | None
    """Identity; None: latents are not looked up."""
    text_encoder: str | None
    is_filled: bool = True
    """Whether what is missing will be made."""
    hint: str = ""
    """How to make what is missing."""
    only_looks: bool = False
    """Hand nothing over of what was found: that it was is enough."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Clip:
        """The clip of ``key`` with `Clip.features`; its video is empty where its latents are there.

        Raises:
            DataError: The row's file can't be used.
            ConfigError: A feature is missing and is not to be made.
        """
        damaged = self.cache.damaged
        moments, name, clip, text = None, "", None, ""
        recipe: ClipRecipe | None = None
        if self.autoencoder is not None and hasattr(self.dataset, "recipe"):
            recipe = self.dataset.recipe(key, self.sources.look)
            name = latents_name(recipe, self.sources.look(recipe.path), self.autoencoder)
        else:
            clip = self.dataset[key]
            if self.autoencoder is not None:  # the pixels say all that a recipe would
                name = digest(["pixels", hash_tensor(clip.video).hex(), self.autoencoder])
        if name:
            moments = self._found(LATENTS, name, key, clip or recipe)
            if moments is None and clip is None:
                clip = self._read(key, recipe, name)
        known = clip or recipe
        assert known is not None  # one of them says what the clip is
        if self.text_encoder is not None:
            text = text_name(known.text, self.text_encoder)
        embedding = self._found(TEXTS, text, key, known) if text else None
        features = ClipFeatures(
            size=known.size,
            moments=moments,
            latents_name=name,
            text=None if embedding is None else _conditioning(embedding),
            text_name=text,
            num_damaged=self.cache.damaged - damaged,
        )
        video = torch.empty(0) if moments is not None or clip is None else clip.video
        return Clip(video=video, text=known.text, fps=known.fps, key=key, path=str(known.path), features=features)

    def _found(self, kind: str, name: str, key: SampleKey, known: Clip | ClipRecipe | None) -> dict[str, Tensor] | None:
        tensors = self.cache.get(kind, name)
        if tensors is not None:
            return {} if self.only_looks else tensors
        if not self.is_filled:
            what = "latents" if kind == LATENTS else "text embedding"
            raise ConfigError(
                f"The {what} of row {key.index}, epoch {key.epoch} ({getattr(known, 'path', '')}, "
                f'"{getattr(known, "text", "")[:60]}") are not in {self.cache.folder}, and features.fill is False. '
                f"{self.hint}"
            )
        return None

    def _read(self, key: SampleKey, recipe: ClipRecipe | None, name: str) -> Clip:
        clip: Clip = self.dataset[key]
        assert recipe is not None  # it is read because this recipe's latents are missing
        assert self.autoencoder is not None
        if latents_name(recipe, self.sources.look(recipe.path), self.autoencoder) != name:
            raise DataError(f"{recipe.path} was changed while it was read.")
        return clip


@define(kw_only=True, eq=False)
class Features:
    """The features of a run: its encoders, which may never be needed, and the folder that spares them."""

    options: FeaturesSpec
    cache: FeatureCache
    sources: Sources
    accelerator: Accelerator
    vae: Any
    """A `LazyEncoder`. None: latents are not kept."""
    text_encoder: TextEncoder | None
    """Remembers in the folder. None: embeddings are not kept."""
    autoencoder_identity: str | None
    text_identity: str | None
    vae_dtype: torch.dtype
    counts: FeatureCounts = field(factory=FeatureCounts)
    _is_told: bool = False

    def dataset(self, dataset: Any, *, hint: str = "", only_looks: bool = False) -> Dataset:
        """The dataset with features looked up."""
        return FeaturedDataset(
            dataset=dataset,
            cache=self.cache,
            sources=self.sources,
            autoencoder=self.autoencoder_identity,
            text_encoder=self.text_identity,
            is_filled=self.options.fill,
            hint=hint,
            only_looks=only_looks,
        )

    def count(self, batch: Batch) -> float:
        """Count what of a batch was found, and return its share."""
        return self.counts.add(batch, self.kinds)

    @property
    def kinds(self) -> list[str]:
        """What is looked up."""
        return [kind for kind, is_kept in ((LATENTS, self.vae), (TEXTS, self.text_identity)) if is_kept]

    def make_moments(self, batch: Batch) -> list[Mapping[str, Tensor]]:
        """The moments of each clip of a batch, those that were not found computed and kept."""
        videos = iter(batch.video)
        return [
            self._moments_of(next(videos), each.latents_name, path) if each.moments is None else each.moments
            for each, path in zip(batch.features, batch.paths, strict=True)
        ]

    def keep(self, kind: str, name: str, tensors: Mapping[str, Tensor], about: str) -> None:
        """Keep a feature. If the folder can't be written any more, the run goes on without, and says so once."""
        self.counts.made[kind] += 1
        if self._is_told:
            return
        try:
            self.cache.put(kind, name, tensors, about=about)
        except MachineError as error:
            self._is_told = True
            log.warning("%s The run goes on, but keeps no further features.", error)

    def _moments_of(self, video: Tensor, name: str, path: str) -> dict[str, Tensor]:
        if (found := self.cache.get(LATENTS, name)) is not None:  # made meanwhile, here or by another process
            return found
        made = {key: each[0].cpu() for key, each in self._encode(video[None].to(self.accelerator.device)).items()}
        made = {key: narrowed(each, self.vae_dtype) for key, each in made.items()}
        self.keep(LATENTS, name, made, path)
        return made

    def _encode(self, video: Tensor) -> dict[str, Tensor]:
        if hasattr(self.vae, "moments"):
            moments: dict[str, Tensor] = self.vae.moments(video)
            return moments
        watched = _Watched()
        latents = self.vae.encode(video, draws=watched)
        if watched.was_asked:
            raise ConfigError(
                "This autoencoder draws its latents at random, and has no `moments` to draw them from again: they can't be "
                "computed once. Set features.video = False."
            )
        return {"latents": latents}


class KeptText:
    """A text encoder that remembers in a folder. Where all is remembered it is never built."""

    def __init__(self, encoder: LazyEncoder, *, identity: str, features: Callable[[], Features]) -> None:
        self._identity, self._features = identity, features
        self._encoder = CachedTextEncoder(encoder, capacity=0)  # one by one, and tells what is cut off
        self.width, self.max_length, self.max_tokens = encoder.width, encoder.max_length, self._encoder.max_tokens

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See `TextEncoder`; on the CPU."""
        return Conditioning.cat([self._look_up(prompt) for prompt in prompts])

    def _look_up(self, prompt: str) -> Conditioning:
        features, name = self._features(), text_name(prompt, self._identity)
        if (found := features.cache.get(TEXTS, name)) is not None:
            return _conditioning(found)
        made = self._encoder.encode([prompt])
        if features.options.fill:
            features.keep(TEXTS, name, dict(_tensors(made)), prompt)
        return made


class _Watched:
    """`Draws` that notes whether it was asked, and gives zeros."""

    was_asked = False

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """See `Draws`."""
        self.was_asked = True
        return torch.zeros(1, *shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """See `Draws`."""
        return self.normal(name, shape)

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """See `Draws`."""
        return self.normal(name, shape).long()


def open_features(spec: TrainSpec, accelerator: Accelerator, *, fill: bool | None = None) -> Features:
    """Features of a run as ``spec.features`` has them.

    Args:
        fill: Goes before the option of that name.

    Raises:
        MachineError: The folder can't be written, or is missing where it is only to be read.
        ConfigError, WeightsError: See the encoders.
    """
    options = spec.features
    assert options is not None  # asked by the caller
    options = options if fill is None else attrs.evolve(options, fill=fill)
    folder = Path(options.folder).expanduser()
    if options.fill:
        accelerator.from_main(lambda: make_folder(folder))
    elif not folder.is_dir():
        raise MachineError(
            f"features.folder {folder} is missing, and features.fill is False. Make it with pipeline extract."
        )
    starts = getattr(structure_spec("datasets", spec.dataset), "num_starts", 1)
    if options.video and options.fill and starts is None and accelerator.is_main:
        log.warning(
            "Videos that are longer than their clips start elsewhere in each epoch, so that their latents are hardly met "
            "again, and fill the folder. Set dataset.num_starts = 4, say."
        )
    records = IdentityRecords(folder / "encoders")
    text_device, text_dtype = choose_text_placement(spec.text_encoder, accelerator)

    def source(kind: str, config: ComponentConfig, device: torch.device, dtype: torch.dtype) -> EncoderSource:
        return EncoderSource(
            kind=kind,
            config=split_options(kind, config)[0],
            spec=spec,
            accelerator=accelerator,
            device=device,
            dtype=dtype,
            records=records,
        )

    text = source("text_encoders", spec.text_encoder, text_device, text_dtype)
    video = source("vaes", spec.vae, accelerator.device, accelerator.dtype)
    lazy_text = text.lazy() if options.text else None
    has_text = lazy_text is not None and lazy_text.width is not None  # class labels need no keeping
    features = Features(
        options=options,
        cache=FeatureCache(folder, None if options.max_gib is None else int(options.max_gib * 2**30)),
        sources=Sources(folder / "sources", options.fill),
        accelerator=accelerator,
        vae=video.lazy() if options.video else None,
        text_encoder=None,
        autoencoder_identity=video.identity() if options.video else None,
        text_identity=text.identity() if has_text else None,
        vae_dtype=accelerator.dtype,
    )
    if lazy_text is not None and features.text_identity is not None:
        features.text_encoder = KeptText(lazy_text, identity=features.text_identity, features=lambda: features)
    return features


def stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Moments of a batch, each [B, ...], of those of its clips."""
    return {name: torch.stack([row[name].float() for row in rows]) for name in rows[0]}


def draw_latents(vae: VideoAutoencoder, moments: Mapping[str, Tensor], draws: Draws, device: torch.device) -> Tensor:
    """[B, C, T', H', W'] float32 on the device, drawn from the moments [B, ...] of a batch."""
    moments = {name: each.to(device, non_blocking=True).float() for name, each in moments.items()}
    if set(moments) == {"latents"}:
        return moments["latents"]
    latents: Tensor = vae.latents_of(moments, draws)  # type: ignore[attr-defined]  # optional; the moments are its own
    return latents


def _tensors(conditioning: Conditioning) -> Iterator[tuple[str, Tensor]]:
    for name in attrs.fields_dict(Conditioning):
        value = getattr(conditioning, name)
        if name == "extra":
            yield from ((f"extra.{key}", tensor) for key, tensor in value.items())
        elif value is not None:
            yield name, value


def _conditioning(tensors: Mapping[str, Tensor]) -> Conditioning:
    """The inverse of `_tensors`."""
    extra = {name.removeprefix("extra."): each for name, each in tensors.items() if name.startswith("extra.")}
    own: dict[str, Any] = {name: each for name, each in tensors.items() if not name.startswith("extra.")}
    return Conditioning(**own, extra=extra)


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, if that has each of the numbers: what networks in half precision give takes half the room."""
    narrow = tensor.to(dtype) if tensor.dtype is torch.float32 else tensor
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
