"""Rectified flow against the reference vectors."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.schedulers.rectified_flow import (
    RectifiedFlow,
    RectifiedFlowSpec,
    published_latent_frames,
    shift_for_size,
    shift_timestep,
)


def told(vectors, size=None, y="y"):
    text = vectors[y].squeeze(1)
    sizes = {} if size is None else dict(zip(("height", "width", "num_frames"), size, strict=True))
    return Conditioning(
        text_embedding=text, **{name: torch.full((len(text),), float(value)) for name, value in sizes.items()}
    )


@pytest.mark.goldens("rflow_losses")
def test_loss(goldens, replay, toy, case):
    vectors = goldens.case("rflow_losses", case["name"])
    denoiser = toy()
    conditioning = told(vectors, case.get("size")).replace(frame_mask=vectors.get("mask"))
    drawn = vectors.get("draw")
    if case.get("draw") == "normal":
        drawn = drawn[:, None]
    draws = replay({"noise": vectors["noise"]} | ({"timestep": drawn} if drawn is not None else {}))

    loss = RectifiedFlow(RectifiedFlowSpec(**case["cfg"])).loss(
        denoiser, vectors["x_start"], conditioning, draws=draws, timestep=vectors.get("t")
    )

    if "weights" in vectors:  # a weighted loss is the product: it is given by sample
        loss = loss * vectors["weights"][vectors["draw"]]
    [(noised, timestep, frame_mask)] = denoiser.calls
    assert_close(timestep, vectors["model_t"], rtol=1e-4, atol=1e-4, check_dtype=False)
    assert_close(noised, vectors["x_t"], rtol=1e-4, atol=1e-4)
    assert frame_mask is vectors.get("mask")
    assert_close(loss, vectors["out.loss"], rtol=1e-4, atol=1e-4)


@pytest.mark.goldens("rflow_sample")
def test_sample(goldens, replay, toy, case):
    vectors = goldens.case("rflow_sample", case["name"])
    batch = len(vectors["z"])
    options = case["cfg"] | ({"cfg_scale": case["guidance_scale"]} if "guidance_scale" in case else {})
    denoiser = toy(vectors["y_null"].squeeze(1))
    draws = replay({f"join {step}": noise for step, noise in enumerate(vectors.get("noise", []))})

    scheduler = RectifiedFlow(RectifiedFlowSpec(**options))
    states = list(
        scheduler.sample(
            scheduler.guide(denoiser),
            vectors["z"],
            told(vectors, case.get("size")),
            draws=draws,
            frame_mask=vectors.get("mask"),
        )
    )

    seen = [torch.stack([call[i] for call in denoiser.calls]) for i in (0, 1)]
    assert_close(seen[1], vectors["model_t"].float(), rtol=1e-3, atol=1e-4)
    assert_close(seen[0][:, :batch], vectors["model_x"], rtol=1e-3, atol=1e-4)
    assert torch.equal(seen[0][:, :batch], seen[0][:, batch:])
    assert_close(states[-1].latents, vectors["final"], rtol=1e-3, atol=1e-4)
    if "x_mask" in vectors:
        assert torch.equal(torch.stack([frame_mask for _, _, frame_mask in denoiser.calls]), vectors["x_mask"])


def shifted(row, **changes):
    row = row | changes
    shift = shift_for_size(
        torch.tensor([float(row["height"] * row["width"])]),
        published_latent_frames(torch.tensor([float(row["num_frames"])])),
    )
    timestep = torch.tensor([row["t"]], dtype=torch.float64)
    return shift_timestep(timestep, shift * row["scale"], num_timesteps=row["num_timesteps"]).item()


def test_timestep_transform(goldens):
    rows = goldens.json("timestep_transform")["rows"]
    whole_chunks = [row for row in rows if row["num_frames"] == 1 or row["num_frames"] >= 17]
    assert len(whole_chunks) > 80
    for row in whole_chunks:
        assert shifted(row) == pytest.approx(row["result"], rel=2e-4, abs=1e-9), row


def test_timestep_transform_treats_a_clip_below_one_chunk_as_an_image(goldens):
    short = [row for row in goldens.json("timestep_transform")["rows"] if 1 < row["num_frames"] < 17]
    assert short
    for row in short:  # the reference sends them all to 0, or to no number at all
        assert shifted(row) == shifted(row, num_frames=1)


def test_timestep_transform_decides_for_each_sample_of_a_mixed_batch(goldens):
    size = {"height": 240, "width": 426, "t": 500, "scale": 1.0, "num_timesteps": 1000}
    # The reference lets the first sample decide for all. Right are an image after an image, and videos after a video.
    image, *_ = goldens.json("timestep_transform")["mixed_batch"][0]["result"]
    video, _, long_video = goldens.json("timestep_transform")["mixed_batch"][1]["result"]
    frames = published_latent_frames(torch.tensor([51.0, 1.0, 102.0]))
    result = shift_timestep(torch.full((3,), 500.0), shift_for_size(torch.full((3,), 240.0 * 426.0), frames))
    assert_close(result, torch.tensor([video, image, long_video]), rtol=2e-4, atol=0)
    assert shifted(size, num_frames=1) == pytest.approx(image, rel=2e-4)


@pytest.mark.parametrize("name", ["loc=0.0,scale=1.0", "loc=0.5,scale=1.5"])
def test_logit_normal(goldens, replay, name):
    vectors = goldens.json("logit_normal")
    loc, scale = (float(part.split("=")[1]) for part in name.split(","))
    normal = torch.randn(vectors["samples"], generator=torch.Generator().manual_seed(0))
    scheduler = RectifiedFlow(RectifiedFlowSpec(sample_method="logit-normal", loc=loc, scale=scale))

    u = scheduler.draw_timestep(replay({"timestep": normal[:, None]}), Conditioning()) / 1000

    expected = vectors["cases"][name]
    assert u.mean().item() == pytest.approx(expected["mean"], abs=vectors["tolerance"])
    for level, value in expected["quantiles"].items():
        position = round(float(level) * len(u))
        assert u.kthvalue(position).values.item() == pytest.approx(value, abs=vectors["tolerance"])
