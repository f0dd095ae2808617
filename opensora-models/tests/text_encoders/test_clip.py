"""CLIP: reference vectors on a tiny encoder, and prompts through a tiny tokenizer, both in a folder as the hub has them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from opensora.core.errors import ConfigError, WeightsError
from opensora.core.testing import check_text_encoder
from opensora.core.text_cache import CachedTextEncoder
from opensora.core.text_cuts import max_tokens
from opensora.models.text_encoders.clip import CLIPEncoder

WORDS = ["a", "wave", "sea", "red"]
START, END = 62, 63


@pytest.fixture(scope="module")
def reference(golden):
    return golden("clip_text")


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    module = CLIPTextModel(CLIPTextConfig(**reference.config))
    module.load_state_dict(reference.state)
    module.save_pretrained(path)
    letters = sorted({letter for word in WORDS for letter in word})
    merges = [
        ("w", "a"),
        ("v", "e</w>"),
        ("wa", "ve</w>"),
        ("e", "a</w>"),
        ("s", "ea</w>"),
        ("r", "e"),
        ("re", "d</w>"),
    ]
    pieces = [*letters, *[f"{letter}</w>" for letter in letters], *["".join(pair) for pair in merges]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    vocabulary |= {"<|startoftext|>": START, "<|endoftext|>": END}
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(path)
    return path


def build(folder, **options) -> CLIPEncoder:
    return CLIPEncoder(CLIPEncoder.Spec(**{"from_pretrained": str(folder), "model_max_length": 16, **options}))


def test_reference_pooled_state(reference, folder):
    found = build(folder).encode_tokens(reference.inputs("run")["input_ids"])
    torch.testing.assert_close(found, reference.outputs("run")["pooler_output"], atol=1e-5, rtol=0)


def test_reference_hidden_states(reference, folder):
    found = build(folder).module(input_ids=reference.inputs("run")["input_ids"]).last_hidden_state
    torch.testing.assert_close(found, reference.outputs("run")["last_hidden_state"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_keys_with_and_without_prefix_and_beside_the_image_half(prefix, reference, folder, tmp_path, capsys):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = {f"{prefix}{key}": value for key, value in reference.state.items()}
    others = {"vision_model.post_layernorm.weight": torch.ones(3), "text_projection.weight": torch.ones(3, 3)}
    save_file(state | others, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = build(tmp_path).module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in reference.state.items())
    assert capsys.readouterr().err == ""  # no table of weights that nobody needs, no progress bar


def test_prompt_is_one_vector(folder):
    encoder = build(folder)
    conditioning = encoder.encode(["a wave", "a red sea", ""])
    assert conditioning.text_embedding.shape == (3, 1, 32)
    assert conditioning.text_mask is None
    assert (encoder.width, encoder.max_length) == (32, 1)


def test_vector_is_that_of_the_first_end_token(folder):
    encoder = build(folder)
    assert encoder.tokenizer("wave").input_ids[0] == START
    ids = torch.tensor([encoder.tokenizer("a wave", padding="max_length", max_length=16).input_ids])
    end = ids[0].tolist().index(END)
    expected = encoder.module(input_ids=ids[:, : end + 1]).last_hidden_state[:, -1]
    torch.testing.assert_close(encoder.encode(["a wave"]).text_embedding[:, 0], expected, atol=1e-6, rtol=0)


def test_long_prompts_are_cut(folder):
    encoder = build(folder, model_max_length=6)
    long, cut = encoder.encode(["a red wave a red sea a wave", "a red wave a"]).text_embedding
    assert torch.equal(long, cut)


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("", ""),
        ("a red wave a", ""),
        ("A red  wave a RED Sea", "RED Sea"),
        ("a red wave wavesea", "vesea"),  # its first token, "wa", fits
    ],
)
def test_says_what_it_cuts_off(prompt, cut, folder):
    encoder = build(folder, model_max_length=6)
    assert encoder.cut_off(prompt) == cut
    assert max_tokens(encoder) == max_tokens(CachedTextEncoder(encoder, capacity=0)) == 6


def test_an_empty_prompt_is_remembered(folder):
    encoder = build(folder)
    told = CachedTextEncoder(encoder, capacity=10_000).encode(["", "wave"])
    assert torch.equal(told.text_embedding[:1], encoder.encode([""]).text_embedding)


def test_prompts_are_not_cleaned(folder):
    encoder = build(folder)
    decorated, plain = encoder.encode(["<b>wave</b>", "wave"]).text_embedding
    assert not torch.equal(decorated, plain)


def test_more_tokens_than_positions(folder):
    with pytest.raises(ConfigError, match="model_max_length is 77, but this encoder has positions for 16"):
        build(folder, model_max_length=77)


def test_folder_that_lacks_weights(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    state.pop(next(key for key in state if key.endswith("final_layer_norm.weight")))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 of its weights are missing, such as .*final_layer_norm.weight"):
        build(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(WeightsError, match=r'CLIP text encoder: there is no folder ".*nowhere"'):
        build(tmp_path / "nowhere")


def test_shapes_without_weights(folder):
    with torch.device("meta"):
        local = CLIPEncoder(CLIPEncoder.Spec(from_pretrained=str(folder), model_max_length=16), meta=True)
        published = CLIPEncoder(CLIPEncoder.Spec(), meta=True)
    assert (local.width, published.width, published.max_length) == (32, 512, 1)
    assert sum(parameter.numel() for parameter in published.parameters()) == 63_165_952  # of the published text half
    assert all(parameter.is_meta for parameter in published.parameters())


def test_conforms(folder):
    report = check_text_encoder("clip", from_pretrained=str(folder), model_max_length=16, prompts=["a wave", "", "red"])
    assert any("cuts off" in title for title in report.passed)
