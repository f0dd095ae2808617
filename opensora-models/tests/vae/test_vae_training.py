"""Training of autoencoders: which losses, which frames, which parameters; whole runs are in the tests across packages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attrs import evolve
from diffusers import AutoencoderKL

from opensora.core import ConfigError, ShapeError, WeightsError
from opensora.core.accelerator import Single, SingleSpec
from opensora.core.config.structure import structure
from opensora.core.loading import Batch
from opensora.core.orders import Slicing
from opensora.core.pipelines.loop import Counters
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.models.vae.lpips import LPIPS
from opensora.models.vae.training import train
from opensora.models.vae.training.learner import VAELearner, choose_length
from opensora.models.vae.training.run import TrainVAERun
from opensora.models.vae.training.specs import TrainVAESpec

STAGES = {
    "stage 1": {
        "use_z_rec_loss": True,
        "use_image_identity_loss": True,
        "mixed_strategy": "mixed_video_image",
        "mixed_image_ratio": 0.2,
    },
    "stage 2": {"use_z_rec_loss": True, "mixed_strategy": "mixed_video_image", "mixed_image_ratio": 0.2},
    "stage 3": {"use_real_rec_loss": True, "mixed_strategy": "mixed_video_random"},
}
DISCRIMINATORS = {
    "2d": {"type": "NLayerDiscriminator", "ndf": 4, "n_layers": 1},
    "3d": {"type": "N_Layer_DISCRIMINATOR_3D", "ndf": 4, "n_layers": 1},
    "style-gan": {
        "type": "DISCRIMINATOR_3D",
        "image_size": (16, 16),
        "num_frames": 5,
        "filters": 4,
        "channel_multipliers": (1, 2),
        "num_groups": 2,
    },
}


@pytest.fixture(scope="module")
def image_vae(tmp_path_factory) -> str:
    """The folder of a small image autoencoder with random weights."""
    folder = tmp_path_factory.mktemp("image-vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_spec(image_vae):
    """Builds a spec of a stage; ``frozen`` keeps the image autoencoder as it is."""

    def make(stage="stage 1", *, frozen=None, temporal=None, **options):
        vae_temporal = {"type": "VAE_Temporal_SD", "filters": 4, "num_res_blocks": 1, "num_groups": 2}
        values = {
            "model": {
                "type": "VideoAutoencoderPipeline",
                "freeze_vae_2d": stage == "stage 1" if frozen is None else frozen,
                "cal_loss": True,
                "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": image_vae},
                "vae_temporal": {**vae_temporal, **(temporal or {})},
            },
            "dataset": {"type": "VideoTextDataset", "data_path": "clips.csv"},
            "perceptual_loss_weight": 0.0,
            "batch_size": 2,
            **STAGES[stage],
            **options,
        }
        return structure(TrainVAESpec, values)

    return make


def learner_of(spec) -> VAELearner:
    torch.manual_seed(0)
    return train.build_learner(spec)


def video_of(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draws_of(batch):
    return SampleDraws([SampleKey(1, index) for index in range(batch)])


# ---- which frames


def lengths(spec, num_frames=9, steps=400):
    return [choose_length(spec, num_frames, step=step) for step in range(steps)]


def test_mixed_images_are_a_share_of_the_steps(make_spec):
    found = lengths(make_spec("stage 1"))
    assert set(found) == {1, 9}
    assert 0.14 < found.count(1) / len(found) < 0.26


def test_random_lengths_are_all_equally_likely(make_spec):
    found = lengths(make_spec("stage 3"), steps=900)
    assert set(found) == set(range(1, 10))
    assert all(60 < found.count(length) < 150 for length in range(1, 10))


def test_lengths_are_a_function_of_seed_and_step(make_spec):
    spec = make_spec("stage 3")
    assert lengths(spec) == lengths(make_spec("stage 3"))
    assert lengths(spec) != lengths(make_spec("stage 3", seed=7))
    assert set(lengths(make_spec("stage 3", mixed_strategy=None))) == {9}


# ---- which losses and parameters


def test_stage_1_trains_the_temporal_part_alone(make_spec):
    learner = learner_of(make_spec("stage 1"))
    trained = {name for name, each in learner.named_parameters() if each.requires_grad}
    assert trained == {f"vae.temporal_vae.{name}" for name, _ in learner.vae.temporal_vae.named_parameters()}
    learned = learner(video_of(2, 3, 5, 16, 16), draws_of(2))
    assert list(learned.terms) == ["z_nll_loss"]
    assert learned.x_rec is None
    learned.loss.mean().backward()
    assert all((each.grad is not None) == each.requires_grad for each in learner.parameters())


def test_stage_1_compares_latents_of_single_images(make_spec):
    learner = learner_of(make_spec("stage 1"))
    video, draws = video_of(2, 3, 1, 16, 16), draws_of(2)
    learned = learner(video, draws)
    assert list(learned.terms) == ["z_nll_loss", "image_identity_loss"]
    rebuilt = learner.vae.reconstruct(video, draws=draws, pixels=False)
    torch.testing.assert_close(
        learned.terms["image_identity_loss"], (rebuilt.x_z - rebuilt.z).abs().sum((1, 2, 3, 4)), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(learned.loss, sum(learned.terms.values()))


def test_stage_2_trains_what_latents_depend_on(make_spec):
    learner = learner_of(make_spec("stage 2"))
    learner(video_of(1, 3, 5, 16, 16), draws_of(1)).loss.mean().backward()
    untrained = {name for name, each in learner.named_parameters() if not each.requires_grad}
    assert untrained == {"losses.logvar"} | {
        f"vae.spatial_vae.module.{name}"
        for name, _ in learner.vae.spatial_vae.module.named_parameters()
        if name.startswith(("decoder.", "post_quant_conv."))
    }
    assert all((each.grad is not None) == each.requires_grad for each in learner.parameters())


def test_the_target_of_latents_brings_no_gradient(make_spec):
    """Otherwise the image autoencoder would make its latents easy to rebuild."""
    learner = learner_of(make_spec("stage 2"))
    video, draws = video_of(1, 3, 5, 16, 16), draws_of(1)
    weight = learner.vae.spatial_vae.module.encoder.conv_in.weight
    (found,) = torch.autograd.grad(learner(video, draws).loss.mean(), weight)
    result = learner.vae.reconstruct(video, draws=draws, pixels=False)
    expected = (result.x_z.detach() - result.x_z_rec).abs().sum() / 5
    torch.testing.assert_close(found, torch.autograd.grad(expected, weight)[0], rtol=1e-4, atol=1e-5)


def test_stage_3_trains_all_of_it_on_pixels(make_spec):
    learner = learner_of(make_spec("stage 3", kl_loss_weight=0.01))
    video, draws = video_of(2, 3, 3, 16, 16), draws_of(2)
    learned = learner(video, draws)
    assert list(learned.terms) == ["nll_loss", "kl_loss"]
    result = learner.vae.reconstruct(video, draws=draws)
    torch.testing.assert_close(
        learned.loss, (video - result.x_rec).abs().sum((1, 2, 3, 4)) / 3 + 0.01 * result.posterior.kl()
    )
    learned.loss.mean().backward()
    assert all((each.grad is not None) == each.requires_grad for each in learner.parameters())


def test_lpips_joins_where_pixels_are_compared(make_spec):
    spec = make_spec("stage 3", perceptual_loss_weight=1.0)
    torch.manual_seed(0)
    with_lpips = train.build_learner(spec, lpips=LPIPS())
    plain = learner_of(evolve(spec, perceptual_loss_weight=0.0))
    video, draws = video_of(1, 3, 2, 16, 16), draws_of(1)
    assert with_lpips(video, draws).loss > plain(video, draws).loss
    assert not any(each.requires_grad for each in with_lpips.losses.parameters())


@pytest.mark.parametrize(("stage", "is_needed"), [("stage 1", False), ("stage 2", False), ("stage 3", True)])
def test_lpips_is_only_loaded_where_pixels_are_compared(stage, is_needed, make_spec, tmp_path):
    spec = make_spec(stage, perceptual_loss_weight=0.1, perceptual_weights=str(tmp_path))
    if is_needed:
        with pytest.raises(WeightsError, match="perceptual_weights"):
            train.build_lpips(spec)
    else:
        assert train.build_lpips(spec) is None


def test_logvar_is_learned_if_asked_for(make_spec):
    learner = learner_of(make_spec("stage 3", learn_logvar=True, logvar_init=0.5))
    learner(video_of(1, 3, 1, 16, 16), draws_of(1)).loss.mean().backward()
    assert learner.losses.logvar.item() == 0.5
    assert learner.losses.logvar.grad != 0


def test_checkpointing_changes_no_gradient(make_spec):
    from opensora.core.composing import checkpoint_activations

    spec = make_spec("stage 3")
    plain, saving = learner_of(spec), learner_of(spec)
    assert checkpoint_activations(saving.vae) > 10
    for learner in (plain, saving):
        learner(video_of(1, 3, 3, 16, 16), draws_of(1)).loss.mean().backward()
    for ours, theirs in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


# ---- the discriminator


@pytest.fixture
def make_run(make_spec):
    """Builds a run that is fed by hand."""

    def make(stage="stage 3", **options):
        spec = make_spec(stage, lr=1e-3, **options)
        accelerator = Single(SingleSpec(), device="cpu", dtype="fp32")
        learner = learner_of(spec)
        size = (5, 16, 16)
        parameters = [each for each in learner.parameters() if each.requires_grad]
        return TrainVAERun(
            spec=spec,
            folder=Path(),
            accelerator=accelerator,
            module=learner.vae,
            learner=learner,
            learn=accelerator.prepare(learner),
            last_layer=learner.vae.temporal_last_layer,
            adversary=train.build_adversary(spec, accelerator, size, load_pretrained=True),
            parameters=parameters,
            optimizer=torch.optim.AdamW(parameters, lr=1e-3),
            dataset=None,
            order=None,
            slicing=Slicing(batch_size=2),
            clip_size=size,
            unreadable=None,
            max_steps=10,
            hooks=None,
            stop=None,
        )

    return make


def batch_of(size):
    keys = [SampleKey(1, index) for index in range(size)]
    failed = [(SampleKey(1, index), "broken") for index in range(size, 2)]
    video = video_of(size, 3, 5, 16, 16) if size else torch.empty(0)
    return Batch(video=video, texts=[""] * size, conditioning=None, keys=keys, paths=[""] * size, failed=failed)


def step(run, batch=None):
    loss = run.loss(batch_of(2) if batch is None else batch)
    run.accelerator.backward(loss)
    norm = run.step_optimizer(1e-3)
    noted = {name: values[0].item() for name, values in run.noted.items()}
    run.noted.clear()
    run.counters.step += 1
    return norm, noted


@pytest.mark.parametrize("mixed", [None, "mixed_video_random"])
@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_each_discriminator_trains_and_is_trained(kind, mixed, make_run):
    run = make_run(
        discriminator=DISCRIMINATORS[kind],
        discriminator_start=0,
        lecam_loss_weight=0.1,
        gradient_penalty_loss_weight=0.1,
        mixed_strategy=mixed,
    )
    before = [each.detach().clone() for each in run.adversary.discriminator.parameters()]
    for _ in range(3):
        norm, noted = step(run)
        assert norm > 0
        assert {"nll_loss", "kl_loss", "adversarial_loss", "disc_loss"} == set(noted)
    changed = [not torch.equal(*pair) for pair in zip(before, run.adversary.discriminator.parameters(), strict=True)]
    assert all(changed)
    assert run.adversary.lecam.real != 0
    assert all(each.grad is None for each in run.adversary.discriminator.parameters())


def test_the_autoencoders_step_leaves_the_discriminator_alone(make_run):
    run = make_run(discriminator=DISCRIMINATORS["2d"])
    run.accelerator.backward(run.loss(batch_of(2)))
    assert all(each.grad is None and each.requires_grad for each in run.adversary.discriminator.parameters())


def test_the_discriminator_learns_from_its_start_on(make_run):
    run = make_run(discriminator=DISCRIMINATORS["2d"], discriminator_start=2)
    assert [sorted(step(run)[1]) for _ in range(3)] == [
        ["kl_loss", "nll_loss"],
        ["kl_loss", "nll_loss"],
        ["adversarial_loss", "disc_loss", "kl_loss", "nll_loss"],
    ]


def test_latents_can_be_trained_against_a_discriminator(make_run):
    norm, noted = step(
        make_run("stage 2", discriminator=DISCRIMINATORS["2d"], mixed_strategy=None, mixed_image_ratio=0)
    )
    assert norm > 0
    assert set(noted) == {"z_nll_loss", "adversarial_loss", "disc_loss"}


def test_unreadable_clips_count_as_zero(make_run):
    run = make_run(mixed_strategy=None)
    assert run.loss(batch_of(1)).item() == pytest.approx(
        run.learn(video_of(1, 3, 5, 16, 16), draws_of(1)).loss.item() / 2
    )
    run = make_run(mixed_strategy=None, discriminator=DISCRIMINATORS["2d"])
    norm, noted = step(run, batch_of(0))
    assert norm == 0
    assert set(noted.values()) == {0.0}


def test_a_step_without_finite_gradients_is_left_out(make_run):
    run = make_run(discriminator=DISCRIMINATORS["2d"], mixed_strategy=None)
    run.accelerator.backward(run.loss(batch_of(2)))
    run.rebuilt[0].x_rec.fill_(float("nan"))
    before = [each.detach().clone() for each in run.adversary.discriminator.parameters()]
    norm = run.step_optimizer(1e-3)
    assert norm != norm  # NaN
    assert all(torch.equal(*pair) for pair in zip(before, run.adversary.discriminator.parameters(), strict=True))


def test_a_checkpoint_restores_both_sides(make_run):
    from opensora.core.errors import CheckpointError

    options = {"discriminator": DISCRIMINATORS["2d"], "lecam_loss_weight": 0.1, "learn_logvar": True}
    run, other = make_run(**options), make_run(**options, seed=5)
    step(run)
    counters = other.restore(run.checkpoint())
    assert counters == Counters(step=1)
    other.counters.step = run.counters.step
    assert other.learner.losses.logvar == run.learner.losses.logvar != 0
    other.spec = run.spec
    assert step(run) == step(other)
    with pytest.raises(CheckpointError, match="this config has none"):
        make_run().restore(run.checkpoint())


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_z_rec_loss": False, "use_image_identity_loss": False}, "nothing to learn"),
        ({"mixed_strategy": None}, "mixed_image_ratio"),
        ({"num_frames": 17}, "dataset.num_frames is None"),
        ({"image_size": (8, 8)}, "dataset.image_size"),
        ({"generator_loss_type": "vanilla"}, "vanilla"),
        ({"mixed_strategy": "mixed_videos"}, "mixed_video_image"),
        ({"discriminator_starts": 5}, "discriminator_start"),
    ],
)
def test_mistakes_in_configs(options, words, make_spec):
    with pytest.raises(ConfigError, match=words):
        make_spec(**options)


def test_identity_needs_equal_channels(make_spec):
    with pytest.raises(ConfigError, match=r"4 channels, and vae_temporal\.embed_dim is 8"):
        learner_of(make_spec(temporal={"embed_dim": 8}))


def test_an_image_autoencoder_alone_is_refused(make_spec, image_vae):
    spec = make_spec()
    other = type(spec.model)("VideoAutoencoderKL", {"from_pretrained": image_vae})
    with pytest.raises(ConfigError, match="Use VideoAutoencoderPipeline"):
        learner_of(evolve(spec, model=other))


def test_a_discriminator_that_cannot_judge_the_clips_is_refused(make_spec):
    spec = make_spec("stage 3", discriminator={"type": "NLayerDiscriminator"})
    with pytest.raises(ShapeError, match="at least 24x24"):
        train.build_discriminator(spec, (5, 16, 16))
