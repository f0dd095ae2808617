"""What is measured of reconstructions; whole runs are in the tests across packages."""

from __future__ import annotations

import pytest
import torch

from opensora.core import ConfigError
from opensora.core.accelerator import Single, SingleSpec
from opensora.core.config.structure import structure
from opensora.core.orders import Place, Slicing
from opensora.core.similarity import psnr, ssim
from opensora.models.vae.posterior import Posterior
from opensora.models.vae.training import measures as measuring
from opensora.models.vae.training.measures import ChannelStatistics, Measures, Rebuilt, choose_lpips
from opensora.models.vae.training.reconstruct import OnePass
from opensora.models.vae.training.specs import SampleVAESpec


def spec_of(**options):
    values = {"model": {"type": "identity"}, "dataset": {"type": "VideoTextDataset", "num_frames": 5}, **options}
    return structure(SampleVAESpec, values)


def video_of(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_equal_videos():
    video = video_of(2, 3, 4, 16, 16)
    found = list(Measures.of(spec_of(), None).of_each(video, Rebuilt(video=video, latents=video)))
    assert [each["psnr"] for each in found] == [100, 100]
    assert [each["ssim"] for each in found] == pytest.approx([1, 1])
    assert [each["nll_loss"] for each in found] == [0, 0]


def test_measures_are_means_over_frames_in_256_shades(procedural_lpips):
    video, other = video_of(2, 3, 3, 16, 16), video_of(2, 3, 3, 16, 16, seed=1) * 1.2
    measures = Measures.of(spec_of(perceptual_loss_weight=0.5, kl_loss_weight=0.1), procedural_lpips)
    posterior = Posterior(video_of(2, 4, 1, 2, 2), video_of(2, 4, 1, 2, 2))
    rebuilt = Rebuilt(video=other, latents=posterior.mean, posterior=posterior, of_image_vae=video)
    found = list(measures.of_each(video, rebuilt))[1]
    frames, others = (((each[1].clamp(-1, 1) + 1) * 127.5).round().transpose(0, 1) / 255 for each in (video, other))
    distance = procedural_lpips(frames * 2 - 1, others * 2 - 1).mean().item()
    assert found["psnr"] == pytest.approx(psnr(frames, others).mean().item())
    assert found["ssim"] == pytest.approx(ssim(frames, others).mean().item())
    assert found["lpips"] == pytest.approx(distance, rel=1e-4)
    assert found["psnr_of_image_vae"] == 100
    assert found["kl_loss"] == pytest.approx(0.1 * posterior.kl()[1].item(), rel=1e-5)
    assert found["nll_loss"] > (video - other)[1].abs().sum().item() / 3
    assert str(measures).startswith("Means: psnr ")


def test_frames_too_small_for_ssim_have_none():
    video = video_of(1, 3, 2, 8, 8)
    (found,) = Measures.of(spec_of(), None).of_each(video, Rebuilt(video=video, latents=video))
    assert set(found) == {"psnr", "nll_loss"}


def test_lpips_in_pieces_is_lpips(procedural_lpips):
    frames, others = video_of(19, 3, 16, 16), video_of(19, 3, 16, 16, seed=1)
    torch.testing.assert_close(
        measuring.in_pieces(procedural_lpips)(frames, others), procedural_lpips(frames, others), rtol=1e-4, atol=1e-6
    )


def test_statistics_are_those_of_all_latents_at_once():
    latents = torch.randn(6, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    statistics = ChannelStatistics()
    for part in latents.split(4):
        statistics.add(part)
    flat = latents.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(statistics.mean, flat.mean(1))
    torch.testing.assert_close(statistics.std, flat.std(1, correction=0))
    whole = statistics.over_processes(Single(SingleSpec(), device="cpu"))
    assert whole.as_dict() == statistics.as_dict()
    assert statistics.as_dict()["numbers_a_channel"] == 6 * 2 * 3 * 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_clip_comes_once_in_the_datasets_order(world_size):
    order = OnePass(8, 5)
    parts = [
        list(order.iter_micro_batches(Slicing(batch_size=3, world_size=world_size, rank=rank), Place()))
        for rank in range(world_size)
    ]
    keys = [key for part in parts for batch in part for key in batch]
    assert sorted(key.index for key in keys) == list(range(8))
    assert {(key.seed, key.epoch) for key in keys} == {(5, 0)}
    if world_size == 1:
        assert [key.index for key in keys] == list(range(8))


def test_lpips_is_left_out_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert choose_lpips(None, (5, 8, 32))[1] == "8x32 is too small for it"
    assert "download" in choose_lpips(None, (5, 32, 32))[1]


def test_lpips_is_used_where_there_are_weights(procedural_lpips, tmp_path):
    torch.save(procedural_lpips.state_dict(), tmp_path / "all.pt")
    lpips, reason = choose_lpips(str(tmp_path), (5, 32, 32))
    assert lpips is not None
    assert not reason


def test_sizes_at_top_level_must_be_those_of_the_dataset():
    assert spec_of(num_frames=5).num_frames == 5
    with pytest.raises(ConfigError, match=r"num_frames is 17 at top level, but dataset.num_frames is 5"):
        spec_of(num_frames=17)
