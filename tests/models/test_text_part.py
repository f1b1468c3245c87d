"""Checkpoints of models that also see, of which the text model is read; beside PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="PyTorch is needed only to compare with it: pip install -e '.[parity]'")

from jaxrl_llm.models.checkpoints.pretrained import (  # noqa: E402
    from_pretrained,
    load_config,
    load_generation_config,
    save_pretrained,
    what_is_left_out,
)
from jaxrl_llm.models.families.wrapped import text_tensor  # noqa: E402

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
SEEING = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CASES = {
    "gemma3": ("gemma3_long", "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
    "mistral3": ("mistral_window", "Mistral3ForConditionalGeneration", "MistralForCausalLM"),
}


def whole_model(name: str, golden_config: Any) -> Any:
    """A random model that also sees, around the text model of a golden case."""
    import transformers

    case, architecture, _ = CASES[name]
    text = {key: value for key, value in golden_config(case).items() if key != "architectures"}
    config = transformers.AutoConfig.for_model(
        name,
        text_config=text,
        vision_config={**SEEING, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_text_model_is_read_and_written(name: str, golden_config: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = whole_model(name, golden_config)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(TOKENS)).logits.numpy()
    folder = tmp_path / "torch"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert len({text_tensor(tensor) for tensor in tensors}) < len(tensors)  # the rest has no name: it is left out
    other = {tensor.replace("language_model.model.", "model.language_model."): x for tensor, x in tensors.items()}
    if other.keys() == tensors.keys():
        other = {tensor.replace("model.language_model.", "language_model.model."): x for tensor, x in tensors.items()}
        other = {("language_model." if t.startswith("lm_head") else "") + t: x for t, x in other.items()}
    assert other.keys() != tensors.keys()
    for spelling in (tensors, other):  # as transformers 4 and 5 write them
        save_file(spelling, folder / "model.safetensors", metadata={"format": "pt"})
        transformer, params = from_pretrained(folder)
        ours = np.asarray(jax.jit(transformer.logits)(params, TOKENS))
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    text = CASES[name][2]
    assert f"saved as a {text}" in str(what_is_left_out(folder))

    exported = save_pretrained(tmp_path / "ours", transformer, params)
    assert json.loads((exported / "config.json").read_text())["architectures"] == [text]
    assert what_is_left_out(exported) is None
    loaded = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_allclose(loaded(torch.tensor(TOKENS)).logits.numpy(), expected, atol=1e-5, rtol=0)


PUBLISHED = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def test_a_published_config_leaves_out_what_is_by_default(tmp_path: Path) -> None:
    """As that of Gemma-3-4B: 8 heads, 4 of keys and values, of 256, and a vocabulary with room for the other tokens."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = load_config(tmp_path)
    sizes = (config.vocab_size, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim)
    assert sizes == (262_208, 34, 8, 4, 256) and config.tie_embeddings
    ropes = {kind.window: (kind.rope.theta, kind.rope.scaling, kind.rope.factor) for kind in config.kinds if kind.rope}
    assert ropes == {1024: (1e4, "none", 1.0), None: (1e6, "linear", 8.0)}
    assert load_generation_config(tmp_path) == {"eos_token_id": [1, 106]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "text_config=None must be an object, where model_type='gemma3'"),
        (
            {"text_config": {"model_type": "llama"}},
            "text_config.model_type='llama' is not supported inside of 'gemma3'",
        ),
        ({"text_config": {"num_hidden_layers": 0}}, "num_hidden_layers=0"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "writes no text, as Gemma3ForCausalLM does"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | change))
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)
