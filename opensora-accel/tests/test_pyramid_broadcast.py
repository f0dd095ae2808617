"""Pyramid broadcast: which attention is computed at which step, whose output is used again, and where it can't serve."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.core import Conditioning, ConfigError, build
from opensora.core.config.structure import ComponentConfig
from opensora.core.pipelines.train_spec import TrainSpec

STEPS = 20
WIDE = {"type": "pyramid-broadcast", "window": (0.0, 0.999)}  # all steps but the first, which is at noise itself


class Attention(nn.Module):
    """Counts its calls, and depends on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        self.inputs.append(x)
        return 0.1 * self.weight * x.tanh() + (0 if text is None else 0.1 * text)


class Block(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, Attention())

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for name, attention in self.named_children():
            x = x + attention(x, text=text) if name == "cross_attn" else x + attention(x)
        return x


class Joined(nn.Module):
    """Blocks as those of STDiT and STDiT2."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block("attn", "attn_temp", "cross_attn") for _ in range(2))

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.text_embedding is not None
        text, x = conditioning.text_embedding.mean((1, 2))[:, None, None, None, None], latents
        if conditioning.dropped is not None:
            text = torch.where(conditioning.dropped[:, None, None, None, None], -text, text)
        for block in self.modules():
            if isinstance(block, Block):
                x = block(x, text)
        return x - 2 * latents


class Apart(Joined):
    """Blocks as those of STDiT3."""

    def __init__(self) -> None:
        super().__init__()
        del self.blocks
        self.spatial_blocks = nn.ModuleList(Block("attn", "cross_attn") for _ in range(2))
        self.temporal_blocks = nn.ModuleList(Block("attn", "cross_attn") for _ in range(2))


class Guided:
    """Guidance as of opensora-schedulers: one call with both halves, or two."""

    def __init__(self, denoiser: Any, *, in_one_call: bool) -> None:
        self.denoiser, self.in_one_call, self.scale = denoiser, in_one_call, 2.0
        self.halves: dict[Conditioning, tuple[Conditioning, ...]] = {}

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning not in self.halves:
            null = conditioning.unconditional()
            both = Conditioning.cat([conditioning, null])
            self.halves[conditioning] = conditioning.replace(), null, both
        positive, null, both = self.halves[conditioning]
        if self.in_one_call:
            one, other = self.denoiser(torch.cat([latents, latents]), timestep.repeat(2), both).chunk(2)
        else:
            one, other = (self.denoiser(latents, timestep, each) for each in (positive, null))
        return other + self.scale * (one - other)


def world_of(toys: ModuleType, network: nn.Module, *hooks: dict[str, Any], in_one_call: bool = True) -> Any:
    world = toys.World.build(*hooks, network=network, num_sampling_steps=STEPS)
    world.guided = world.denoiser = Guided(network, in_one_call=in_one_call)
    return world


def calls(network: nn.Module) -> dict[str, list[int]]:
    """How often each attention module computed, by the name of its attribute."""
    found: dict[str, list[int]] = {}
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            axis = "temporal" if "temporal" in name and not name.endswith("cross_attn") else name.rpartition(".")[2]
            found.setdefault(axis, []).append(len(module.inputs))
    return found


def all_counts(network: nn.Module) -> set[int]:
    return {count for counts in calls(network).values() for count in counts}


@pytest.mark.parametrize(("kind", "temporal", "per_block"), [(Joined, "attn_temp", 1), (Apart, "temporal", 2)])
def test_each_kind_of_attention_is_computed_at_its_own_pace(
    toys: ModuleType, kind: type[nn.Module], temporal: str, per_block: int
) -> None:
    network = kind()
    world = world_of(toys, network, WIDE)
    world.start(range(3)).finish()
    inside = STEPS - 1  # steps at 2, 3, ... of 20: computed at 2, 4, 6, ...; 2, 6, 10, ...; 2, 8, 14, 20
    assert calls(network) == {
        "attn": [1 + -(-inside // 2)] * 2,
        temporal: [1 + -(-inside // 4)] * 2,
        "cross_attn": [1 + -(-inside // 6)] * 2 * per_block,
    }
    (report,) = world.hooks.sample_report(run=toys.Run(world=world, requests=[], starts=None))
    facts = report["pyramid_broadcast"]
    assert facts["attention_computed"] == {"spatial": 22, "temporal": 12, "cross": 10 * per_block}
    assert facts["attention_reused"] == {"spatial": 18, "temporal": 28, "cross": 30 * per_block}


def test_outputs_are_those_of_the_step_that_computed_them(toys: ModuleType) -> None:
    network, outputs = Joined(), []
    network.blocks[0].attn.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    world = world_of(toys, network, {**WIDE, "spatial_every": 3, "temporal_every": 1, "cross_every": 1})
    world.start([0]).finish()
    computed = [index for index in range(1, STEPS) if outputs[index] is not outputs[index - 1]]
    assert computed == [1, 4, 7, 10, 13, 16, 19]
    assert len(network.blocks[0].attn_temp.inputs) == STEPS


def test_outside_the_window_all_is_computed_and_nothing_changes(toys: ModuleType) -> None:
    expected = world_of(toys, Joined()).start(range(3)).finish()
    network = Joined()
    world = world_of(toys, network, {"type": "pyramid-broadcast", "window": (0.01, 0.02)})
    assert torch.equal(world.start(range(3)).finish(), expected)
    assert all_counts(network) == {STEPS}


def test_the_default_window_is_that_of_the_paper(toys: ModuleType) -> None:
    network = Joined()
    world_of(toys, network, {"type": "pyramid-broadcast"}).start([0]).finish()
    inside = 9  # 0.9, 0.85, ..., 0.5 of the way
    assert calls(network)["attn"] == [STEPS - inside // 2] * 2


def test_both_ways_of_guiding_give_the_same(toys: ModuleType) -> None:
    ends = [
        world_of(toys, Joined(), WIDE, in_one_call=in_one_call).start(range(3), [0.5, 1.0, 2.0]).finish()
        for in_one_call in (True, False)
    ]
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    full = world_of(toys, Joined()).start(range(3), [0.5, 1.0, 2.0]).finish()
    assert not torch.allclose(ends[0], full, rtol=1e-5, atol=1e-6)


def test_a_video_does_not_depend_on_its_batch(toys: ModuleType) -> None:
    world = world_of(toys, Joined(), WIDE)
    together = world.start(range(3), [0.5, 1.0, 2.0]).finish()
    for row, apart in enumerate([0.5, 1.0, 2.0]):
        alone = world.start([row], [apart]).finish()
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-6)


def test_forks_and_denoisings_in_turns_have_outputs_of_their_own(toys: ModuleType) -> None:
    world = world_of(toys, Joined(), WIDE)
    expected = world.start([0]).finish()
    one = world.start([0])
    for _ in range(7):
        next(one)
    fork, other = one.fork(), world.start([1])
    for _ in range(13):
        next(other), next(one), next(fork)
    assert torch.equal(one.latents, expected)
    assert torch.isfinite(fork.latents).all()


def test_a_fork_computes_anew_first(toys: ModuleType) -> None:
    network = Joined()
    world = world_of(toys, network, WIDE)
    denoising = world.start([0])
    for _ in range(4):
        next(denoising)
    before = calls(network)
    next(denoising.fork())
    assert calls(network) == {name: [count + 1 for count in counts] for name, counts in before.items()}


def test_when_other_frames_are_given_attention_is_computed_anew(toys: ModuleType) -> None:
    network = Joined()
    world = world_of(toys, network, {**WIDE, "spatial_every": 100, "temporal_every": 100, "cross_every": 100})
    world.start([0], frame_mask=torch.tensor([[1.0, 1.0, 0.5]])).finish()
    assert all_counts(network) == {1 + 1 + 1}  # at noise, then once, and once more from the join on


def test_nothing_of_it_is_in_the_state_dict(toys: ModuleType) -> None:
    plain, network = Joined(), Joined()
    world_of(toys, network, WIDE).start([0]).finish()
    assert list(network.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in network.named_modules()] == [name for name, _ in plain.named_modules()]


def test_a_compiled_denoiser_works(toys: ModuleType) -> None:
    expected = world_of(toys, Joined(), WIDE).start(range(2)).finish()
    network = Joined()
    world = world_of(toys, network, WIDE)
    world.guided.denoiser = torch.compile(network, backend="eager")
    torch.testing.assert_close(world.start(range(2)).finish(), expected)
    assert calls(network)["cross_attn"] == [5, 5]


def test_that_nothing_was_reused_is_said(toys: ModuleType, caplog: Any) -> None:
    for window, warnings in [((0.01, 0.02), 1), ((0.0, 1.0), 0)]:
        world = world_of(toys, Joined(), {"type": "pyramid-broadcast", "window": window})
        world.start([0]).finish()
        caplog.clear()
        world.hooks.sample_end(run=None)
        assert len([each for each in caplog.records if each.levelno == logging.WARNING]) == warnings
        assert ("nothing was reused" in caplog.text) == bool(warnings)


# ---- where it can't serve


def test_a_denoiser_without_such_attention_is_refused_with_what_it_has(toys: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"needs a denoiser with attention in space.*Sequential has not.*parts: 0, 1"):
        toys.World.build(WIDE, network=nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(ConfigError, match=r"Mixture has not.*parts: none"):
        toys.World.build(WIDE)
    only_spatial = Joined()
    only_spatial.blocks = nn.ModuleList([Block("attn")])
    with pytest.raises(ConfigError, match="Joined has not"):
        toys.World.build(WIDE, network=only_spatial)


def test_noise_training_and_a_second_cache_are_refused(toys: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"pyramid-broadcast.*adds fresh noise"):
        toys.World.build(WIDE, network=Joined(), eta=1.0)
    world = world_of(toys, Joined(), WIDE)
    with pytest.raises(ConfigError, match="adds fresh noise"):
        next(world.start([0], scheduler=toys.Flow(toys.FlowSpec(eta=0.5))))
    toy = ComponentConfig("toy")
    with pytest.raises(ConfigError, match="training has none"):
        build("hooks", WIDE).denoiser_built(Joined(), TrainSpec(model=toy, scheduler=toy, dataset=toy))
    with pytest.raises(ConfigError, match='"pyramid-broadcast" and "step-cache" can\'t take part'):
        toys.World.build(WIDE, {"type": "step-cache"}, network=Joined())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (0.9, 0.5)}, r"window is \(0.9, 0.5\)"),
        ({"window": (0.5, 1.5)}, "two rising shares"),
        ({"spatial_every": 0}, "spatial_every"),
        ({"spatial_every": 1, "temporal_every": 1, "cross_every": 1}, "Nothing would be reused"),
        ({"evry": 2}, "evry is not a field"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("hooks", {"type": "pyramid-broadcast", **options})
