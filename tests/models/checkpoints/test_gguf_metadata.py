"""Metadata of GGUF files that cannot be right, of the model and of its tokenizer: each is named."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from jaxrl_llm.models.checkpoints.gguf import METADATA
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained, load_config, load_generation_config
from jaxrl_llm.models.checkpoints.tokenizers import load_tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGED = ["hi", "Ġhi"]
TOKENS = ["<end>", *BYTES, *MERGED]
TOKENIZER = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": TOKENS,
    "token_type": [3] + [1] * (len(TOKENS) - 1),
    "merges": ["h i", "Ġ hi"],
    "eos_token_id": 0,
}
NEVER = ("", "four", -3, math.nan, math.inf, [1, 2], ["x"], 2**31)


def add(writer, key, value):
    """Puts a value of any type where the writer may have one; `None` takes it out."""
    for stored in writer.kv_data:
        stored.pop(key, None)
    kinds = {bool: "BOOL", int: "INT64", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    if value is not None:
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])


@pytest.fixture
def model(tmp_path, gguf_writer, golden_config, golden_tensors):
    """A golden model as a GGUF file, some of its metadata changed."""

    def write(changes, case="qwen2"):
        def extra(writer):
            for key, value in changes.items():
                add(writer, key, value)

        return gguf_writer(tmp_path / "model.gguf", golden_config(case), golden_tensors(case), extra=extra)

    return write


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer as a GGUF file, some of it changed, with an embedding of as many rows as it is told."""

    def write(changes=(), rows=259):
        writer = gguf.GGUFWriter(tmp_path / "tokenizer.gguf", "llama")
        for key, value in (TOKENIZER | dict(changes)).items():
            add(writer, f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}", value)
        writer.add_tensor("token_embd.weight", np.zeros((rows, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "tokenizer.gguf"

    return write


@pytest.mark.parametrize("key", METADATA)
def test_no_metadata_is_taken_as_it_comes(key, model):
    for value in NEVER[: -1 if key.startswith("rope.freq_base") else None]:
        with pytest.raises(ValueError, match=rf"model\.gguf: qwen2\.{key}=.* must be "):
            load_config(model({f"qwen2.{key}": value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qwen2.attention.head_count": 0}, r"qwen2\.attention\.head_count=0 must be a whole number from 1"),
        ({"qwen2.attention.head_count": None}, r"no metadata 'qwen2\.attention\.head_count'"),
        ({"qwen2.attention.head_count": 5, "qwen2.attention.key_length": None}, "must be a multiple of head_count=5"),
        ({"qwen2.rope.freq_base": 0.0}, r"qwen2\.rope\.freq_base=0\.0 must be a number above 1"),
        ({"qwen2.block_count": True}, r"qwen2\.block_count=True must be a whole number"),
        ({"qwen2.rope.scale_linear": 4.0}, r"rope\.scale_linear=4\.0"),
        ({"split.count": "two"}, "split.count='two' must be a whole number"),
        ({"split.count": 2}, "one of 2 parts"),
        ({"general.architecture": ["qwen2"]}, r"architecture \['qwen2'\] is not supported"),
        ({"general.architecture": None}, "architecture None is not supported"),
    ],
)
def test_metadata_of_the_model(changes, message, model):
    path = model(changes)
    for read in (load_config, from_pretrained):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


def test_a_factor_without_a_type_is_linear(model):
    """As llama.cpp reads it."""
    assert load_config(model({"qwen2.rope.scaling.factor": 2.0})).layer_kinds[0].rope.scaling == "linear"


# ---------------------------------------------------------------- the tokenizer


def test_a_whole_tokenizer_is_taken(tokenizer):
    path = tokenizer()
    loaded = load_tokenizer(path)
    assert loaded.tokenize("hi hi") == ["hi", "Ġhi"] and loaded.eos_token == "<end>"
    assert load_generation_config(path) == {"eos_token_id": [0]}


def test_single_characters_need_no_merges(tokenizer):
    characters = {"tokens": TOKENS[:257], "token_type": [3] + [1] * 256, "merges": None}
    assert load_tokenizer(tokenizer(characters, rows=257)).tokenize("hi") == ["h", "i"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, r"ggml\.tokens is missing"),
        ({"tokens": [1] * len(TOKENS)}, r"ggml\.tokens=\[1, 1, 1, 1, \.\.\.\] must be a list"),
        ({"tokens": "abc"}, r"ggml\.tokens='abc' must be a list"),
        ({"tokens": [*TOKENS[:-1], "h"]}, r"ggml\.tokens has \['h'\] more than once"),
        ({"tokens": TOKENS[:200], "token_type": [1] * 200}, r"ggml\.tokens has 200 .* token_embd\.weight 259 rows"),
        ({"tokens": [*TOKENS, "xx"], "token_type": [1] * 260}, r"ggml\.tokens has 260 .* token_embd\.weight 259 rows"),
        ({"token_type": None}, r"ggml\.token_type is missing"),
        ({"token_type": [1, 2]}, r"ggml\.token_type has 2 elements for 259 tokens"),
        (
            {"token_type": [9] * len(TOKENS)},
            r"ggml\.token_type=.* each element a whole number from 0 to 6",
        ),
        ({"merges": None}, r"ggml\.merges is missing: tokens such as 'hi' would never be made"),
        ({"merges": [1, 2]}, r"ggml\.merges=\[1, 2\] must be a list"),
        ({"merges": ["h o"]}, "tokens and merges are inconsistent"),
        ({"model": "llama"}, r"ggml\.scores is missing"),
        ({"model": "llama", "scores": [0.0]}, r"ggml\.scores has 1 elements for 259 tokens"),
        ({"model": "llama", "scores": [math.nan] * len(TOKENS)}, r"ggml\.scores=\[nan.* must be a list"),
        ({"model": None}, r"ggml\.model=None is not supported"),
        ({"pre": 3}, r"ggml\.pre=3 must be a text"),
        ({"eos_token_id": 99999}, r"ggml\.eos_token_id=99999 must be a whole number from 0 to 258"),
        ({"eos_token_id": -1}, r"ggml\.eos_token_id=-1 must be"),
        ({"eos_token_id": "<end>"}, r"ggml\.eos_token_id='<end>' must be"),
        ({"bos_token_id": 259}, r"ggml\.bos_token_id=259 must be a whole number from 0 to 258"),
        ({"padding_token_id": 2**32 - 1}, r"ggml\.padding_token_id=4294967295 must be"),
        ({"unknown_token_id": 1.0}, r"ggml\.unknown_token_id=1\.0 must be"),
        ({"add_bos_token": "false"}, r"ggml\.add_bos_token='false' must be true or false"),
        ({"add_eos_token": 1}, r"ggml\.add_eos_token=1 must be true or false"),
        ({"chat_template": 3}, r"tokenizer\.chat_template=3 must be a text"),
    ],
)
def test_missing_and_impossible_parts_of_a_tokenizer(changes, message, tokenizer):
    path = tokenizer(changes)
    with pytest.raises(ValueError, match=rf"^{path}: .*{message}"):
        load_tokenizer(path)


@pytest.mark.parametrize("damaged", [b"<end>", b"smollm", b"gpt2"])
def test_text_that_is_damaged(damaged, tokenizer):
    path = tokenizer()
    path.write_bytes(path.read_bytes().replace(damaged, b"\xff" + damaged[1:], 1))
    with pytest.raises(ValueError, match=rf"^{path}: tokenizer\.ggml\.\w+ is no text"):
        load_tokenizer(path)


@pytest.mark.parametrize("changes", [{"eos_token_id": None}, {"eos_token_id": None, "bos_token_id": 0}])
def test_a_file_without_a_token_that_ends_a_text(changes, tokenizer):
    with pytest.raises(ValueError, match=r"ggml\.eos_token_id is missing: no token would end a completion"):
        load_generation_config(tokenizer(changes))


def test_one_of_the_tokens_that_end_a_turn_is_enough(tokenizer):
    assert load_generation_config(tokenizer({"eos_token_id": None, "eot_token_id": 1})) == {"eos_token_id": [1]}
