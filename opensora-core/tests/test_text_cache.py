"""Embeddings that are remembered: each prompt is encoded once, alone, and as long as there is room."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch

from opensora.core import Conditioning, ConfigError
from opensora.core.text_cache import CachedTextEncoder


class Encoder:
    """Says of a prompt how long it is, and in the last bits in how large a batch it came, as large matrix products do."""

    width: int | None = 4
    max_length = 3

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self.batches.append(list(prompts))
        lengths = torch.tensor([len(prompt) + 1e-6 * len(prompts) for prompt in prompts])
        return Conditioning(
            text_embedding=lengths[:, None, None].expand(-1, 3, 4).clone(),
            text_mask=torch.ones(len(prompts), 3, dtype=torch.bool),
        )


EACH = 3 * 4 * 4 + 3
"""Bytes of a prompt: the embedding in float32, and the mask."""


class Labels(Encoder):
    width = None

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(labels=torch.tensor([int(prompt) for prompt in prompts]))


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def test_each_prompt_is_encoded_once_and_alone(encoder: Encoder) -> None:
    cache = CachedTextEncoder(encoder, capacity=1000)
    told = cache.encode(["sea", "a", "sea"])
    again = cache.encode(["a", "wave"])
    assert encoder.batches == [["sea"], ["a"], ["wave"]]
    assert told.text_embedding is not None
    assert again.text_embedding is not None
    assert told.text_embedding[:, 0, 0].round().tolist() == [3, 1, 3]
    assert torch.equal(told.text_embedding[1], again.text_embedding[0])
    assert told.text_mask is not None
    assert told.text_mask.dtype is torch.bool
    assert (cache.width, cache.max_length) == (4, 3)


def test_an_embedding_does_not_depend_on_what_was_encoded_before(encoder: Encoder) -> None:
    """Or a resumed run, which remembers nothing, would differ in the last bits."""
    prompts = ["sea", "a", "wave", "red"]
    unbroken, resumed = (CachedTextEncoder(encoder, capacity=1000) for _ in range(2))
    unbroken.encode(prompts[:2])
    unbroken.encode(prompts[2:])
    late, anew = unbroken.encode(["wave", "sea"]), resumed.encode(["wave", "sea"])
    assert torch.equal(late.text_embedding, anew.text_embedding)  # type: ignore[arg-type]  # both have one


def test_labels_are_remembered_too() -> None:
    told = CachedTextEncoder(Labels(), capacity=100).encode(["3", "1", "3"])
    assert told.labels is not None
    assert told.labels.tolist() == [3, 1, 3]


def test_prompts_unused_for_longest_are_forgotten(encoder: Encoder) -> None:
    cache = CachedTextEncoder(encoder, capacity=2 * EACH)
    for prompt in ("a", "sea", "a", "wave", "a"):
        cache.encode([prompt])
    assert cache.size == 2 * EACH
    assert encoder.batches == [["a"], ["sea"], ["wave"]]
    cache.encode(["sea"])
    assert encoder.batches[-1] == ["sea"]


def test_a_batch_larger_than_the_memory_is_whole(encoder: Encoder) -> None:
    cache = CachedTextEncoder(encoder, capacity=EACH)
    assert len(cache.encode(["a", "sea", "wave"])) == 3
    assert cache.size == EACH
    assert len(CachedTextEncoder(encoder, capacity=0).encode(["a", "sea"])) == 2


def test_changing_a_batch_changes_nothing_that_is_remembered(encoder: Encoder) -> None:
    cache = CachedTextEncoder(encoder, capacity=1000)
    told = cache.encode(["sea"])
    assert told.text_embedding is not None
    told.text_embedding.zero_()
    again = cache.encode(["sea"]).text_embedding
    assert again is not None
    assert again.all()


def test_what_fits_is_remembered_ahead_and_outlives_the_encoder() -> None:
    encoder = Encoder()
    cache, there = CachedTextEncoder(encoder, capacity=2 * EACH), weakref.ref(encoder)
    del encoder
    assert cache.remember(["a", "sea", "a"])
    assert there() is not None
    cache.release()
    assert there() is None
    assert len(cache.encode(["sea", "a", "sea"])) == 3
    with pytest.raises(ConfigError, match=r'"wave" is none of them\. Keep it with release_text_encoder = False'):
        cache.encode(["sea", "wave"])


def test_what_does_not_fit_is_found_out_with_the_first(encoder: Encoder) -> None:
    cache = CachedTextEncoder(encoder, capacity=2 * EACH)
    assert not cache.remember(["a", "sea", "wave"])
    assert encoder.batches == [["a"]]
    assert cache.remember([])


def test_what_a_preview_encoded_can_be_trained_on(encoder: Encoder) -> None:
    """Tensors made in inference mode can't take part in a backward pass."""
    cache = CachedTextEncoder(encoder, capacity=1000)
    with torch.inference_mode():
        cache.encode(["sea"])
    told = cache.encode(["sea"]).text_embedding
    assert told is not None
    weight = torch.ones(4, requires_grad=True)
    (told * weight).sum().backward()
    assert weight.grad is not None


# ---- what of a prompt is cut off


class Cutting(Encoder):
    """Reads ten letters, in small."""

    max_tokens = 10

    def cut_off(self, prompt: str) -> str:
        return prompt.lower()[10:]


def test_what_is_cut_is_said_once_for_each_of_the_first_prompts(caplog: pytest.LogCaptureFixture) -> None:
    cache = CachedTextEncoder(Cutting(), capacity=100_000)
    prompts = ["a wave", *(f"A wave of the SEA {index}" for index in range(12))]
    cache.encode(prompts)
    cache.encode(prompts)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 11
    assert messages[0] == (
        'Prompt "A wave of the SEA 0": 3 of 6 words don\'t fit the text encoder\'s 10 tokens and are cut: "the sea 0"'
    )
    assert messages[-1] == "Further prompts that are cut are not listed."


def test_an_encoder_that_can_not_tell_cuts_nothing(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    cache = CachedTextEncoder(encoder, capacity=1000)
    cache.encode(["a wave of the sea"])
    assert not caplog.records
    assert cache.max_tokens == encoder.max_length == 3
