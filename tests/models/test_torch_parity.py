"""Live comparison with PyTorch transformers: what the golden files cannot show, in both directions.

Needs the extra `parity`. With SMOLLM2_GGUF set to the path of a SmolLM2-135M-Instruct GGUF file, the real
model is compared as well.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm.models.checkpoints.pretrained import from_pretrained, load_config, save_pretrained
from jaxrl_llm.models.checkpoints.tokenizers import load_tokenizer
from jaxrl_llm.models.families import family_for
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh

torch = pytest.importorskip("torch", reason="PyTorch is needed only to compare with it: pip install -e '.[parity]'")

CASES = sorted(path.stem for path in Path(__file__).with_name("golden").glob("*.npz"))
TOLERANCE = 1e-4

# transformers and torch warn of their own deprecations; ours stay errors in every other file
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def padded_logits(model, rows):
    """PyTorch's logits of right-padded rows under an attention mask."""
    length = max(map(len, rows))
    tokens = torch.tensor([[*row.tolist(), *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_both_directions(case, golden_module, tmp_path, load_case):
    """PyTorch's folder gives us its logits, padded rows included; our folder gives PyTorch the same bits."""
    model = golden_module.torch_model(case)
    model.save_pretrained(tmp_path / "torch")
    transformer, params = load_case(case, tmp_path / "torch")
    rows = [row for group in golden_module.sequences(golden_module.tokens(case)) for row in group]
    expected = padded_logits(model, rows)
    tokens = np.zeros(expected.shape[:2], np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    ours = np.asarray(jax.jit(transformer.logits)(params, tokens))
    for number, row in enumerate(rows):
        np.testing.assert_allclose(ours[number, : len(row)], expected[number, : len(row)], atol=TOLERANCE, rtol=0)

    from transformers import AutoModelForCausalLM

    folder = save_pretrained(tmp_path / "ours", transformer, params)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    state, original = loaded.state_dict(), model.state_dict()
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], value) for name, value in original.items())
    np.testing.assert_array_equal(padded_logits(loaded, rows), expected)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        *((case, None) for case in ("gemma2", "gemma3_long", "olmo2", "smollm3_window", "phi3", "phi3_longrope_long")),
        ("olmo2", MeshConfig(fsdp=2, tensor=4)),  # twice as many heads of keys and values as there are
        pytest.param("gemma3_long", MeshConfig(data=2, tensor=2, fsdp=2), marks=pytest.mark.slow),
        *(
            pytest.param(case, None, marks=pytest.mark.slow)
            for case in ("llama", "mistral_window", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
        ),
    ],
)
def test_greedy_texts_are_those_of_generate(case, sizes, golden_module, tmp_path, load_case):
    """Our sampler, its caches read layer by layer; prompts of different lengths at once; of one device and of eight."""
    model = golden_module.torch_model(case)
    model.save_pretrained(tmp_path / "torch")
    transformer, params = load_case(case, tmp_path / "torch")
    batch = golden_module.tokens(case)
    sampling = SamplingConfig(max_tokens=8, temperature=0.0)
    mesh = make_mesh(devices=jax.devices()[:1]) if sizes is None else make_mesh(sizes)
    params = jax.device_put(params, transformer.shardings(mesh))
    sampler = Sampler(transformer, sampling, group=2, stop_tokens=(), mesh=mesh)
    rollout = sampler(params, batch["prompt"], batch["prompt_lengths"], np.zeros(2, np.uint32), 0)
    for prompt, length, ours in zip(batch["prompt"], batch["prompt_lengths"], rollout.completion[:, 0], strict=True):
        ids = torch.tensor(prompt[None, :length].astype(np.int64))
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert theirs[0, length:].tolist() == np.asarray(ours).tolist()


@pytest.mark.parametrize("case", ["llama_llama3_long", "qwen2_upper_window", "qwen3_tied_bias"])
def test_folder_as_transformers_4_writes_it(case, golden_module, tmp_path):
    model = golden_module.torch_model(case)
    model.save_pretrained(tmp_path / "torch")
    expected = load_config(tmp_path / "torch")
    path = tmp_path / "torch" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))
    assert load_config(tmp_path / "torch") == expected


def test_random_initialisation_survives_the_trip_to_pytorch_in_bfloat16(golden_config, tmp_path):
    from transformers import AutoModelForCausalLM

    path = tmp_path / "config"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(golden_config("qwen3")))
    transformer = Transformer(dataclasses.replace(load_config(path), param_dtype="bfloat16"))
    params = jax.jit(transformer.init)(jax.random.key(0))
    folder = save_pretrained(tmp_path / "ours", transformer, params, max_shard_bytes=10_000)
    model = AutoModelForCausalLM.from_pretrained(folder)  # dtype from config.json
    assert model.dtype == torch.bfloat16
    embed = model.get_input_embeddings().weight.float().detach().numpy()
    np.testing.assert_array_equal(embed, np.asarray(params["embed"]["weight"], np.float32))


