"""The video autoencoder of Open-Sora 1.2: an image autoencoder, and a temporal one on the latents of its frames.

Videos go through in chunks of ``micro_frame_size`` frames that know nothing of each other. So encoding and decoding chunk by
chunk is exact, and `VideoAutoencoderPipeline.iter_decode` takes no more memory for a longer video.

Shapes: B batch, C channels, T frames, t latent frames, H W size, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import attrs
import torch
from attrs import field, frozen
from attrs.validators import gt, optional
from torch import Tensor, nn

from opensora.core.components import construct, load, preset, structure_spec
from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import ConfigError
from opensora.core.protocols import Size
from opensora.core.randomness import Draws
from opensora.core.weights import load_weights
from opensora.models._pretrained import reading
from opensora.models.vae._interop import present_name
from opensora.models.vae._streaming import PieceDraws, Video, check_channels, check_num_frames, chunks, join
from opensora.models.vae.posterior import Posterior
from opensora.models.vae.temporal_vae import TemporalVAE

__all__ = ["OpenSoraVAE_V1_2", "Reconstruction", "VideoAutoencoderPipeline", "VideoAutoencoderPipelineSpec"]


@frozen(kw_only=True)
class VideoAutoencoderPipelineSpec:
    """Options of `VideoAutoencoderPipeline`."""

    vae_2d: ComponentConfig
    """The image autoencoder. Not read or downloaded itself where ``from_pretrained`` brings the weights of both."""
    vae_temporal: ComponentConfig
    """The temporal autoencoder."""
    from_pretrained: str | None = None
    """Weights of both: file, folder, checkpoint or hub id. None: each part's own."""
    local_files_only: bool = False
    """Never download."""
    freeze_vae_2d: bool = False
    """Training leaves the image autoencoder as it is."""
    cal_loss: bool = False
    """For training: latents stay as the temporal autoencoder makes them, without ``shift`` and ``scale``."""
    micro_frame_size: int | None = field(default=None, validator=optional(gt(0)))
    """Frames that are encoded and decoded together, and apart from all others, which bounds the memory. None: all."""
    micro_batch_size: int | None = field(default=None, validator=optional(gt(0)))
    """Frames that go through the image autoencoder at a time. Doesn't change the result. None: as ``vae_2d`` says."""
    tile_size: int | None = field(default=None, validator=optional(gt(0)))
    """Layers of both work on tiles of so many entries a side: less memory, the same result. None: as the parts say."""
    shift: float | tuple[float, ...] = 0.0
    """What is taken from the latents, of each channel or of all."""
    scale: float | tuple[float, ...] = 1.0
    """What the latents are divided by, so that denoisers see unit variance."""


class Reconstruction(NamedTuple):
    """What `VideoAutoencoderPipeline.reconstruct` gives: all that losses compare."""

    x_rec: Tensor | None
    """[B, 3, T, H, W], the video again; None if pixels weren't asked for."""
    x_z_rec: Tensor
    """[B, C, T, h, w], the image latents as the temporal autoencoder gives them back."""
    z: Tensor
    """[B, C', t, h, w], the latents, without shift and scale."""
    posterior: Posterior
    """Where ``z`` comes from; of all chunks."""
    x_z: Tensor
    """[B, C, T, h, w], the image latents."""


