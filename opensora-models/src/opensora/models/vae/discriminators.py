"""Discriminators: they tell real videos from reconstructed ones, and so teach an autoencoder to make detail.

`NLayerDiscriminator` is the PatchGAN of pix2pix (https://arxiv.org/abs/1611.07004), `NLayerDiscriminator3D` the same with 3-D
convolutions, and `StyleGANDiscriminator3D` follows StyleGAN's residual one (https://arxiv.org/abs/1912.04958) in 3-D, as
MAGVIT (https://arxiv.org/abs/2212.05199) does.

Shapes: N images, B videos, C channels, T H W frames and size, X Y channels of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from attrs import field, frozen
from attrs.validators import deep_iterable, ge, gt, min_len
from torch import Tensor, nn

from opensora.core.errors import ConfigError, ShapeError, WeightsError
from opensora.core.protocols import Size
from opensora.core.weights import LoadReport, load_weights, locate_weights

__all__ = [
    "BlurPool",
    "Discriminator",
    "DownBlock",
    "NLayerDiscriminator",
    "NLayerDiscriminator3D",
    "NLayerDiscriminatorSpec",
    "PretrainedSpec",
    "StyleGANDiscriminator3D",
    "StyleGANDiscriminatorSpec",
]


@frozen(kw_only=True)
class PretrainedSpec:
    """Where a discriminator's weights come from."""

    from_pretrained: str | None = None
    """File, run folder, checkpoint or hub id. Of a folder its sub-folder or file ``discriminator`` is taken."""
    use_pretrained: bool = True
    """False leaves ``from_pretrained`` aside."""
    inflate_from_2d: bool = False
    """The weights are those of a 2-D discriminator: its kernels become the central time slice of 3-D ones."""


@frozen(kw_only=True)
class NLayerDiscriminatorSpec(PretrainedSpec):
    """Options of `NLayerDiscriminator` and `NLayerDiscriminator3D`."""

    input_nc: int = field(default=3, validator=gt(0))
    """Channels of the video."""
    ndf: int = field(default=64, validator=gt(0))
    """Channels after the first convolution; each further one has twice as many, up to eight times."""
    n_layers: int = field(default=3, validator=ge(1))
    """Convolutions with stride 2: more look at larger patches."""
    use_actnorm: bool = False
    """Accepted as False from older configs: there is no activation normalization here, only batch norm."""

    def __attrs_post_init__(self) -> None:
        if self.use_actnorm:
            raise ConfigError("discriminator.use_actnorm = True: there is only batch norm here. Leave it out.")


@frozen(kw_only=True)
class StyleGANDiscriminatorSpec(PretrainedSpec):
    """Options of `StyleGANDiscriminator3D`."""

    image_size: tuple[int, int] = field(default=(128, 128), validator=deep_iterable(gt(0)))
    """Height and width of the videos it judges."""
    num_frames: int = field(default=17, validator=gt(0))
    """Their frames; shorter ones are extended by their last frame."""
    in_channels: int = field(default=3, validator=gt(0))
    """Channels of the video."""
    filters: int = field(default=128, validator=gt(0))
    """Channels after the first convolution."""
    channel_multipliers: tuple[int, ...] = field(default=(2, 4, 4, 4, 4), validator=[min_len(1), deep_iterable(gt(0))])
    """Channels after each block, in multiples of ``filters``. Each block halves frames, height and width."""
    num_groups: int = field(default=32, validator=gt(0))
    """Of the group norms."""

    def __attrs_post_init__(self) -> None:
        widths = [self.filters, *(self.filters * each for each in self.channel_multipliers)]
        if wrong := [width for width in widths if width % self.num_groups]:
            raise ConfigError(f"discriminator: {wrong[0]} channels can't be split into {self.num_groups} groups.")
        multiple = 2 ** len(self.channel_multipliers)
        if any(side % multiple for side in self.image_size):
            nearest = tuple(max(multiple, round(side / multiple) * multiple) for side in self.image_size)
            raise ConfigError(
                f"discriminator.image_size = {self.image_size} can't be halved {len(self.channel_multipliers)} times. "
                f"Nearest: {nearest}."
            )


