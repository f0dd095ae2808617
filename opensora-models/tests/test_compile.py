"""The blocks of every denoiser become one graph each, in sampling and in training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opensora.core.conditioning import Conditioning
from opensora.models.dit import DiT
from opensora.models.latte import Latte
from opensora.models.latte_t2v import LatteT2V
from opensora.models.pixart import PixArt, PixArtMS
from opensora.models.pixart_sigma import PixArtSigma
from opensora.models.stdit import STDiT
from opensora.models.stdit2 import STDiT2
from opensora.models.stdit3 import STDiT3

CLASSES = [DiT, Latte, LatteT2V, PixArt, PixArtMS, PixArtSigma, STDiT, STDiT2, STDiT3]
IMAGES = (PixArt, PixArtMS, PixArtSigma)
FREE_SIZE = (STDiT2, STDiT3)
WIDTH = 384  # wide enough for the linear layers that are not torch's own when they run eagerly


def build(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    has_labels = cls in (DiT, Latte)
    options = {"hidden_size": WIDTH, "depth": 2, "num_heads": 8} | ({"condition": "label_3"} if has_labels else {})
    given = {"latent_channels": 4, "text_width": None if has_labels else 6}
    given |= {} if has_labels else {"text_length": 5}
    given |= {} if cls in FREE_SIZE else {"latent_size": (1 if cls in IMAGES else 2, 4, 4)}
    model = cls(cls.Spec(**options), **given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def inputs(cls: type[nn.Module]) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    numbers = {name: torch.full((2,), 32.0) for name in ("height", "width", "fps", "num_frames", "aspect_ratio")}
    mask = torch.arange(5) < torch.tensor([[2], [4]])
    text = torch.randn(2, 5, 6, generator=generator)
    told = {"labels": torch.tensor([0, 2])} if cls in (DiT, Latte) else {"text_embedding": text, "text_mask": mask}
    latents = torch.randn(2, 4, 1 if cls in IMAGES else 2, 4, 4, generator=generator)
    return latents, torch.tensor([3, 700]), Conditioning(**told, **numbers)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute"
)  # torch's compiler looks at it, and hides the warning by printing
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_block_is_one_graph_with_the_same_result(cls, training):
    torch.compiler.reset()
    model, given = build(cls).train(training), inputs(cls)
    compiled = build(cls).train(training)
    blocks = [
        block for name in ("blocks", "spatial_blocks", "temporal_blocks") for block in getattr(compiled, name, [])
    ]
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")  # fullgraph: a break is an error
    with torch.set_grad_enabled(training):
        expected, found = model(*given), compiled(*given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    if training:
        for each in (expected, found):
            each.square().mean().backward()
        for one, other in zip(compiled.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
