"""The conformance kit passes what conforms, and says of what doesn't which promise is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.core import ComponentError, components
from opensora.core.machine import probe_dtype
from opensora.core.testing import Report, check, check_denoiser, check_scheduler, check_text_encoder, check_vae

DENOISERS = '''
import torch
from attrs import frozen
from torch import nn

@frozen(kw_only=True)
class Spec:
    width: int = 8

class Good(nn.Module):
    """Told everything; small."""

    Spec = Spec
    condition_dropout = 0.1

    def __init__(self, spec, *, latent_channels, text_width):
        super().__init__()
        self.width = spec.width
        self.before = nn.Conv3d(latent_channels, spec.width, 1)
        self.after = nn.Conv3d(spec.width, latent_channels, 1)
        self.time = nn.Linear(1, spec.width)
        if text_width is None:
            self.labels = nn.Embedding(4, spec.width)
        else:
            self.text = nn.Linear(text_width, spec.width)
        self.null = nn.Parameter(torch.zeros(spec.width))

    def told(self, conditioning):
        if conditioning.labels is not None:
            told = self.labels(conditioning.labels)
        else:
            told = self.text((conditioning.text_embedding * conditioning.text_mask[..., None]).mean(1))
        if conditioning.dropped is not None:
            told = torch.where(conditioning.dropped[:, None], self.null, told)
        return told

    def hidden(self, latents, timestep, conditioning):
        shift = self.time(timestep[:, None] / 1000) + self.told(conditioning)
        return self.before(latents) + shift[:, :, None, None, None]

    def forward(self, latents, timestep, conditioning):
        return self.after(nn.functional.silu(self.hidden(latents, timestep, conditioning)))

class Dropout(Good):
    def forward(self, latents, timestep, conditioning):
        hidden = nn.functional.dropout(self.hidden(latents, timestep, conditioning), 0.5, self.training)
        return self.after(hidden)

class TwoHalves(Good):
    def forward(self, *arguments):
        prediction = super().forward(*arguments)
        return torch.cat([prediction, prediction], 1)

class IgnoresDropped(Good):
    def told(self, conditioning):
        return super().told(conditioning.replace(dropped=None)) + 0 * self.null

class DropsNothing(Good):
    def told(self, conditioning):
        return super().told(conditioning.unconditional()) + 0 * (self.text.weight.sum() + self.text.bias.sum())

class BatchNorm(Good):
    def __init__(self, spec, **keywords):
        super().__init__(spec, **keywords)
        self.norm = nn.BatchNorm3d(spec.width)

    def hidden(self, *arguments):
        return self.norm(super().hidden(*arguments))

class BatchMean(Good):
    def forward(self, latents, timestep, conditioning):
        return super().forward(latents - latents.mean(0), timestep, conditioning)

class Dead(Good):
    def __init__(self, spec, **keywords):
        super().__init__(spec, **keywords)
        self.forgotten = nn.Parameter(torch.ones(3))

class WrongShape(Good):
    def forward(self, *arguments):
        return super().forward(*arguments)[..., :-1]

class WrongDtype(Good):
    def forward(self, *arguments):
        return super().forward(*arguments).double()

class NotFinite(Good):
    def forward(self, *arguments):
        return super().forward(*arguments) / 0

class Random(Good):
    def forward(self, *arguments):
        return super().forward(*arguments) + torch.randn(())

class Raises(Good):
    def forward(self, *arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

class NoFrameMask(Good):
    def forward(self, latents, timestep, conditioning):
        assert conditioning.frame_mask is None, "no frame masks here"
        return super().forward(latents, timestep, conditioning)

class RealDevice(Good):
    def __init__(self, spec, **keywords):
        super().__init__(spec, **keywords)
        self.table = nn.Parameter(torch.zeros(3, device="cpu"))

class HiddenState(Good):
    def __init__(self, spec, **keywords):
        super().__init__(spec, **keywords)
        self.register_buffer("secret", torch.randn(1), persistent=False)

    def forward(self, *arguments):
        return super().forward(*arguments) + self.secret

class NoModule:
    Spec = Spec

    def __init__(self, spec): ...
'''

VAES = """
import torch
from attrs import frozen
from torch import nn