class Discriminator(nn.Module):
    """What the discriminators share: their weights' file, and which videos they can judge."""

    Spec: ClassVar[type]
    is_3d: ClassVar[bool]
    """Judges videos [B, C, T, H, W]; otherwise images [N, C, H, W]."""
    spec: PretrainedSpec

    @property
    def smallest(self) -> Size:
        """The least (T, H, W) that it can judge."""
        raise NotImplementedError

    def check_size(self, size: Size) -> None:
        """Refuse videos of (T, H, W) that it can't judge, even if they were extended in time.

        Raises:
            ShapeError: It says what would fit.
        """
        _, height, width = self.smallest
        if size[1] < height or size[2] < width:
            raise ShapeError(
                f"{type(self).__name__} can't judge {size[1]}x{size[2]}: it needs at least {height}x{width}. "
                "Lower discriminator.n_layers, or use larger videos."
            )

    def judge(self, video: Tensor) -> Tensor:
        """Logits of videos [B, C, T, H, W], high for real ones; [B*T, 1, h, w], [B, 1, t, h, w] or [B, 1].

        A 2-D discriminator judges each frame. A 3-D one is shown videos that are too short for it with their last frame
        repeated, so that single images and short clips train it too.

        Raises:
            ShapeError: A size that it can't judge.
        """
        self.check_size(tuple(video.shape[2:]))  # type: ignore[arg-type]  # a 5-D tensor
        if not self.is_3d:
            return self(video.transpose(1, 2).flatten(0, 1))
        if (lacking := self.smallest[0] - video.shape[2]) > 0:
            video = torch.cat([video, video[:, :, -1:].expand(-1, -1, lacking, -1, -1)], dim=2)
        return self(video)

    def load_pretrained(self) -> LoadReport | None:
        """Take the weights that the options name, if they name any.

        Raises:
            WeightsError: They can't be had, or don't fit.
        """
        if not (self.spec.from_pretrained and self.spec.use_pretrained):
            return None
        return load_weights(self, _find_weights(self.spec.from_pretrained))

    def adapt_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With ``inflate_from_2d``, 2-D kernels become 3-D ones: all but the central time slice is zero.

        A still video is then judged as its frame was: exactly where all of the kernel's time lies inside the video.
        """
        own = self.state_dict()
        if not self.spec.inflate_from_2d:
            return dict(state)
        return {
            key: _inflate(value, own[key].shape[2]) if key in own and own[key].dim() == value.dim() + 1 == 5 else value
            for key, value in state.items()
        }


class NLayerDiscriminator(Discriminator):
    """Judges overlapping patches of single frames: [N, C, H, W] -> logits [N, 1, h, w]."""

    Spec: ClassVar[type] = NLayerDiscriminatorSpec
    is_3d = False

    def __init__(self, spec: NLayerDiscriminatorSpec) -> None:
        super().__init__()
        self.spec: NLayerDiscriminatorSpec = spec
        self.main = _patch_gan(spec, nn.Conv2d, nn.BatchNorm2d, stride=2)
        self.apply(_init_patch_gan)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 1, h, w]."""
        return self.main(images)

    @property
    def smallest(self) -> Size:
        """See `Discriminator.smallest`."""
        side = _smallest_side(self.spec.n_layers, halvings=self.spec.n_layers)
        return 1, side, side


class NLayerDiscriminator3D(Discriminator):
    """Judges overlapping patches of videos: [B, C, T, H, W] -> logits [B, 1, t, h, w]. Time is halved once."""

    Spec: ClassVar[type] = NLayerDiscriminatorSpec
    is_3d = True

    def __init__(self, spec: NLayerDiscriminatorSpec) -> None:
        super().__init__()
        self.spec: NLayerDiscriminatorSpec = spec
        self.main = _patch_gan(spec, nn.Conv3d, nn.BatchNorm3d, stride=(1, 2, 2))
        self.apply(_init_patch_gan)

    def forward(self, video: Tensor) -> Tensor:
        """Logits [B, 1, t, h, w]."""
        return self.main(video)

    @property
    def smallest(self) -> Size:
        """See `Discriminator.smallest`."""
        side = _smallest_side(self.spec.n_layers, halvings=self.spec.n_layers)
        return _smallest_side(self.spec.n_layers, halvings=1), side, side


