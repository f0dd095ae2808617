"""T5: reference vectors on a tiny encoder, and prompts through a tiny tokenizer, both in a folder as the hub has them."""

from __future__ import annotations

import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from opensora.core.accelerator import Single, SingleSpec
from opensora.core.errors import MachineError, WeightsError
from opensora.core.testing import check_text_encoder
from opensora.core.text_cache import CachedTextEncoder
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
    save_tokenizer(path)
    return path


def save_tokenizer(path) -> None:
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *[(word, -1.0) for word in WORDS]]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(path)


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


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("", ""),
        ("a red sea a red", ""),
        ("A <b>RED</b> sea   a red WAVE a", "wave a"),  # as it is read: cleaned
        ("red https://example.com/a/very/long/address clip_0007.mp4 @someone sea a wave", ""),
        ("red wave \u6d77\u6d77\u6d77\u6d77\u6d77\u6d77 sea", ""),
    ],
    ids=["empty", "fits", "cut", "fits once cleaned", "Chinese is not read"],
)
def test_says_what_it_cuts_off(prompt, cut, folder):
    assert build(folder).cut_off(prompt) == cut


def test_what_it_cuts_off_uncleaned(folder):
    plain = build(folder, clean_text=False)
    assert plain.cut_off("a red sea  a red https://sea") == "https://sea"


def test_what_it_cuts_off_of_ten_thousand_words_is_known_at_once(folder):
    begin = time.perf_counter()
    cut = build(folder).cut_off("red wave " * 5000)
    assert time.perf_counter() - begin < 1
    assert len(cut.split()) == 9995


def test_an_empty_prompt_is_remembered(folder):
    encoder = build(folder)
    told = CachedTextEncoder(encoder, capacity=10_000).encode(["", "a wave"])
    assert torch.equal(told.text_embedding[:1], encoder.encode([""]).text_embedding)
    assert told.text_mask.sum(1).tolist() == [1, 3]


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


# ---- other sizes and relatives

SMALL = {"vocab_size": 16, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
RELATIVES = {
    "the first T5": lambda: T5ForConditionalGeneration(T5Config(**SMALL, feed_forward_proj="relu")).eval(),
    "T5 v1.1": lambda: T5EncoderModel(T5Config(**SMALL, feed_forward_proj="gated-gelu")).eval(),
    "UMT5": lambda: UMT5EncoderModel(UMT5Config(**SMALL)).eval(),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_any_size(name, tmp_path):
    torch.manual_seed(0)
    module = RELATIVES[name]()
    module.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    encoder = build(tmp_path)
    ids = torch.tensor([[3, 4, 1, 0, 0, 0]])
    with torch.no_grad():
        expected = module.get_encoder()(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    torch.testing.assert_close(encoder.encode(["a wave"]).text_embedding, expected, atol=1e-6, rtol=0)
    with torch.device("meta"):
        empty = T5Encoder(encoder.spec, meta=True)
    assert {key: each.shape for key, each in empty.state_dict().items()} == {
        key: each.shape for key, each in encoder.state_dict().items()
    }


@pytest.mark.parametrize("meta", [True, False])
def test_folder_of_another_kind_of_model(meta, tmp_path):
    BertConfig().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(WeightsError, match=r'its config.json is that of a "bert" model'):
        T5Encoder(T5Encoder.Spec(from_pretrained=str(tmp_path)), meta=meta)


def test_folder_that_lacks_weights(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    state.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 of its weights are missing, such as .*block.1.*q.weight"):
        build(tmp_path)


# ---- half precision and 8 bits


def place(encoder: T5Encoder, dtype: torch.dtype) -> T5Encoder:
    """As the pipelines do."""
    return Single(SingleSpec(), device="cpu", dtype="fp32").place(encoder, dtype=dtype)


def test_in_fp16_what_would_overflow_stays_float32(folder):
    encoder, spoiled = build(folder), build(folder)
    for each in (encoder, spoiled):
        for block in each.module.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(3e4)
    expected = encoder.encode(["a wave"]).text_embedding
    place(encoder, torch.float16)
    kept = {key for key, value in encoder.named_parameters() if value.dtype is torch.float32}
    assert kept == {f"module.encoder.block.{index}.layer.1.DenseReluDense.wo.weight" for index in (0, 1)}
    found = encoder.encode(["a wave"]).text_embedding
    assert found.dtype is torch.float16
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    assert not spoiled.half().encode(["a wave"]).text_embedding.allclose(found, atol=0.02, rtol=0.02)


def test_in_bf16_all_is_bf16(folder):
    assert {each.dtype for each in place(build(folder), torch.bfloat16).parameters()} == {torch.bfloat16}


def pretend_installed(monkeypatch, *names):
    for name in ("bitsandbytes", "accelerate"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module if name in names else None)


@pytest.mark.parametrize(
    ("installed", "missing"),
    [([], "bitsandbytes and accelerate"), (["accelerate"], "bitsandbytes"), (["bitsandbytes"], "accelerate")],
)
def test_8_bits_need_packages(installed, missing, folder, monkeypatch):
    pretend_installed(monkeypatch, *installed)
    with pytest.raises(MachineError, match=rf'needs {missing}: pip install "opensora-models\[8bit\]"'):
        build(folder, load_in_8bit=True)


def test_8_bits_are_asked_of_transformers(folder, monkeypatch):
    asked = {}

    def from_pretrained(source, **options):
        asked.update(options, source=source)
        return T5EncoderModel(T5Config(**SMALL)), {"missing_keys": set()}

    pretend_installed(monkeypatch, "bitsandbytes", "accelerate")
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", from_pretrained)
    build(folder, load_in_8bit=True)
    assert asked["source"] == str(folder)
    assert asked["dtype"] is torch.float16
    assert asked["quantization_config"].load_in_8bit is True
    asked.clear()
    build(folder)
    assert asked["dtype"] is torch.float32
    assert "quantization_config" not in asked


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of bitsandbytes
def test_8_bits_give_nearly_the_same(folder):
    exact = build(folder).encode(["a wave"]).text_embedding
    encoder = place(build(folder, load_in_8bit=True), torch.float16)
    assert any(each.dtype is torch.int8 for each in encoder.parameters())
    found = encoder.encode(["a wave"]).text_embedding.float()
    assert (found - exact).norm() <= 0.05 * exact.norm()


def test_conforms(folder):
    prompts = ["a wave", "", "red sea"]
    report = check_text_encoder("t5", from_pretrained=str(folder), model_max_length=6, prompts=prompts)
    assert any("cuts off" in title for title in report.passed)


def test_a_fingerprint_is_of_the_tokens(folder, tmp_path):
    import shutil

    encoder = build(folder)
    assert encoder.fingerprint() == build(folder, clean_text=False).fingerprint()
    shutil.copytree(folder, tmp_path / "other")
    other = build(tmp_path / "other")
    assert other.fingerprint() == encoder.fingerprint()
    other.tokenizer.add_tokens(["zebra"])
    assert other.fingerprint() != encoder.fingerprint()