@frozen(kw_only=True)
class Spec:
    scale: float = 2.0

class Good(nn.Module):
    Spec = Spec
    latent_channels = 3

    def __init__(self, spec):
        super().__init__()
        self.scale = spec.scale

    def latent_size(self, size):
        frames, height, width = size
        return frames, height // 2, width // 2

    def encode(self, video, *, draws=None):
        latents = video[..., ::2, ::2] * self.scale
        return latents if draws is None else latents + 0.1 * draws.normal("posterior", latents.shape[1:])

    def decode(self, latents, *, num_frames):
        return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)[:, :, :num_frames] / self.scale

class WrongSize(Good):
    def latent_size(self, size):
        return size

class GlobalNoise(Good):
    def encode(self, video, *, draws=None):
        return super().encode(video) + torch.randn(())

class BatchMean(Good):
    def encode(self, video, *, draws=None):
        return super().encode(video - video.mean(0), draws=draws)

class TooManyFrames(Good):
    def decode(self, latents, *, num_frames):
        return super().decode(torch.cat([latents, latents], 2), num_frames=num_frames + 1)

class Raises(Good):
    def encode(self, video, *, draws=None):
        raise ValueError("no such size")

class MixesDecoded(Good):
    def decode(self, latents, *, num_frames):
        return super().decode(latents - latents.mean(0), num_frames=num_frames)

class Gained(Good):
    def __init__(self, spec):
        super().__init__(spec)
        self.gain = nn.Parameter(torch.randn(3, 1, 1, 1))

    def encode(self, video, *, draws=None):
        return super().encode(video.to(self.gain.dtype) * self.gain, draws=draws).float()

class OwnDtype(Gained):
    def encode(self, video, *, draws=None):
        return Good.encode(self, video.to(self.gain.dtype) * self.gain, draws=draws)

class NeedsFloat32(Gained):
    def encode(self, video, *, draws=None):
        large = (1000 + self.gain) - 1000
        return Good.encode(self, video * large, draws=draws).float()

class ReadsAnyway(Gained):
    def __init__(self, spec, *, meta=False):
        super().__init__(spec)
        self.gain = nn.Parameter(torch.ones(3, 1, 1, 1, device="cpu"))

class OtherShapes(Gained):
    def __init__(self, spec, *, meta=False):
        super().__init__(spec)
        if meta:
            self.gain = nn.Parameter(torch.ones(2, 1, 1, 1))

class GoesOnLearning(Gained):
    def encode(self, video, *, draws=None):
        self.gain.requires_grad_(True)
        return super().encode(video, draws=draws).detach()

class GoesOnTraining(Gained):
    def encode(self, video, *, draws=None):
        self.train()
        return super().encode(video, draws=draws)

class HiddenState(Gained):
    def __init__(self, spec):
        super().__init__(spec)
        self.register_buffer("secret", torch.randn(1), persistent=False)

    def encode(self, video, *, draws=None):
        return super().encode(video, draws=draws) + self.secret
