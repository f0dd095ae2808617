"""Trains small denoisers alone and with sequence parallelism, and writes what came of both to ``<folder>/<rank>.json``.

Arguments: the folder, the accelerator, sp_size, and the cases (none: all of them).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor, nn

from opensora.core import Conditioning, SampleDraws, SampleKey, SequencePlan
from opensora.core.accelerator import Accelerator, Single, SingleSpec
from opensora.core.attention import attention, sdpa, use_kernel
from opensora.core.components import build
from opensora.core.composing import checkpoint_activations
from opensora.models import dit, latte, latte_t2v, pixart, pixart_sigma, stdit, stdit2, stdit3

CHANNELS, TEXT_WIDTH, TEXT_LENGTH = 4, 16, 6


class Rotating(nn.Module):
    """A stranger's model: attention among all tokens with rotations by position, a list of blocks, and no small head."""

    Spec = object
    sequence_plan = SequencePlan(full=("layers.*.attend",), blocks=("layers",), alongside={"angles": 0}, head=None)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.mlp = Rotating.Attend(), nn.Linear(12, 12)

        def forward(self, x: Tensor, shift: Tensor, angles: Tensor) -> Tensor:
            x = x + self.attend(x + shift, angles)
            return x + self.mlp(x).tanh()

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(12, 36)

        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            qkv = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
            query, key = qkv[:2] * angles.cos() + qkv[:2].roll(1, -1) * angles.sin()
            return attention(query, key, qkv[2]).transpose(1, 2).flatten(2)

    def __init__(self, spec: object, **_: Any) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(CHANNELS, 12), nn.Linear(12, CHANNELS)
        self.layers = nn.ModuleList(Rotating.Block() for _ in range(2))

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        x = self.before(latents.flatten(2).transpose(1, 2))  # [B, N, D]
        angles = torch.arange(x.shape[1])[:, None] / 10
        for layer in self.layers:
            x = layer(x, timestep[:, None, None] / 1000, angles=angles)
        return self.after(x).transpose(1, 2).reshape(latents.shape)


