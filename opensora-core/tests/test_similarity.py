"""PSNR and SSIM against reference values, and against scikit-image's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from opensora.core import ShapeError
from opensora.core.similarity import psnr, ssim


@pytest.fixture(scope="module")
def pairs():
    from pathlib import Path

    tensors = load_file(Path(__file__).parent / "goldens" / "metrics_a.safetensors")
    return tuple(tensors[name].float() / 255 for name in ("real_u8", "generated_u8"))  # [B, T, C, H, W]


def test_values_are_the_reference_ones(pairs, golden):
    expected = golden("metrics")
    for real, generated, psnrs, ssims in zip(
        *pairs, expected["psnr_per_frame"], expected["ssim_per_frame"], strict=True
    ):
        torch.testing.assert_close(psnr(real, generated), torch.tensor(psnrs, dtype=torch.float64), rtol=0, atol=1e-5)
        torch.testing.assert_close(ssim(real, generated), torch.tensor(ssims, dtype=torch.float64), rtol=0, atol=1e-5)


def test_one_channel_will_do(pairs, golden):
    real, generated = (each[0, 1:2, :1] for each in pairs)
    assert ssim(real, generated).item() == pytest.approx(golden("metrics")["ssim_gray_b0_t1_c0"], abs=1e-5)


def test_values_are_those_of_scikit_image():
    """structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1) of 0.26.0."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    frame = (0.5 + 0.4 * torch.sin(0.7 * x + 0.3 * y))[None, None]
    other = (0.5 + 0.35 * torch.sin(0.7 * x + 0.33 * y + 0.2))[None, None]
    assert psnr(frame, other).item() == pytest.approx(16.1737217, abs=1e-4)
    assert ssim(frame, other).item() == pytest.approx(0.8235073, abs=1e-6)


def test_equal_frames():
    frames = torch.rand(2, 3, 16, 16)
    assert psnr(frames, frames).tolist() == [100, 100]
    torch.testing.assert_close(ssim(frames, frames), torch.ones(2, dtype=torch.float64))


def test_each_frame_counts_for_itself():
    frames, others = torch.rand(2, 3, 3, 16, 16)
    for measure in (psnr, ssim):
        torch.testing.assert_close(measure(frames, others)[1:2], measure(frames[1:2], others[1:2]))


def test_what_cannot_be_compared():
    with pytest.raises(ShapeError, match="one shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ShapeError, match="11x11"):
        ssim(torch.zeros(1, 3, 16, 10), torch.zeros(1, 3, 16, 10))