"""

ENCODERS = '''
import torch
from attrs import frozen
from opensora.core import Conditioning
from torch import nn

@frozen(kw_only=True)
class Spec:
    width: int = 4

class Good:
    Spec = Spec
    max_length = 5

    def __init__(self, spec):
        self.width = spec.width

    def encode(self, prompts):
        lengths = torch.tensor([[1 + len(prompt.split())] for prompt in prompts]).clamp(max=5)
        values = torch.tensor([float(len(prompt)) for prompt in prompts])
        return Conditioning(
            text_embedding=values[:, None, None].expand(-1, 5, self.width).clone(), text_mask=torch.arange(5)[None] < lengths
        )

class Labels(Good):
    def __init__(self, spec):
        self.width = None

    def encode(self, prompts):
        return Conditioning(labels=torch.tensor([len(prompt) for prompt in prompts]))

class DropsOut(nn.Module):
    """In training mode until someone says otherwise."""

    Spec, max_length, width = Spec, 5, 4

    def __init__(self, spec):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def encode(self, prompts):
        return Conditioning(text_embedding=self.drop(torch.ones(len(prompts), 5, 4)))

class FloatMask(Good):
    def encode(self, prompts):
        told = super().encode(prompts)
        return told.replace(text_mask=told.text_mask.float())

class NoToken(Good):
    def encode(self, prompts):
        told = super().encode(prompts)
        return told.replace(text_mask=torch.tensor([[bool(prompt)] * 5 for prompt in prompts]))

class Short(Good):
    def encode(self, prompts):
        return Conditioning(text_embedding=super().encode(prompts).text_embedding[:, :3])

class PaddedToTheLongest(Good):
    def encode(self, prompts):
        told = super().encode(prompts)
        return told.replace(text_mask=told.text_mask[:1].expand(len(prompts), -1).clone())

class Nothing(Good):
    def encode(self, prompts):
        return Conditioning()

class NotFinite(Good):
    def encode(self, prompts):
        told = super().encode(prompts)
        return told.replace(text_embedding=told.text_embedding / 0)

class OtherFacts(Good):
    """Its length is known from files only."""

    def __init__(self, spec, *, meta=False):
        super().__init__(spec)
        self.max_length = 7 if meta else 5

class Embedder(nn.Module):
    """A vector a letter, and their sum a word; the padding's is a buffer."""

    Spec, max_length = Spec, 5

    def __init__(self, spec):
        super().__init__()
        self.width = spec.width
        self.letters = nn.Embedding(26, spec.width)
        self.register_buffer("padding", torch.zeros(spec.width))

    def encode(self, prompts):
        mask = torch.tensor([[place <= len(prompt.split()) for place in range(5)] for prompt in prompts])
        rows = [[self.word(word) for word in prompt.split()] for prompt in prompts]
        rows = [torch.stack([self.padding, *row, *[self.padding] * 5][:5]) for row in rows]
        return Conditioning(text_embedding=torch.stack(rows), text_mask=mask)

    def word(self, word):
        return self.letters(torch.tensor([ord(letter) % 26 for letter in word])).sum(0)

class HiddenWeights(Embedder):
    def __init__(self, spec):
        super().__init__(spec)
        self.secret = {"table": torch.randn(26, spec.width)}

    def word(self, word):
        return super().word(word) + self.secret["table"][len(word)].to(self.padding.dtype)

class Cuts(Good):
    """Reads eight words, in small."""

    max_length = 5

    def encode(self, prompts):
        return super().encode([self.read(prompt) for prompt in prompts])

    def read(self, prompt):
        return " ".join(prompt.lower().split()[:8])

    def cut_off(self, prompt):
        return " ".join(prompt.lower().split()[8:])

class CutsInside(Cuts):
    """Reads letters: a word is cut in two."""

    def read(self, prompt):
        return prompt.lower()[:40].rpartition(" ")[0] if len(prompt) > 44 else prompt.lower()

    def cut_off(self, prompt):
        return prompt.lower()[len(self.read(prompt)) - 2:] if len(prompt) > 44 else ""

class CutsShortOnes(Cuts):
    def cut_off(self, prompt):
        return prompt[3:]

class CutsTheBeginning(Cuts):
    def cut_off(self, prompt):
        return super().cut_off(prompt)[:-2]

class CutsMore(Cuts):
    def read(self, prompt):
        return " ".join(prompt.lower().split()[:6])

class CutsLess(Cuts):
    def read(self, prompt):
        return " ".join(prompt.lower().split()[:9])
'''

SCHEDULERS = '''
import torch
from attrs import frozen
from opensora.core import SampleState

@frozen(kw_only=True)
class Spec:
    num_sampling_steps: int = 4

def column(values):
    return values.view(-1, 1, 1, 1, 1)