class VideoAutoencoderPipeline(nn.Module):
    """Pixels to image latents to latents that are shorter in time. Frozen, in eval mode; `train_parts` changes that."""

    Spec: ClassVar[type] = VideoAutoencoderPipelineSpec
    memory_options: ClassVar[Sequence[str]] = ("micro_batch_size", "tile_size", "freeze_vae_2d")
    scale: Tensor
    shift: Tensor

    def __init__(self, spec: VideoAutoencoderPipelineSpec, *, meta: bool = False) -> None:
        """Builds both parts and reads their weights.

        Args:
            spec: Options.
            meta: Read no weights, for a look at shapes.

        Raises:
            WeightsError: They can't be found, downloaded or read, or don't fit.
            ConfigError: An option of a part is wrong, or the parts don't fit each other.
        """
        super().__init__()
        self.spec = spec
        source = None if meta else spec.from_pretrained
        with torch.device("meta") if source else nullcontext():  # what is about to be replaced needs no memory
            self.spatial_vae, self.temporal_vae = _build_parts(spec, meta=meta or bool(source))
            self.latent_channels = self.temporal_vae.latent_channels
            self.register_buffer("scale", self._per_channel("scale", spec.scale))
            self.register_buffer("shift", self._per_channel("shift", spec.shift))
        if source:
            load_weights(self, _cached(source) if spec.local_files_only else source, assign=True)
            self.float()
        self.requires_grad_(False).eval()

    def encode(self, video: Tensor, *, draws: Draws | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> float32 [B, C', t, h, w]. ``draws`` samples both posteriors; None takes their means.

        Raises:
            ShapeError: No RGB video, or too small.
        """
        check_channels(video, 3, what="Videos")
        return join(self.iter_encode(video, draws=draws), self.latent_frames(video.shape[2]))

    def iter_encode(self, video: Video, *, draws: Draws | None = None) -> Iterator[Tensor]:
        """`encode` chunk by chunk, as they are asked for. ``video`` may itself come in pieces [B, 3, T', H, W]."""
        for _, posterior, own_draws in self._iter_posteriors(video, draws):
            latents = _sample(posterior, own_draws)
            yield latents if self.spec.cal_loss else (latents - self.shift) / self.scale

    def moments(self, video: Tensor) -> dict[str, Tensor]:
        """[B, 3, T, H, W] in [-1, 1] -> ``mean`` and ``logvar`` [B, C', t, h, w], of which `latents_of` draws, and the scale.

        They are those of the second posterior, given the mean of the first: unlike `encode`, `latents_of` draws once. Image
        latents are close to certain, so that it hardly matters.
        """
        check_channels(video, 3, what="Videos")
        posterior = Posterior.cat([each for _, each, _ in self._iter_posteriors(video, None)])
        if self.spec.cal_loss:
            return posterior.moments()
        per_channel = (len(video), -1, 1, 1, 1)
        scaling = {"shift": self.shift, "scale": self.scale}
        return posterior.moments() | {
            name: each.reshape(1, -1, 1, 1, 1).expand(per_channel) for name, each in scaling.items()
        }

    def latents_of(self, moments: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Latents as `encode` gives them, of these moments; chunk by chunk, as they were encoded."""
        pairs = (chunks(moments[name], self.latent_chunk) for name in ("mean", "logvar"))
        drawn = [
            _sample(Posterior(mean, logvar), PieceDraws(draws, f"chunk {index}"))
            for index, (mean, logvar) in enumerate(zip(*pairs, strict=True))
        ]
        latents = torch.cat(drawn, dim=2)
        return latents if self.spec.cal_loss else (latents - moments["shift"]) / moments["scale"]

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """[B, C', t, h, w] -> float32 [B, 3, num_frames, 8h, 8w].

        Raises:
            ShapeError: Other channels, or latents of another number of frames.
        """
        return join(self.iter_decode(latents, num_frames=num_frames), num_frames)

    def iter_decode(self, latents: Tensor, *, num_frames: int) -> Iterator[Tensor]:
        """`decode` in pieces of time, as they are asked for, so that memory doesn't grow with the number of chunks."""
        check_channels(latents, self.latent_channels, what="Latents")
        factor = self.temporal_vae.factor
        check_num_frames(latents, num_frames, latent_frames=self.latent_frames, factor=factor)
        return self._iter_decode(latents, num_frames)

    def reconstruct(self, video: Tensor, *, draws: Draws | None = None, pixels: bool = True) -> Reconstruction:
        """Encode and decode, and keep what losses need. Has gradients where parts are trainable.

        Args:
            video: [B, 3, T, H, W] in [-1, 1].
            draws: Sample both posteriors; None takes their means.
            pixels: Whether to decode to pixels; False saves the time where losses compare latents alone.

        Raises:
            ShapeError: No RGB video, or too small.
        """
        image_latents, posteriors, latents, decoded = [], [], [], []
        for chunk, posterior, own_draws in self._iter_posteriors(video, draws):
            image_latents.append(chunk)
            posteriors.append(posterior)
            latents.append(_sample(posterior, own_draws))
            decoded.append(self.temporal_vae.decode(latents[-1], num_frames=chunk.shape[2]))
        x_z_rec = torch.cat(decoded, dim=2)
        return Reconstruction(
            x_rec=self.spatial_vae.decode(x_z_rec, num_frames=video.shape[2]) if pixels else None,
            x_z_rec=x_z_rec,
            z=torch.cat(latents, dim=2),
            posterior=Posterior.cat(posteriors),
            x_z=torch.cat(image_latents, dim=2),
        )

    def train_parts(self) -> list[nn.Parameter]:
        """Make trainable what training changes: the temporal part and, unless ``freeze_vae_2d``, the image autoencoder."""
        parts = [self.temporal_vae] if self.spec.freeze_vae_2d else [self.spatial_vae, self.temporal_vae]
        for part in parts:
            part.requires_grad_(True).train()
        return [parameter for part in parts for parameter in part.parameters()]

    @property
    def temporal_last_layer(self) -> nn.Parameter:
        """The weight at which the adversarial loss is balanced with the others."""
        return self.temporal_vae.decoder.conv_out.conv.weight  # type: ignore[return-value]  # no Tensor | Module

    @property
    def latent_chunk(self) -> int | None:
        """Latent frames that are decoded together, apart from all others; None: a whole video is."""
        chunk = self.spec.micro_frame_size
        return None if chunk is None else self.temporal_vae.latent_frames(chunk)

    def latent_frames(self, num_frames: int) -> int:
        """How many latent frames a video of so many frames has."""
        if not (chunk := self.spec.micro_frame_size):
            return self.temporal_vae.latent_frames(num_frames)
        whole, rest = divmod(num_frames, chunk)
        return whole * self.temporal_vae.latent_frames(chunk) + self.temporal_vae.latent_frames(rest)

    def latent_size(self, size: Size) -> Size:
        """(t, h, w): chunk by chunk ceil(T / 4), and height and width divided by 8, rounded down.

        Raises:
            ShapeError: Too small for a single latent.
        """
        frames, height, width = self.spatial_vae.latent_size(size)
        return self.latent_frames(frames), height, width

    @staticmethod
    def adapt_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Renames the attention of image autoencoders saved by old releases of diffusers."""
        return {present_name(key): value for key, value in state.items()}

    def _iter_posteriors(self, video: Video, draws: Draws | None) -> Iterator[tuple[Tensor, Posterior, Draws | None]]:
        """(image latents, posterior, draws) of each chunk."""
        for index, chunk in enumerate(chunks(video, self.spec.micro_frame_size)):
            own_draws = None if draws is None else PieceDraws(draws, f"chunk {index}")
            image_latents = self.spatial_vae.encode(chunk, draws=own_draws)
            yield image_latents, self.temporal_vae.encode_distribution(image_latents), own_draws

    def _iter_decode(self, latents: Tensor, num_frames: int) -> Iterator[Tensor]:
        chunk_frames = self.spec.micro_frame_size or num_frames
        for chunk in chunks(latents, self.temporal_vae.latent_frames(chunk_frames)):
            own_frames = min(chunk_frames, num_frames)
            num_frames -= own_frames
            unscaled = chunk if self.spec.cal_loss else chunk * self.scale + self.shift
            image_latents = self.temporal_vae.decode(unscaled, num_frames=own_frames)
            if hasattr(self.spatial_vae, "iter_decode"):
                yield from self.spatial_vae.iter_decode(image_latents, num_frames=own_frames)
            else:
                yield self.spatial_vae.decode(image_latents, num_frames=own_frames)

    def _per_channel(self, name: str, value: float | tuple[float, ...]) -> Tensor:
        """[1, C', 1, 1, 1] of a tuple, a single number of a number."""
        if not isinstance(value, tuple):
            return torch.tensor(value)
        if len(value) != self.latent_channels:
            raise ConfigError(f"{name} has {len(value)} numbers, but latents have {self.latent_channels} channels.")
        return torch.tensor(value).view(1, -1, 1, 1, 1)


def _build_parts(spec: VideoAutoencoderPipelineSpec, *, meta: bool) -> tuple[Any, TemporalVAE]:
    """The image autoencoder and the temporal one, with those of the whole's options that concern them.

    Raises:
        ConfigError: They don't fit each other.
    """
    tiles = {"tile_size": spec.tile_size}
    frames = {"micro_batch_size": spec.micro_batch_size, "local_files_only": spec.local_files_only or None}
    spatial = _build("vae_2d", spec.vae_2d, frames | tiles, meta=meta)
    temporal = _build("vae_temporal", spec.vae_temporal, tiles, meta=meta)
    if not isinstance(temporal, TemporalVAE):
        raise ConfigError(
            f'vae_temporal is "{spec.vae_temporal.type}", which is no temporal autoencoder. Use "VAE_Temporal".'
        )
    if temporal.spec.in_out_channels != spatial.latent_channels:
        raise ConfigError(
            f"vae_temporal.in_out_channels is {temporal.spec.in_out_channels}, "
            f"but latents of vae_2d have {spatial.latent_channels} channels."
        )
    return spatial, temporal


def _build(key: str, config: ComponentConfig, options: Mapping[str, Any], *, meta: bool) -> Any:
    """A part, with those ``options`` that are set."""
    given = {name: value for name, value in options.items() if value is not None}
    spec = structure_spec("vaes", attrs.evolve(config, options={**config.options, **given}), path=("vae", key))
    return construct(load("vaes", config.type), spec, meta=meta)


def _cached(source: str) -> str:
    """The local path of a source; of a hub id that of the download in the cache."""
    if Path(source).expanduser().exists():
        return source
    from huggingface_hub import snapshot_download

    with reading("video autoencoder", source, key="vae.from_pretrained", local_files_only=True):
        return snapshot_download(source, local_files_only=True)


def _sample(posterior: Posterior, draws: Draws | None) -> Tensor:
    return posterior.mode() if draws is None else posterior.sample(draws, name="temporal posterior")


OpenSoraVAE_V1_2 = preset(
    VideoAutoencoderPipeline,
    "OpenSoraVAE_V1_2",
    vae_2d=ComponentConfig(
        "VideoAutoencoderKL",
        {"from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "subfolder": "vae"},
    ),
    vae_temporal=ComponentConfig("VAE_Temporal_SD"),
    micro_frame_size=17,
    micro_batch_size=4,
    shift=(-0.10, 0.34, 0.27, 0.98),
    scale=(3.85, 2.32, 2.33, 3.06),
)
"""Open-Sora 1.2's autoencoder; its weights: ``from_pretrained="hpcai-tech/OpenSora-VAE-v1.2"``."""
