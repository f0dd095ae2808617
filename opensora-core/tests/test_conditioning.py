"""What a denoiser is told can be checked, indexed, moved and joined as a whole."""

from __future__ import annotations

import attrs
import pytest
import torch

from opensora.core import Conditioning, ShapeError


def conditioning(batch: int = 3, **changes: object) -> Conditioning:
    """Everything is given, each sample other values."""
    rows = torch.arange(batch, dtype=torch.float32)
    return Conditioning(
        text_embedding=rows[:, None, None].expand(batch, 4, 5).clone(),
        text_mask=torch.arange(4)[None] <= torch.arange(batch)[:, None],
        labels=torch.arange(batch),
        fps=24 + rows,
        height=100 + rows,
        width=853 + rows,
        num_frames=16 + rows,
        aspect_ratio=1 + rows,
        extra={"camera": rows[:, None].expand(batch, 6).clone()},
    ).replace(**changes)


def tensors(told: Conditioning) -> dict[str, torch.Tensor]:
    given = {
        name: value for name, value in attrs.asdict(told, recurse=False).items() if isinstance(value, torch.Tensor)
    }
    return {**given, **{f"extra {name}": value for name, value in told.extra.items()}}


def assert_equal(one: Conditioning, other: Conditioning) -> None:
    torch.testing.assert_close(tensors(one), tensors(other), rtol=0, atol=0)


def test_tensors_that_disagree_on_the_batch_are_refused_by_name() -> None:
    with pytest.raises(ShapeError, match=r"'labels': 3.*'fps': 2"):
        Conditioning(labels=torch.arange(3), fps=torch.ones(2))
    with pytest.raises(ShapeError, match=r"extra\.camera"):
        Conditioning(labels=torch.arange(3), extra={"camera": torch.ones(2, 6)})


def test_a_tensor_without_a_batch_axis_is_refused_by_name() -> None:
    with pytest.raises(ShapeError, match="fps"):
        Conditioning(fps=torch.tensor(24.0))


def test_length_is_the_batch_size() -> None:
    assert len(conditioning(3)) == 3
    assert len(Conditioning()) == 0
    assert len(Conditioning(extra={"camera": torch.ones(2, 6)})) == 2


@pytest.mark.parametrize(
    "index",
    [slice(1, None), [2, 0], (1,), torch.tensor([2, 2, 0]), torch.tensor([True, False, True])],
    ids=["slice", "list", "tuple", "tensor", "mask"],
)
def test_indexing_selects_samples_of_every_tensor(index: object) -> None:
    told = conditioning(3)
    expected = torch.arange(3)[list(index) if isinstance(index, tuple) else index]
    chosen = told[index]
    assert chosen.labels.tolist() == expected.tolist()
    assert chosen.extra["camera"].tolist() == told.extra["camera"][expected].tolist()
    assert_equal(chosen, Conditioning.cat([told[row : row + 1] for row in expected.tolist()]))


def test_nothing_can_be_selected() -> None:
    assert len(conditioning(3)[:0]) == 0
    assert len(conditioning(3)[[]]) == 0


def test_a_dtype_changes_the_text_and_leaves_sizes_exact() -> None:
    told = conditioning(3).to(dtype=torch.bfloat16)
    assert told.text_embedding.dtype is torch.bfloat16
    assert told.width.tolist() == [853, 854, 855]
    assert told.labels.dtype is torch.int64
    assert told.text_mask.dtype is torch.bool
    assert told.extra["camera"].dtype is torch.float32


def test_moving_moves_every_tensor() -> None:
    told = conditioning(3).to("meta")
    assert all(tensor.is_meta for tensor in tensors(told).values())
    assert_equal(conditioning(3).to("cpu"), conditioning(3))
    assert_equal(conditioning(3).to(), conditioning(3))


def test_replacing_an_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError):
        conditioning().replace(text_masks=None)


def test_unconditional_drops_every_sample_and_keeps_the_rest() -> None:
    told = conditioning(3, dropped=torch.tensor([True, False, False]))
    null = told.unconditional()
    assert null.dropped.tolist() == [True] * 3
    assert_equal(null.replace(dropped=told.dropped), told)
    assert told.dropped.tolist() == [True, False, False]


def test_joining_is_the_inverse_of_indexing() -> None:
    told = conditioning(4, dropped=torch.tensor([True, False, True, False]))
    assert_equal(Conditioning.cat([told[:1], told[1:3], told[3:]]), told)


def test_joining_fills_masks_that_only_some_parts_have() -> None:
    plain = conditioning(2, text_mask=None)
    frames = torch.tensor([[True, False, True]])
    masked = conditioning(1, frame_mask=frames, dropped=torch.tensor([True]))
    joined = Conditioning.cat([plain, masked])
    assert joined.dropped.tolist() == [False, False, True]
    assert joined.frame_mask.tolist() == [[True] * 3, [True] * 3, [True, False, True]]
    assert joined.text_mask.tolist() == [[True] * 4, [True] * 4, [True, False, False, False]]
    assert_equal(Conditioning.cat([masked, plain]), joined[[2, 0, 1]])


def test_guidance_halves_join() -> None:
    told = conditioning(2)
    both = Conditioning.cat([told, told.unconditional()])
    assert both.dropped.tolist() == [False, False, True, True]
    assert both.width.tolist() == [853, 854, 853, 854]


@pytest.mark.parametrize("name", ["fps", "text_embedding", "labels"])
def test_joining_a_condition_that_only_some_parts_have_is_refused(name: str) -> None:
    with pytest.raises(ShapeError, match=name):
        Conditioning.cat([conditioning(1), conditioning(1, **{name: None})])
    with pytest.raises(ShapeError, match="camera"):
        Conditioning.cat([conditioning(1), conditioning(1, extra={})])


def test_joining_texts_of_different_lengths_is_refused_by_name() -> None:
    short = Conditioning(text_embedding=torch.ones(1, 3, 5))
    with pytest.raises(ShapeError, match=r"text_embedding has different shapes: \[1, 3, 5\], \[1, 4, 5\]"):
        Conditioning.cat([short, Conditioning(text_embedding=torch.ones(1, 4, 5))])


def test_joining_nothing_gives_nothing() -> None:
    assert len(Conditioning.cat([])) == 0


def test_memory_counts_every_tensor() -> None:
    told = Conditioning(text_embedding=torch.zeros(2, 3, 4), text_mask=torch.ones(2, 3).bool(), fps=torch.ones(2))
    assert told.nbytes == 2 * 3 * 4 * 4 + 2 * 3 + 2 * 4
    assert Conditioning().nbytes == 0
    assert Conditioning(extra={"pose": torch.zeros(2, 5)}).nbytes == 40