class Good:
    """Rectified flow in a few lines."""

    Spec = Spec
    num_timesteps = 1000

    def __init__(self, spec):
        self.steps = spec.num_sampling_steps

    def errors(self, denoiser, latents, conditioning, draws):
        timestep = 1000 * draws.uniform("timestep")
        noise = draws.normal("noise", latents.shape[1:])
        level = column(timestep / 1000)
        kept = conditioning.frame_mask
        if kept is None:
            kept = torch.ones(latents.shape[:1] + latents.shape[2:3]).bool()
        kept = kept[:, None, :, None, None]
        mixed = torch.where(kept, (1 - level) * latents + level * noise, latents * 0)
        prediction = denoiser(mixed, timestep, conditioning)[:, :latents.shape[1]]
        return (prediction - latents + noise).square() * kept

    def loss(self, denoiser, latents, conditioning, *, draws, timestep=None):
        return self.errors(denoiser, latents, conditioning, draws).mean((1, 2, 3, 4))

    def guide(self, denoiser):
        return denoiser

    def sample(self, denoiser, noise, conditioning, *, draws, frame_mask=None, after=None):
        latents = noise if after is None else after.latents
        generated = torch.ones(()) if frame_mask is None else (frame_mask > 0)[:, None, :, None, None]
        for step in range(0 if after is None else after.step + 1, self.steps):
            time = 1000.0 * (1 - step / self.steps)
            velocity = denoiser(latents, torch.full((len(latents),), time), conditioning)[:, :latents.shape[1]]
            latents = latents + generated * (velocity / self.steps + self.fresh(draws, step, latents))
            yield SampleState(step=step, num_steps=self.steps, timestep=time, latents=latents, denoised=latents)

    def fresh(self, draws, step, latents):
        return 0.0

def guided_by(denoiser):
    """Towards nothing, three times as far."""

    class Guided:
        scale = 3.0

        def __call__(self, *arguments):
            return self.scale * denoiser(*arguments)

    return Guided()

class WithGuidance(Good):
    def guide(self, denoiser):
        return guided_by(denoiser)

class Noisy(Good):
    adds_noise = True

    def fresh(self, draws, step, latents):
        return 0.1 * draws.normal(f"step {step}", latents.shape[1:])

class SilentlyNoisy(Noisy):
    adds_noise = False

class SaysItIsNoisy(Good):
    adds_noise = True

class Lessens(Good):
    """With a guidance that is never off."""

    def guide(self, denoiser):
        return guided_by(lambda *arguments: 0.5 * denoiser(*arguments))

class CutsVariance(Good):
    def guide(self, denoiser):
        return lambda latents, *others: denoiser(latents, *others)[:, :latents.shape[1]]

class BeginsAgain(Good):
    def sample(self, *arguments, draws, frame_mask=None, after=None):
        return super().sample(*arguments, draws=draws, frame_mask=frame_mask)

class ForgetsItsMemory(Good):
    def sample(self, *arguments, draws, frame_mask=None, after=None):
        before = 0
        for state in super().sample(*arguments, draws=draws, frame_mask=frame_mask, after=after):
            yield SampleState(
                step=state.step, num_steps=state.num_steps, timestep=state.timestep,
                latents=state.latents + before, denoised=state.denoised,
            )
            before = 0.1 * state.latents

class GoesOnWithoutFrames(Good):
    def sample(self, *arguments, draws, frame_mask=None, after=None):
        mask = frame_mask if after is None else None
        return super().sample(*arguments, draws=draws, frame_mask=mask, after=after)

class ChangesGivenFrames(Good):
    def sample(self, *arguments, draws, frame_mask=None, after=None):
        return super().sample(*arguments, draws=draws, after=after)

class KeepsAllFrames(Good):
    def sample(self, *arguments, draws, frame_mask=None, after=None):
        mask = None if frame_mask is None else 0 * frame_mask
        return super().sample(*arguments, draws=draws, frame_mask=mask, after=after)

class MeanOverTheBatch(Good):
    def loss(self, *arguments, draws, timestep=None):
        return super().loss(*arguments, draws=draws).mean()

class MixesTheBatch(Good):
    def loss(self, *arguments, draws, timestep=None):
        losses = super().loss(*arguments, draws=draws)
        return losses / losses.sum()

class Detached(Good):
    def loss(self, *arguments, draws, timestep=None):
        return super().loss(*arguments, draws=draws).detach()

class CountsGivenFrames(Good):
    def loss(self, denoiser, latents, conditioning, *, draws, timestep=None):
        return super().loss(denoiser, latents, conditioning.replace(frame_mask=None), draws=draws)

class GlobalNoise(Good):
    def sample(self, denoiser, noise, conditioning, *, draws, frame_mask=None):
        return super().sample(denoiser, noise + torch.randn(()), conditioning, draws=draws)