@frozen(kw_only=True)
class Case:
    """A denoiser and what it is trained on."""

    kind: type[nn.Module]
    size: tuple[int, int, int]
    """Of the latents."""
    options: dict[str, Any] = field(factory=dict)
    batch: int = 4
    steps: int = 20
    masked: bool = False
    checkpointed: bool = False
    text: bool = True
    pooled: bool = False

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        width = TEXT_WIDTH if self.text else None
        given = {"latent_channels": CHANNELS, "text_width": width, "text_length": 1 if self.pooled else TEXT_LENGTH}
        if self.kind not in (stdit2.STDiT2, stdit3.STDiT3):
            given["latent_size"] = self.size
        module = self.kind(self.kind.Spec(**self.options), **given)
        for parameter in module.parameters():  # some are zero at first, which would hide what is behind them
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        if self.checkpointed:
            checkpoint_activations(module)
        return module.train()

    def inputs(self, step: int) -> tuple[Tensor, Tensor, Conditioning, Tensor]:
        """Latents, timestep, conditioning and target of all samples of a step."""
        generator = torch.Generator().manual_seed(step)
        count, (frames, height, width) = self.batch, self.size

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        mask = None
        if self.masked:
            mask = torch.ones(count, frames, dtype=torch.bool)
            mask[: count // 2 + 1, 0] = False
            mask[0, -1] = False
        length = 1 if self.pooled else TEXT_LENGTH
        text_mask = torch.arange(length) < torch.arange(1, count + 1)[:, None]
        conditioning = Conditioning(
            text_embedding=normal(count, length, TEXT_WIDTH) if self.text else None,
            text_mask=text_mask if self.text and not self.pooled else None,
            labels=None if self.text else torch.arange(count) % 4,
            dropped=torch.arange(count) % 2 == 0,
            frame_mask=mask,
            fps=torch.full((count,), 8.0),
            height=torch.full((count,), 8.0 * height),
            width=torch.full((count,), 8.0 * width),
            num_frames=torch.full((count,), float(frames)),
            aspect_ratio=torch.full((count,), height / width),
        )
        latents, timestep = normal(count, CHANNELS, *self.size), torch.rand(count, generator=generator) * 1000
        return latents, timestep, conditioning, normal(count, CHANNELS, *self.size)


SMALL = {"hidden_size": 24, "depth": 2, "num_heads": 2}
CASES = {
    "STDiT3": Case(kind=stdit3.STDiT3, size=(3, 6, 10), options=SMALL, masked=True),
    "STDiT3 checkpointed": Case(
        steps=4, kind=stdit3.STDiT3, size=(5, 6, 10), options=SMALL, masked=True, checkpointed=True, batch=2
    ),
    "STDiT3 image": Case(steps=4, kind=stdit3.STDiT3, size=(1, 6, 6), options=SMALL, batch=1),
    "STDiT2": Case(
        kind=stdit2.STDiT2,
        size=(5, 5, 6),
        options={**SMALL, "qk_norm": True, "qk_norm_legacy": True, "drop_path": 0.5},
        masked=True,
    ),
    "STDiT": Case(kind=stdit.STDiT, size=(3, 6, 6), options=SMALL, masked=True),
    "Latte": Case(kind=latte.Latte, size=(3, 6, 6), options={**SMALL, "condition": "label_4"}, text=False),
    "LatteT2V": Case(steps=4, kind=latte_t2v.LatteT2V, size=(5, 6, 6), options=SMALL),
    "DiT": Case(kind=dit.DiT, size=(3, 6, 6), options={**SMALL, "num_heads": 3, "condition": "text"}, pooled=True),
    "PixArt": Case(kind=pixart.PixArt, size=(3, 6, 10), options={**SMALL, "num_heads": 4, "drop_path": 0.5}),
    "PixArt checkpointed": Case(
        steps=4, kind=pixart.PixArt, size=(3, 6, 10), options={**SMALL, "num_heads": 4}, checkpointed=True
    ),
    "PixArtMS": Case(steps=4, kind=pixart.PixArtMS, size=(1, 10, 6), options={**SMALL, "num_heads": 4}),
    "PixArtSigma": Case(
        steps=4,
        kind=pixart_sigma.PixArtSigma,
        size=(1, 10, 6),
        options={
            **SMALL,
            "num_heads": 4,
            "qk_norm": True,
            "kv_compress_config": pixart_sigma.KVCompression(sampling="conv", scale_factor=2, kv_compress_layer=(1,)),
        },
    ),
    "Rotating": Case(steps=4, kind=Rotating, size=(3, 3, 3)),
}


def train(case: Case, module: nn.Module, accelerator: Accelerator) -> dict[str, Any]:
    """Losses, gradient norms, the first step's gradients and output, and what the weights became."""
    predict = accelerator.prepare(module)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    own = slice(accelerator.data_rank, None, accelerator.data_world_size)
    seen: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(case.steps):
        latents, timestep, conditioning, target = case.inputs(step)
        torch.default_generator.manual_seed(step)  # of DropPath
        with accelerator.micro_step(last=True):
            output = predict(latents[own], timestep[own], conditioning[own])
            loss = (output[:, :CHANNELS] - target[own]).square().mean()
            accelerator.backward(loss)
        if step == 0:
            seen["output"] = output.detach()
            seen["gradients"] = [full(parameter.grad).clone() for parameter in parameters]
        seen["losses"].append(accelerator.mean(loss.detach()).item())
        seen["norms"].append(accelerator.update(optimizer, parameters, grad_clip=0.0))
    return seen


def full(gradient: Tensor) -> Tensor:
    """All of what may be dealt out among processes."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


@torch.inference_mode()
def sample(case: Case, accelerator: Accelerator) -> Tensor:
    """Latents of two videos, sampled with guidance."""
    module = case.build().requires_grad_(False).eval()
    latents, _, conditioning, _ = case.inputs(0)
    count = min(2, case.batch)
    scheduler = build("schedulers", {"type": "rflow", "num_sampling_steps": 3, "cfg_scale": 2.0})
    guided = scheduler.guide(accelerator.predictor(module))
    accelerator.place(module)
    told, draws = conditioning[:count].replace(dropped=None, frame_mask=None), SampleDraws([SampleKey(0, 0)] * count)
    *_, last = scheduler.sample(guided, latents[:count], told, draws=draws)
    return last.latents


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return ((one - other).abs().max() / one.abs().max()).item()


def watch(module: nn.Module) -> dict[str, list[list[int]]]:
    """The shapes that feed-forward layers and attention get in the first forward pass."""
    shapes: dict[str, list[list[int]]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, inputs: shapes.setdefault(name, []).append([*inputs[0].shape])

    for name, each in module.named_modules():
        if name.rpartition(".")[2] in ("mlp", "qkv"):
            each.register_forward_pre_hook(note(name))
    return shapes


def compare(name: str, accelerator: Accelerator) -> dict[str, Any]:
    """One case."""
    case = CASES[name]
    alone_accelerator = Single(SingleSpec(), device="cpu", dtype="fp32")
    alone = train(case, case.build(), alone_accelerator)
    module = case.build()
    names = [key for key, _ in module.named_parameters()]
    shapes, kernels = watch(module), []

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        kernels.append([*query.shape])
        return sdpa(query, key, value, mask)

    with use_kernel(kernel):
        shared = train(case, module, accelerator)
    own = alone["output"][accelerator.data_rank :: accelerator.data_world_size]
    pairs = [
        (one.flatten(), other.flatten()) for one, other in zip(alone["gradients"], shared["gradients"], strict=True)
    ]
    return {
        "losses": [alone["losses"], shared["losses"]],
        "norms": [alone["norms"], shared["norms"]],
        "output": apart(own, shared["output"]),
        "gradients": apart(*map(torch.cat, zip(*pairs, strict=True))),
        "names kept": names == [key for key, _ in case.build().named_parameters()],
        "shapes": {key: each[0] for key, each in shapes.items()},
        "kernels": kernels[: len(kernels) // case.steps],
        "sampled": apart(sample(case, alone_accelerator), sample(case, accelerator)),
    }


if __name__ == "__main__":
    folder, accelerator, sp_size, *names = sys.argv[1:]
    config = {"type": accelerator, "sp_size": int(sp_size), "timeout_s": 60}
    with build("accelerators", config, device="cpu", dtype="fp32") as processes:
        results = {name: compare(name, processes) for name in names or CASES}
        (Path(folder) / f"{processes.rank}.json").write_text(json.dumps(results))