@pytest.mark.parametrize(
    "case", ["llama", "llama_tied_mha", "mistral_window", "qwen2", "qwen3", "gemma2", "gemma3_long", "phi3"]
)
def test_gguf_as_transformers_reads_it(case, gguf_writer, golden_module, tmp_path):
    """transformers reads the files that our tests write as we do: their layout is not only ours."""
    import gguf
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    def tokenizer(writer):  # transformers takes the vocabulary's size from it
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{number}" for number in range(48)])
        writer.add_token_merges(["a b"])
        writer.add_pad_token_id(0)  # the default of some is none of this vocabulary

    # transformers ignores the head size that a Qwen3 file states, so it must be the default one
    source = golden_module.torch_model(case, **({"head_dim": 128} if case == "qwen3" else {}))
    config, tensors = (
        source.config.to_dict(),
        {name: p.detach().numpy() for name, p in source.named_parameters()},
    )
    kinds = {"v_proj": gguf.GGMLQuantizationType.Q8_0, "q_proj": gguf.GGMLQuantizationType.Q4_1}
    path = gguf_writer(tmp_path / "m.gguf", config, tensors, kinds=kinds, extra=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    transformer, params = from_pretrained(path)
    folder = save_pretrained(tmp_path / "ours", transformer, params)
    ours = load_file(folder / "model.safetensors")
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    if transformer.config.tie_embeddings:
        theirs.pop("lm_head.weight")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert family_for(transformer.config).model_type == config["model_type"]


SMOLLM2 = os.environ.get("SMOLLM2_GGUF")
GREEDY_TOKENS = 16


def greedy_texts(transformer, params, prompts, tokenizer) -> list[str]:
    """What our sampler writes after right-padded prompts."""
    sampler = Sampler(
        transformer,
        SamplingConfig(max_tokens=GREEDY_TOKENS, temperature=0.0),
        group=1,
        stop_tokens=(tokenizer.eos_token_id,),
        mesh=make_mesh(devices=jax.devices()[:1]),
    )
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    rollout = sampler(params, padded, lengths, np.zeros(2, np.uint32), 0)
    completions = zip(np.asarray(rollout.completion[:, 0]), np.asarray(rollout.completion_lengths[:, 0]), strict=True)
    return [tokenizer.decode(row[:length].tolist(), skip_special_tokens=False) for row, length in completions]


def torch_greedy_text(model, prompt, tokenizer) -> str:
    """What PyTorch's `generate` writes after one prompt."""
    ids = torch.tensor([prompt])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=GREEDY_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )[0, len(prompt) :]
    return tokenizer.decode(written.tolist(), skip_special_tokens=False)


def test_greedy_text_of_experts(golden_module, tmp_path):
    model, length = golden_module.torch_model("qwen2_moe"), 5
    model.save_pretrained(tmp_path)
    tokens = golden_module.tokens("qwen3_moe")["prompt"][:, :length]
    sampler = Sampler(
        *(from_pretrained(tmp_path)[0], SamplingConfig(max_tokens=GREEDY_TOKENS, temperature=0.0)),
        group=1,
        stop_tokens=(),
        mesh=make_mesh(devices=jax.devices()[:1]),
    )
    rollout = sampler(from_pretrained(tmp_path)[1], tokens, np.full(2, length), np.zeros(2, np.uint32), 0)
    ids = torch.tensor(tokens.astype(np.int64))
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=GREEDY_TOKENS)
    np.testing.assert_array_equal(rollout.completion[:, 0], written[:, length:].numpy())


@pytest.mark.skipif(SMOLLM2 is None, reason="SMOLLM2_GGUF is not set")
@pytest.mark.parametrize("texts_too", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_real_model_from_gguf(texts_too, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    path = Path(SMOLLM2 or "")
    options = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    ).eval()
    theirs, ours = AutoTokenizer.from_pretrained(path.parent, **options), load_tokenizer(path)
    messages = [{"role": "user", "content": "Natalia sold 48 clips to 3 friends. How many is that each? It's $16."}]
    text = ours.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs.encode(text, add_special_tokens=False)

    transformer, params = from_pretrained(path)
    logits = np.asarray(jax.jit(transformer.logits)(params, np.array([ids], np.int32)))[0]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=5e-4, rtol=0)  # 30 layers, logits up to 40
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
    if not texts_too:
        return

    # Greedy text, of prompts of different lengths at once.
    questions = ("Name three colours.", messages[0]["content"], "What is the capital of France? Answer in one word.")
    prompts = [
        ours.encode(
            ours.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False),
            add_special_tokens=False,
        )
        for q in questions
    ]
    texts = greedy_texts(transformer, params, prompts, ours)
    assert texts == [torch_greedy_text(model, prompt, ours) for prompt in prompts]
    assert len(set(texts)) == len(texts) and all(texts)

    # Our export: PyTorch computes from it what it computes from the file.
    folder = save_pretrained(tmp_path / "ours", transformer, params, tokenizer=ours)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        np.testing.assert_array_equal(loaded(torch.tensor([ids])).logits[0].numpy(), expected)
    assert AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False) == ids
