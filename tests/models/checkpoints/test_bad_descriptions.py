"""Descriptions of models that cannot be right: one error each, which names file, entry and value."""

from __future__ import annotations

import json
import math
import os

import pytest

from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained, load_config, load_generation_config
from jaxrl_llm.models.checkpoints.tokenizers import load_tokenizer
from jaxrl_llm.models.families import family_of
from jaxrl_llm.models.families.config_json import CONFIG, ROPE

NEVER = ("", "x", "95", -2, 1.5e300, math.nan, math.inf, [[1]], {"a": {}}, 10**31, "\ud800")
"""Values that no entry may have; a mapping of mappings is none of `rope_parameters` either."""


@pytest.mark.parametrize("key", [key for key in CONFIG if "text" not in CONFIG[key].wanted])
def test_no_entry_of_config_json_is_taken_as_it_comes(key, golden_config):
    config = golden_config("qwen3")
    assert family_of(config).read_config(config)
    for value in NEVER:
        with pytest.raises(ValueError, match=key):
            changed = {**config, key: value}
            family_of(changed).read_config(changed)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("key", ROPE)
def test_no_entry_of_the_rotary_embedding_is_taken_as_it_comes(key, kind, golden_config):
    good = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for value in (*NEVER, 0 if "mscale" not in key else -1, True if key != "truncate" else 1):
        config = {**golden_config("llama"), "rope_parameters": {**good, key: value}}
        with pytest.raises(ValueError, match=key):
            family_of(config).read_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": "95"}, r"vocab_size='95' must be a whole number from 1 to 100000000 \(rows of the embedding\)"),
        ({"hidden_size": 32.0}, r"hidden_size=32\.0 must be a whole number"),
        ({"hidden_size": 33}, "hidden_size=33 must be a multiple of num_attention_heads=4"),
        ({"hidden_size": 33, "head_dim": 8}, "hidden_size=33 must be a multiple of num_attention_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be a whole number from 1 to 10000"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 must be a number above 0 and below 1"),
        ({"rms_norm_eps": 1}, "rms_norm_eps=1 must be a number above 0 and below 1"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' must be a list"),
        ({"quantization_config": "gptq"}, "quantization_config='gptq' must be an object"),
        ({"rope_parameters": "yarn"}, "rope_parameters='yarn' must be an object"),
        ({"rope_scaling": ["yarn"]}, r"rope_scaling=\['yarn'\] must be an object"),
        ({"rope_theta": 0}, "rope_theta=0 must be a number above 1"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, r"rope_parameters\.rope_theta='1e4' must be a number"),
        ({"rope_parameters": {"rope_theta": -1}}, r"rope_parameters\.rope_theta=-1 must be a number above 1"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling\.factor=0 must be a number from 1"),
        ({"rope_scaling": {"type": "yarn", "factor": -4}}, r"rope_scaling\.factor=-4 must be a number from 1"),
        ({"rope_scaling": {"type": "yarn", "beta_fast": 1.0}}, r"rope\.beta_fast=1\.0 must be above beta_slow=1\.0"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            r"rope\.high_freq_factor=4\.0 must be above low_freq_factor=4\.0",
        ),
    ],
)
def test_config_json(change, message, checkpoint):
    """The error comes before weights are read, and before transformers says it in its own way."""
    folder = checkpoint("llama", config=change)
    (folder / "model.safetensors").unlink()
    for read in (load_config, from_pretrained):
        with pytest.raises(ValueError, match=rf"llama_checkpoint/config\.json: {message}"):
            read(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 20_000, "not valid JSON: nested too deeply"),
        ('{"a":' * 20_000, "not valid JSON: nested too deeply"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', r"a key twice: \['c'\]"),
        ('{"a": NaN}', "a=nan is no finite number"),
        ('{"a": {"b": 1e999}}', "b=inf is no finite number"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("null", "not an object"),
        (None, "is no plain file"),
    ],
)
def test_files_that_are_no_json_object(name, content, message, checkpoint):
    path = checkpoint("llama") / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if content is None else path.write_text(content)  # a pipe, which none would ever write to
    with pytest.raises(ValueError, match=message) as error:
        load_generation_config(path.parent)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", ["2", -1, 10**5, True, 1.0, [[2]], [0, 10**5], ["2"], {"a": 2}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_tokens_that_end_a_text_are_of_the_vocabulary(name, value, checkpoint):
    path = checkpoint("llama") / name
    entries = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**entries, "eos_token_id": value}))
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id=.* must be a whole number from 0 to "):
        load_generation_config(path.parent)


def test_what_transformers_says_of_other_entries_is_one_line(checkpoint):
    folder = checkpoint("llama", config={"attention_dropout": "x"})
    CharTokenizer("0123").save_pretrained(folder)
    settings = (
        folder / "tokenizer_config.json"
    )  # of a class of its own, for which transformers reads the model's config
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(ValueError, match=r"llama_checkpoint cannot be loaded: .*attention_dropout") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
