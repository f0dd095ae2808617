"""How like the original a reconstruction is, frame by frame: PSNR and SSIM.

Shapes: N frames, C channels, H W size. Values are in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.core.errors import ShapeError

__all__ = ["psnr", "ssim"]

EQUAL = 100.0
"""PSNR of frames whose mean squared difference is below 1e-10, where it would go to infinity."""
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(frames: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of two batches [N, C, H, W] in [0, 1], over all channels: [N], 100 for equal frames.

    Raises:
        ShapeError: They differ in shape.
    """
    frames, others = _checked(frames, others)
    error = (frames - others).square().mean((1, 2, 3))
    return torch.where(error < 1e-10, EQUAL, -10 * error.clamp(min=1e-10).log10())


def ssim(frames: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of two batches [N, C, H, W] in [0, 1], the mean over channels: [N], 1 for equal frames.

    With an 11x11 Gaussian window of sigma 1.5, and only where all of the window lies in the frame.

    Raises:
        ShapeError: They differ in shape, or have less than 11 pixels a side.
    Source: Wang et al., Image Quality Assessment, 2004, https://doi.org/10.1109/TIP.2003.819861.
    """
    frames, others = _checked(frames, others)
    if min(frames.shape[2:]) < WINDOW:
        raise ShapeError(f"SSIM needs frames of at least {WINDOW}x{WINDOW}; got {frames.shape[2]}x{frames.shape[3]}.")
    mean, other_mean = _blur(frames), _blur(others)
    variance = _blur(frames.square()) - mean.square()
    other_variance = _blur(others.square()) - other_mean.square()
    covariance = _blur(frames * others) - mean * other_mean
    likeness = (2 * mean * other_mean + C1) / (mean.square() + other_mean.square() + C1)
    structure = (2 * covariance + C2) / (variance + other_variance + C2)
    return (likeness * structure).mean((1, 2, 3))


def _checked(frames: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    if frames.shape != others.shape or frames.dim() != 4:
        raise ShapeError(
            f"Two batches [N, C, H, W] of one shape are compared; got {list(frames.shape)}, {list(others.shape)}."
        )
    return frames.double(), others.double()


def _blur(x: Tensor) -> Tensor:
    """The weighted mean of each channel in each window that lies in the frame; separable."""
    steps = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-(steps**2) / (2 * SIGMA**2))
    kernel = (window / window.sum()).expand(x.shape[1], 1, WINDOW)
    x = F.conv2d(x, kernel[..., None], groups=x.shape[1])
    return F.conv2d(x, kernel[..., None, :], groups=x.shape[1])
