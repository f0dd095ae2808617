"""LPIPS: how different two images look, by the features of VGG16 weighted as people judged (https://arxiv.org/abs/1801.03924).

The network is here; its weights are files that others publish: VGG16 as torchvision keeps it (keys ``features.N.weight``),
and the five heads of version 0.1 (``vgg.pth``, keys ``lin{i}.model.1.weight``).

Shapes: N images, H W size, c channels of a feature.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora.core.errors import ShapeError, WeightsError
from opensora.core.weights import read_weights, unwrap

__all__ = ["Downloads", "Head", "LPIPS", "Scaling", "VGG16Features", "downloaded_weights", "load_lpips"]

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions, between poolings."""
SMALLEST = 16
"""Pixels a side that outlive four poolings."""
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
HEADS_URL = "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1"
HEADS_MD5 = "d507d7349b931f0638a25a48a722f98a"
_HOW_TO = (
    "Give perceptual_weights the folder (or a list of the files) with VGG16 (torchvision's vgg16-397923af.pth) and the heads "
    f"(vgg.pth of LPIPS 0.1, md5 {HEADS_MD5})"
)


class LPIPS(nn.Module):
    """Distance of images, 0 for equal ones. Not trained: in eval mode, without gradients of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = Scaling()
        self.net = VGG16Features()
        for index, widths in enumerate(WIDTHS):
            self.add_module(f"lin{index}", Head(widths[-1]))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Two batches [N, 3, H, W] in [-1, 1] -> [N, 1, 1, 1].

        Raises:
            ShapeError: They differ in shape, aren't RGB, or have less than 16 pixels a side.
        """
        if (
            images.shape != others.shape
            or images.dim() != 4
            or images.shape[1] != 3
            or min(images.shape[2:]) < SMALLEST
        ):
            raise ShapeError(
                f"LPIPS compares RGB images [N, 3, H, W] of at least {SMALLEST}x{SMALLEST}; got {list(images.shape)} and "
                f"{list(others.shape)}."
            )
        distances = []
        features = zip(self.iter_features(images), self.iter_features(others), strict=True)
        for index, (ours, theirs) in enumerate(features):
            difference = (_unit(ours) - _unit(theirs)).square()  # [N, c, h, w]
            distances.append(self.get_submodule(f"lin{index}")(difference).float().mean((2, 3), keepdim=True))
        return torch.stack(distances).sum(0)

    def iter_features(self, images: Tensor) -> Iterator[Tensor]:
        """The five features [N, c, h, w] of images [N, 3, H, W]."""
        x = self.scaling_layer(images)
        for part in self.net.children():
            x = part(x)
            yield x

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode: it is a measure."""
        return super().train(False)


class Scaling(nn.Module):
    """From [-1, 1] to what VGG16 was trained on."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W]."""
        return (images - self.shift) / self.scale


class VGG16Features(nn.Module):
    """The convolutions of VGG16 (https://arxiv.org/abs/1409.1556) in five slices; layers have torchvision's numbers."""

    def __init__(self) -> None:
        super().__init__()
        layer, before = 0, 3
        for number, widths in enumerate(WIDTHS, start=1):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if number > 1 else []
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            part = nn.Sequential()
            for each in layers:
                part.add_module(str(layer), each)
                layer += 1
            self.add_module(f"slice{number}", part)


class Head(nn.Module):
    """How much each channel counts."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, difference: Tensor) -> Tensor:
        """[N, c, h, w] -> [N, 1, h, w]."""
        return self.model(difference)


def _unit(feature: Tensor) -> Tensor:
    """Each pixel's feature at length 1. In float32, since squares of 512 channels are too much for half precision."""
    feature = feature.float()
    return feature / (feature.square().sum(1, keepdim=True).sqrt() + 1e-10)


class Downloads:
    """Where torch keeps the published files once they were downloaded."""

    @staticmethod
    def folder() -> Path:
        """Torch's own folder for downloaded weights."""
        return Path(torch.hub.get_dir()) / "checkpoints"

    @classmethod
    def files(cls) -> list[Path]:
        """VGG16 and the heads, there or not."""
        return [cls.folder() / "vgg16-397923af.pth", cls.folder() / "lpips-v0.1-vgg.pth"]


def downloaded_weights() -> list[Path] | None:
    """The published files, if they were downloaded before."""
    files = Downloads.files()
    return files if all(file.exists() for file in files) else None


def load_lpips(weights: str | Path | Sequence[str | Path] | None = None) -> LPIPS:
    """`LPIPS` with weights.

    Args:
        weights: File with all weights, folder, or several files, with torchvision's or this module's key names. None: the
            published ones, downloaded unless they were before.

    Raises:
        WeightsError: They can't be read or downloaded, or something is missing.
    """
    if weights is None:
        files: Iterable[Path] = downloaded_weights() or _download()
    else:
        given = [weights] if isinstance(weights, str | Path) else list(weights)
        files = [file for each in given for file in _files_of(Path(each).expanduser())]
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _own_keys(unwrap(read_weights(file)))
    model = LPIPS()
    own = model.state_dict()
    state = {**{key: value for key, value in own.items() if key.startswith("scaling_layer.")}, **state}
    if missing := [key for key in own if key not in state]:
        part = "VGG16" if missing[0].startswith("net.") else "the heads"
        raise WeightsError(f"LPIPS: {part} can't be found in {_listed(files)} (no {missing[0]}). {_HOW_TO}.")
    if wrong := [key for key in own if own[key].shape != state[key].shape]:
        raise WeightsError(
            f"LPIPS: {wrong[0]} in {_listed(files)} is {list(state[wrong[0]].shape)}, not {list(own[wrong[0]].shape)}."
        )
    model.load_state_dict({key: state[key] for key in own})
    return model


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in (".pth", ".pt", ".bin", ".safetensors"))
        if not found:
            raise WeightsError(f"LPIPS: {path} holds no weights. {_HOW_TO}.")
        return found
    if not path.exists():
        raise WeightsError(f"LPIPS: there is no file or folder {path}. {_HOW_TO}.")
    return [path]


def _own_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Torchvision's ``features.N.weight`` in the slice that layer N belongs to; its classifier is left out."""
    slices = {key.split(".", 2)[2]: key for key in LPIPS().state_dict() if key.startswith("net.")}
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := re.fullmatch(r"features\.(\d+\.(?:weight|bias))", key):
            renamed[slices[match[1]]] = value
        elif key.startswith(("net.", "lin", "scaling_layer.")):
            renamed[key] = value
    return renamed


def _download() -> list[Path]:
    """Fetch the published files.

    Raises:
        WeightsError: No network, or other bytes than were published.
    """
    vgg, heads = Downloads.files()
    try:
        torch.hub.load_state_dict_from_url(
            VGG_URL, file_name=vgg.name, check_hash=True, map_location="cpu", weights_only=True
        )
        if not heads.exists():
            heads.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(HEADS_URL, str(heads), progress=False)
    except (OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(f"The weights of LPIPS can't be downloaded ({reason}). {_HOW_TO}.") from error
    digest = hashlib.md5(heads.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != HEADS_MD5:
        heads.unlink()
        raise WeightsError(f"{HEADS_URL} gave other bytes than were published (md5 {digest}). {_HOW_TO}.")
    return [vgg, heads]


def _listed(files: Iterable[Path]) -> str:
    return ", ".join(map(str, files))
