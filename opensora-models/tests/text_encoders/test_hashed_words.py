"""The text encoder without weights."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from opensora.core.testing import check_text_encoder
from opensora.core.text_cache import CachedTextEncoder
from opensora.models.text_encoders.hashed_words import HashedWords


def build(**options) -> HashedWords:
    return HashedWords(HashedWords.Spec(**{"width": 8, "model_max_length": 6, **options}))


def words(encoder, prompt) -> torch.Tensor:
    """The tokens of a prompt without start token and positions."""
    conditioning = encoder.encode([prompt])
    return (conditioning.text_embedding - encoder.positions)[0, conditioning.text_mask[0]][1:]


def test_shapes_and_mask():
    conditioning = build().encode(["", "a wave", "one two three four five"])
    assert conditioning.text_embedding.shape == (3, 6, 8)
    assert conditioning.text_mask.dtype == torch.bool
    assert conditioning.text_mask.sum(dim=1).tolist() == [1, 3, 6]


def test_word_is_the_same_vector_wherever_it_stands():
    encoder = build()
    left, right = words(encoder, "Seven, moving!"), words(encoder, "moving   seven")
    torch.testing.assert_close(left, right.flip(0))
    assert not torch.allclose(left[0], left[1])
    first, second = encoder.encode(["seven seven"]).text_embedding[0, 1:3]
    assert not torch.allclose(first, second)  # positions tell them apart


def test_prompt_does_not_depend_on_its_batch():
    encoder = build()
    together = encoder.encode(["a wave", "a long and winding road"])
    assert torch.equal(encoder.encode(["a wave"]).text_embedding, together.text_embedding[:1])


def test_vectors_are_standard_normal():
    encoder = build(width=512, model_max_length=200)
    vectors = words(encoder, " ".join(f"word{index}" for index in range(199)))
    assert abs(vectors.mean()) < 0.02
    assert abs(vectors.std() - 1) < 0.02


def test_another_process_makes_the_same_vectors():
    code = (
        "from opensora.models.text_encoders.hashed_words import HashedWords as H\n"
        "print(H(H.Spec(width=8)).encode(['left']).text_embedding[0, 1].tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    expected = HashedWords(HashedWords.Spec(width=8)).encode(["left"]).text_embedding[0, 1].tolist()
    assert found.strip() == str(expected)


def test_long_prompt_is_cut():
    conditioning = build().encode(["one two three four five six seven"])
    assert conditioning.text_mask.all()
    assert torch.equal(conditioning.text_embedding, build().encode(["one two three four five"]).text_embedding)


def test_follows_the_module_to_another_dtype():
    assert build().bfloat16().encode(["a"]).text_embedding.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"width": 7}, {"width": 0}, {"model_max_length": 1}], ids=str)
def test_options_that_make_no_encoder(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(**options)


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("", ""),
        ("one two three four five", ""),
        ("one two three four five!!", ""),
        ("One, two; three - four (FIVE) Six, seven.", "six, seven."),
        ("\u0130a \u0130b \u0130c", "c"),  # in lower case two words each: "i", a dot above it, "a"
    ],
)
def test_says_what_it_cuts_off(prompt, cut):
    assert build().cut_off(prompt) == cut


def test_an_empty_prompt_is_remembered():
    told = CachedTextEncoder(build(), capacity=10_000).encode(["", "a wave"])
    assert torch.equal(told.text_embedding, build().encode(["", "a wave"]).text_embedding)


def test_conforms():
    assert any("cuts off" in title for title in check_text_encoder("hashed-words", model_max_length=6).passed)