class Backwards(Good):
    def sample(self, *arguments, draws, frame_mask=None):
        yield from reversed(list(super().sample(*arguments, draws=draws)))

class NoSteps(Good):
    def sample(self, *arguments, draws, frame_mask=None):
        return iter(())

class MixesWhenSampling(Good):
    def sample(self, denoiser, noise, conditioning, *, draws, frame_mask=None):
        return super().sample(denoiser, noise - noise.mean(0), conditioning, draws=draws)
'''


def classes(source: str) -> list[str]:
    return [line.split()[1].partition("(")[0].rstrip(":") for line in source.splitlines() if line.startswith("class ")]


@pytest.fixture(autouse=True)
def kit(install: Callable[..., Path]) -> None:
    """All of the above, installed; each by the name of its class."""
    sources = {"models": DENOISERS, "vaes": VAES, "text_encoders": ENCODERS, "schedulers": SCHEDULERS}
    for kind, source in sources.items():
        module = f"{kind}_of_testing_kit"
        entries = {f"kit-{name}": f"{module}:{name}" for name in classes(source) if name != "Spec"}
        install(f"kit-{kind}", {f"opensora.{kind}": entries}, {f"{module}.py": source})


def failure(checker: Callable[..., Report], name: str, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        checker(f"kit-{name}", **options)
    message = str(caught.value)
    assert message.startswith(f"kit-{name}: ")
    return message


# ---- denoisers

ALL_OF_A_DENOISER = [
    "is an nn.Module",
    "builds on the meta device",
    "output is [B, C or 2C, T, H, W], float32 and finite",
    "is deterministic in eval mode",
    "a sample doesn't depend on the others in its batch",
    "takes a frame mask",
    "text or label has no influence where it is dropped",
    "a sample doesn't depend on the others in its batch while training either",
    "gradients reach every trained parameter",
    "saves and loads to the same outputs",
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Good", {}),
        ("Good", {"width": 5, "latent_channels": 3, "latent_size": (1, 2, 2), "text_length": 9}),
        ("Good", {"text_width": None}),
        ("TwoHalves", {}),
        ("Dropout", {}),
    ],
    ids=["text", "other sizes", "labels", "with variance", "random while training"],
)
def test_a_good_denoiser_passes_every_check(name: str, options: dict[str, Any]) -> None:
    passed: list[str] = []
    report = check_denoiser(f"kit-{name}", on_pass=passed.append, **options)
    assert report.passed == passed == ALL_OF_A_DENOISER


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("IgnoresDropped", "text or label has no influence where it is dropped"),
        ("DropsNothing", "dropping changes nothing: is `dropped` ignored?"),
        ("BatchNorm", "a sample doesn't depend on the others in its batch while training either"),
        ("BatchMean", "a sample doesn't depend on the others in its batch: "),
        ("Dead", "gradients reach every trained parameter: AssertionError: no gradient for ['forgotten']"),
        ("WrongShape", "got [3, 4, 2, 8, 7], expected one of ([3, 4, 2, 8, 8], [3, 8, 2, 8, 8])"),
        ("WrongDtype", "float32 and finite: AssertionError: got torch.float64"),
        ("NotFinite", "not all finite"),
        ("Random", "is deterministic in eval mode"),
        ("Raises", "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("NoFrameMask", "takes a frame mask: AssertionError: no frame masks here"),
        ("RealDevice", "a parameter was built on a real device"),
        ("HiddenState", "saves and loads to the same outputs"),
        ("NoModule", "is an nn.Module: AssertionError: got a NoModule"),
    ],
)
def test_a_broken_denoiser_fails_in_readable_words(name: str, words: str) -> None:
    assert words in failure(check_denoiser, name)


def test_checking_leaves_the_global_random_numbers_alone_and_repeats() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    check_denoiser("kit-Good")
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- autoencoders, text encoders, schedulers

HALF = "in half precision it gives nearly the same"
OF_A_MODULE = ["stays frozen and in eval mode", HALF, "loads its own state dict to the same outputs"]
ALL_OF_AN_AUTOENCODER = [
    "latents have the announced channels and size, in float32",
    "encoding is the same for the same draws",
    "a video doesn't depend on the others in its batch",
    "decoding gives [B, 3, num_frames, H', W'] for the frames that were asked for, in float32",
    "a decoded video doesn't depend on the others in its batch",
    "builds on the meta device, for dry runs",
    *OF_A_MODULE,
]
ALL_OF_A_TEXT_ENCODER = [
    "gives text_embedding [B, L, D] and text_mask [B, L], or labels [B]",
    "encodes alike again, and alone",
    "builds on the meta device, for dry runs",
]
OF_A_LOSS = [
    "loss is [B] and finite",
    "loss is the same for the same draws, whatever the batch",
    "loss has a gradient",
    "frames that are given don't count in the loss",
]
OF_A_SAMPLER = [
    "guidance predicts in the shape of the denoiser",
    "guidance at scale 1 is the denoiser itself",
    "sampling yields its state at each step",
    "sampling ends in finite latents",
    "sampling again gives the same",
    "sampling alone gives the same as in a batch",
    "adds_noise says whether sampling draws random numbers",
    "sampling goes on from any state, bit for bit",
    "sampling goes on from any state, bit for bit, with given frames",
    "frames that are given are kept",
]
has_bf16 = probe_dtype("cpu", "bf16") is None


def tried(checks: list[str]) -> list[str]:
    """Of a component with weights: without half precision, where this machine has none."""
    return checks if has_bf16 else [each for each in checks if each != HALF]


def test_good_ones_pass() -> None:
    assert check_vae("kit-Good").passed == ALL_OF_AN_AUTOENCODER
    assert check_vae("kit-Good", size=(1, 8, 6), scale=3.0).passed == ALL_OF_AN_AUTOENCODER
    assert check_vae("kit-Gained").passed == tried(ALL_OF_AN_AUTOENCODER)
    assert check_text_encoder("kit-Good").passed == ALL_OF_A_TEXT_ENCODER
    cutting = "says what it cuts off: a prompt's end that has no influence, and no more"
    assert check_text_encoder("kit-Cuts").passed == [*ALL_OF_A_TEXT_ENCODER[:2], cutting, ALL_OF_A_TEXT_ENCODER[2]]
    assert cutting in check_text_encoder("kit-CutsInside").passed
    assert check_text_encoder("kit-Labels", prompts=["0", "1", "22"]).passed == ALL_OF_A_TEXT_ENCODER
    assert check_text_encoder("kit-DropsOut").passed == [*ALL_OF_A_TEXT_ENCODER, *OF_A_MODULE]
    assert check_text_encoder("kit-Embedder").passed == tried([*ALL_OF_A_TEXT_ENCODER, *OF_A_MODULE])
    assert check_scheduler("kit-Good").passed == [*OF_A_LOSS, *OF_A_SAMPLER]
    assert check_scheduler("kit-Good", samples=False).passed == OF_A_LOSS
    assert check_scheduler("kit-Good", trains=False, num_sampling_steps=2).passed == OF_A_SAMPLER
    assert check_scheduler("kit-WithGuidance", trains=False).passed == OF_A_SAMPLER
    assert check_scheduler("kit-Noisy", trains=False).passed == OF_A_SAMPLER
    assert check_scheduler("kit-ChangesGivenFrames", trains=False, given_within=5.0).passed == OF_A_SAMPLER


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "WrongSize",
            "channels and size, in float32: AssertionError: got [2, 3, 3, 16, 24], expected [2, 3, 3, 32, 48]",
        ),
        ("GlobalNoise", "encoding is the same for the same draws"),
        ("BatchMean", "a video doesn't depend on the others in its batch"),
        ("TooManyFrames", "got [2, 3, 4, 32, 48]"),
        ("Raises", "ValueError: no such size"),
        ("MixesDecoded", "a decoded video doesn't depend on the others in its batch"),
        ("ReadsAnyway", "['gain'] are on a real device. Take the keyword `meta`"),
        ("OtherShapes", "other weights than the real one's: ['gain']"),
        ("GoesOnLearning", "encoding makes a parameter ask for gradients"),
        ("GoesOnTraining", "encoding puts it into training mode"),
        ("HiddenState", "latents differs: something that matters is not in it"),
    ],
)
def test_a_broken_autoencoder_fails_in_readable_words(name: str, words: str) -> None:
    assert words in failure(check_vae, name)


@pytest.mark.skipif(not has_bf16, reason="this machine computes no bf16")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("OwnDtype", "got torch.bfloat16, expected float32 whatever the weights are"),
        ("NeedsFloat32", "% in bf16"),
    ],
)
def test_an_autoencoder_that_half_precision_breaks(name: str, words: str) -> None:
    assert words in failure(check_vae, name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FloatMask", "mask is torch.float32"),
        ("NoToken", "a prompt without any token"),
        ("Short", "got [3, 3, 4], expected [3, 5, 4]"),
        ("PaddedToTheLongest", "encodes alike again, and alone"),
        ("Nothing", "text_embedding is missing"),
        ("NotFinite", "text_embedding is not all finite"),
        (
            "OtherFacts",
            "announces {'width': 4, 'max_length': 7} there, and {'width': 4, 'max_length': 5} with its weights",
        ),
        (
            "CutsShortOnes",
            '"a handwritten seven moving left" is short, but "andwritten seven moving left" is said to be cut off',
        ),
        ("CutsTheBeginning", "is not the end of the prompt"),
        ("CutsMore", "more is cut off than it says"),
        ("CutsLess", "without what is cut off"),
        ("HiddenWeights", "text_embedding differs: something that matters is not in it"),
    ],
)
def test_a_broken_text_encoder_fails_in_readable_words(name: str, words: str) -> None:
    assert words in failure(check_text_encoder, name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MeanOverTheBatch", "loss is [B] and finite: AssertionError: got []"),
        ("MixesTheBatch", "loss is the same for the same draws, whatever the batch"),
        ("Detached", "loss has a gradient"),
        ("CountsGivenFrames", "frames that are given don't count in the loss"),
        ("GlobalNoise", "sampling again gives the same"),
        ("Backwards", "sampling yields its state at each step"),
        ("NoSteps", "not one state"),
        ("MixesWhenSampling", "sampling alone gives the same as in a batch"),
        ("Lessens", "guidance at scale 1 is the denoiser itself"),
        ("CutsVariance", "denoiser: AssertionError: got [3, 4, 2, 5, 6], expected [3, 8, 2, 5, 6]"),
        ("SilentlyNoisy", "adds_noise is False, and it drew ['step 0', 'step 1', 'step 2', 'step 3']"),
        ("SaysItIsNoisy", "adds_noise is True, and it drew nothing"),
        ("BeginsAgain", "bit for bit: AssertionError: after step 0"),
        ("ForgetsItsMemory", "bit for bit: AssertionError: other latents after step 0"),
        ("GoesOnWithoutFrames", "bit for bit, with given frames: AssertionError: other latents after step 0"),
        ("KeepsAllFrames", "frames that are given are kept: AssertionError: the others are kept too"),
        ("ChangesGivenFrames", "frames that are given are kept: AssertionError: they change by up to "),
    ],
)
def test_a_broken_scheduler_fails_in_readable_words(name: str, words: str) -> None:
    assert words in failure(check_scheduler, name)


# ---- by kind


@pytest.mark.parametrize("kind", ["models", "vaes", "text_encoders", "schedulers"])
def test_check_chooses_by_kind(kind: str) -> None:
    passed: list[str] = []
    assert check(kind, "kit-Good", on_pass=passed.append).passed == passed
    assert passed


def test_kinds_without_checks_and_unknown_names_are_refused() -> None:
    with pytest.raises(ComponentError, match='no checks for kind "hooks"; there are for models, schedulers'):
        check("hooks", "console")
    with pytest.raises(AssertionError, match='No model is named "kit-Goood"'):
        check("models", "kit-Goood")


def test_every_class_above_is_tried() -> None:
    """A broken component without a test would say nothing."""
    text = Path(__file__).read_text()
    names = [
        one.name for kind in ("models", "vaes", "text_encoders", "schedulers") for one in components.available(kind)
    ]
    for name in (name.removeprefix("kit-") for name in names if name.startswith("kit-")):
        assert f'"{name}"' in text or f'"kit-{name}"' in text, name