class StyleGANDiscriminator3D(Discriminator):
    """Judges whole videos of one size: [B, C, T, H, W] -> one logit each, [B, 1]."""

    Spec: ClassVar[type] = StyleGANDiscriminatorSpec
    is_3d = True

    def __init__(self, spec: StyleGANDiscriminatorSpec) -> None:
        super().__init__()
        self.spec: StyleGANDiscriminatorSpec = spec
        widths = [spec.filters, *(spec.filters * each for each in spec.channel_multipliers)]
        self.conv1 = nn.Conv3d(spec.in_channels, widths[0], 3, padding=1)
        self.res_block_list = nn.ModuleList(DownBlock(X, Y, spec.num_groups) for X, Y in pairwise(widths))
        self.conv2 = nn.Conv3d(widths[-1], widths[-1], 3, padding=1)
        self.norm1 = nn.GroupNorm(spec.num_groups, widths[-1])
        self.linear1 = nn.Linear(widths[-1] * math.prod(self._halved(self.smallest)), widths[-1])
        self.linear2 = nn.Linear(widths[-1], 1)
        self.apply(_init_style_gan)

    def forward(self, video: Tensor) -> Tensor:
        """Logits [B, 1]."""
        x = _leaky(self.conv1(video))
        for block in self.res_block_list:
            x = block(x)
        x = _leaky(self.norm1(self.conv2(x)))
        return self.linear2(_leaky(self.linear1(x.flatten(1))))

    @property
    def smallest(self) -> Size:
        """The (T, H, W) that it was built for."""
        return self.spec.num_frames, *self.spec.image_size

    def check_size(self, size: Size) -> None:
        """Refuse videos of another height or width, or of more frames than fit.

        Raises:
            ShapeError: It says what would fit.
        """
        extended = (max(size[0], self.spec.num_frames), *size[1:])
        if size[1:] != self.spec.image_size or self._halved(extended) != self._halved(self.smallest):
            built = " x ".join(map(str, self.smallest))
            raise ShapeError(
                f"The discriminator was built for {built} (frames x height x width) and can't judge "
                f"{' x '.join(map(str, size))}. Set discriminator.num_frames={size[0]}, image_size={tuple(size[1:])}."
            )

    def _halved(self, size: Size) -> Size:
        """(T, H, W) after all blocks; each rounds up."""
        factor = 2 ** len(self.spec.channel_multipliers)
        frames, height, width = (-(-side // factor) for side in size)
        return frames, height, width


class DownBlock(nn.Module):
    """Halves frames, height and width, and goes from X to Y channels; a residual block whose sum keeps its variance."""

    def __init__(self, X: int, Y: int, num_groups: int) -> None:  # noqa: N803  # as in the legend
        super().__init__()
        self.conv1 = nn.Conv3d(X, X, 3, padding=1)
        self.norm1 = nn.GroupNorm(num_groups, X)
        self.blur = BlurPool(X)
        self.conv2 = nn.Conv3d(X, Y, 1, bias=False)
        self.conv3 = nn.Conv3d(X, Y, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, Y)

    def forward(self, x: Tensor) -> Tensor:
        """[B, X, T, H, W] -> [B, Y, T/2, H/2, W/2], rounded up."""
        branch = self.blur(_leaky(self.norm1(self.conv1(x))))
        branch = _leaky(self.norm2(self.conv3(branch)))
        return (branch + self.conv2(self.blur(x))) / math.sqrt(2)


class BlurPool(nn.Module):
    """Takes every second voxel after a [1, 2, 1] blur on each axis, so that shifts don't alias.

    Source: Zhang, Making Convolutional Networks Shift-Invariant Again, https://arxiv.org/abs/1904.11486.
    """

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        cube = line[:, None, None] * line[:, None] * line
        self.register_buffer("filt", cube.repeat(channels, 1, 1, 1, 1))  # [X, 1, 3, 3, 3]

    def forward(self, x: Tensor) -> Tensor:
        """[B, X, T, H, W] -> half of each, rounded up."""
        alone = [0 if side == 1 else 1 for side in reversed(x.shape[2:])]
        x = F.pad(x, [pad for pad in alone for _ in "  "], mode="reflect")
        if 0 in alone:  # a single frame has no neighbour to reflect
            x = F.pad(x, [1 - pad for pad in alone for _ in "  "], mode="replicate")
        return F.conv3d(x, self.filt, stride=2, groups=x.shape[1])


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _patch_gan(
    spec: NLayerDiscriminatorSpec,
    conv: Callable[..., nn.Module],
    norm: Callable[[int], nn.Module],
    *,
    stride: int | tuple[int, int, int],
) -> nn.Sequential:
    """Kernels of 4, padded by 1: one with stride 2, ``n_layers`` - 1 with ``stride``, two with stride 1."""
    widths = [spec.ndf * min(2**n, 8) for n in range(spec.n_layers + 1)]
    layers: list[nn.Module] = [conv(spec.input_nc, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for n, (X, Y) in enumerate(pairwise(widths), start=1):
        step = stride if n < spec.n_layers else 1
        layers += [conv(X, Y, 4, stride=step, padding=1, bias=False), norm(Y), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, conv(widths[-1], 1, 4, padding=1))


def _init_patch_gan(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _init_style_gan(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d | nn.Linear):
        nn.init.xavier_uniform_(module.weight, gain=nn.init.calculate_gain("relu"))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _smallest_side(n_layers: int, *, halvings: int) -> int:
    """The least length along an axis that leaves one logit: from the last layer back to the first."""
    length = 1
    for layer in reversed(range(n_layers + 2)):
        length = length * 2 if layer < halvings else length + 1  # the inverse of floor((n + 2 - 4) / stride) + 1
    return length


def _inflate(kernel: Tensor, depth: int) -> Tensor:
    """[Y, X, h, w] -> [Y, X, depth, h, w]; of an even depth the first of the central slices, since the padding is 1."""
    inflated = kernel.new_zeros(*kernel.shape[:2], depth, *kernel.shape[2:])
    inflated[:, :, (depth - 1) // 2] = kernel
    return inflated


def _find_weights(source: str) -> Path:
    """The discriminator's part of a folder, or the file itself."""
    path = locate_weights(source)
    if not path.is_dir():
        return path
    from opensora.core.checkpoints import find_checkpoint, list_checkpoints

    if list_checkpoints(path):
        path = find_checkpoint(path)
    for part in (path / "discriminator", path / "discriminator.safetensors"):
        if part.exists():
            return part
    raise WeightsError(
        f"{source} has no discriminator: no sub-folder or file of that name. Give discriminator.from_pretrained a file, "
        "or set discriminator.use_pretrained=False to start it anew."
    )
