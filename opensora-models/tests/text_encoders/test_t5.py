"""T5: reference vectors on a tiny encoder, and prompts through a tiny tokenizer, both in a folder as the hub has them."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from opensora.core.errors import WeightsError
from opensora.models.text_encoders.t5 import T5Encoder

WORDS = ["\u2581a", "\u2581wave", "\u2581sea", "\u2581red", "\u2581"]


@pytest.fixture(scope="module")
def reference(golden):
    return golden("t5_encoder")


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    module = T5EncoderModel(T5Config(**reference.config))
    module.load_state_dict(reference.state, strict=False)
    module.save_pretrained(path)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *[(word, -1.0) for word in WORDS]]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(path)
    return path


def build(folder, **options) -> T5Encoder:
    return T5Encoder(T5Encoder.Spec(**{"from_pretrained": str(folder), "model_max_length": 6, **options}))


def test_reference_hidden_states(reference, folder):
    given = reference.inputs("run")
    found = build(folder).encode_tokens(given["input_ids"], given["attention_mask"])
    torch.testing.assert_close(found, reference.outputs("run")["last_hidden_state"], atol=1e-5, rtol=0)


def test_prompts_are_padded_and_cut_to_the_length(folder):
    encoder = build(folder)
    conditioning = encoder.encode(["a wave", "a red sea a red wave a", ""])
    assert conditioning.text_embedding.shape == (3, 6, 32)
    assert (encoder.width, encoder.max_length) == (32, 6)
    assert conditioning.text_mask.dtype == torch.bool
    assert conditioning.text_mask.sum(dim=1).tolist() == [3, 6, 1]  # an end token each


def test_embedding_is_that_of_the_tokens(folder):
    encoder = build(folder)
    ids = torch.tensor([[3, 4, 1, 0, 0, 0]])  # a, wave, end, padding
    expected = encoder.encode_tokens(ids, (ids != 0).long())
    torch.testing.assert_close(encoder.encode(["a wave"]).text_embedding, expected, atol=1e-6, rtol=0)


def test_prompts_are_cleaned_unless_told_otherwise(folder):
    encoder, plain = build(folder), build(folder, clean_text=False)
    decorated = ["A   <b>wave</b>"]
    assert torch.equal(encoder.encode(decorated).text_embedding, encoder.encode(["a wave"]).text_embedding)
    assert not torch.equal(plain.encode(decorated).text_embedding, plain.encode(["a wave"]).text_embedding)


def test_prompt_does_not_depend_on_its_batch(folder):
    encoder = build(folder)
    together = encoder.encode(["a wave", "a red sea"]).text_embedding
    torch.testing.assert_close(encoder.encode(["a red sea"]).text_embedding, together[1:], atol=1e-5, rtol=0)


def test_is_frozen_and_in_eval_mode(folder):
    encoder = build(folder, shardformer=True)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.encode(["a"]).text_embedding.requires_grad


def test_missing_folder(tmp_path):
    with pytest.raises(WeightsError, match=r'T5 encoder: there is no folder ".*nowhere"'):
        build(tmp_path / "nowhere")


def test_folder_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"T5 encoder .* can't be read"):
        build(tmp_path)


def test_hub_repository_that_is_not_in_the_cache(tmp_path):
    with pytest.raises(WeightsError, match="local cache: set local_files_only = False"):
        build("nobody/nothing", local_files_only=True, cache_dir=str(tmp_path))


def test_shapes_without_weights(folder):
    with torch.device("meta"):
        local = T5Encoder(T5Encoder.Spec(from_pretrained=str(folder)), meta=True)
        published = T5Encoder(T5Encoder.Spec(from_pretrained="DeepFloyd/t5-v1_1-xxl", model_max_length=300), meta=True)
    assert local.width == 32
    assert (published.width, published.max_length) == (4096, 300)
    count = sum(parameter.numel() for parameter in published.parameters())
    assert count == 4_762_310_656  # of the published encoder
    assert all(parameter.is_meta for parameter in published.parameters())
