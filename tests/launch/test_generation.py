"""Sampling without training."""

from __future__ import annotations

import ast
import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_llm.cli import Policy, generate
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.compilation import CompilationCounter

TOKENIZER = CharTokenizer("0123456789+=")
PROMPTS = ["1+1=", "20+2=", "3="]
SAMPLING = SamplingConfig(max_tokens=12)


@pytest.fixture(scope="module")
def policy() -> Policy:
    """A random model that ends some completions."""
    config = ModelConfig(len(TOKENIZER), 16, 32, 2, 4, 2, 8, max_position_embeddings=32, tie_embeddings=True)
    model = Transformer(config)
    params = jax.tree.map(lambda leaf: 8 * leaf, model.init(jax.random.key(0)))
    return Policy(model, params, TOKENIZER, (TOKENIZER.eos_token_id, TOKENIZER.encode("0")[0]))


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_completions_are_those_of_the_sampler(policy, mesh):
    made = generate(policy, PROMPTS, sampling=SAMPLING, samples=3, seed=5, mesh=mesh)
    encoded = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    tokens = np.array([ids + [0] * (32 - len(ids)) for ids in encoded], np.int32)
    lengths = np.array([len(ids) for ids in encoded])
    sampler = Sampler(policy.model, SAMPLING, group=3, stop_tokens=policy.stop_tokens, mesh=mesh)
    rollout = sampler(policy.params, tokens, lengths, np.asarray(jax.random.key_data(jax.random.key(5))), 0)
    for (row, sample), length in np.ndenumerate(np.asarray(rollout.completion_lengths)):
        ours, finished = made[row][sample], bool(rollout.finished[row, sample])
        assert ours.tokens == rollout.completion[row, sample, :length].tolist()
        np.testing.assert_array_equal(ours.logprobs, rollout.logprobs[row, sample, :length])
        said = [token for token in ours.tokens[: length - finished] if token > 1]
        assert (ours.text, ours.finished) == (TOKENIZER.decode(said), finished)
    assert {completion.finished for group in made for completion in group} == {True, False}


def test_prompts_do_not_depend_on_those_behind_them(policy, mesh):
    whole = generate(policy, PROMPTS, sampling=SAMPLING, samples=2, mesh=mesh)
    assert [len(group) for group in whole] == [2, 2, 2]
    few = generate(policy, PROMPTS[:2], sampling=dataclasses.replace(SAMPLING, slots=1), samples=2, mesh=mesh)
    assert [[one.text for one in group] for group in few] == [[one.text for one in group] for group in whole[:2]]


def test_a_second_call_compiles_nothing(policy, mesh):
    first = generate(policy, PROMPTS, sampling=SAMPLING, mesh=mesh)
    with CompilationCounter() as counter:
        mark = counter.mark()
        again = generate(policy, PROMPTS, sampling=dataclasses.replace(SAMPLING), seed=1, mesh=mesh)
        assert counter.since(mark) == {}
    assert again != first


@pytest.mark.parametrize(("samples", "sampled"), [(1, 4), (2, 4), (4, 3)])
def test_devices_that_do_not_divide_the_prompts(samples, sampled, policy, mesh, monkeypatch):
    """As few prompts as fill four devices are sampled again."""
    eight, given = make_mesh(MeshConfig(fsdp=4, tensor=2)), []
    call = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, *args: given.append(len(args[1])) or call(self, *args))
    policies = dataclasses.replace(policy, params=jax.device_put(policy.params, policy.model.shardings(eight))), policy
    ours, expected = (
        generate(policy, PROMPTS, sampling=SAMPLING, samples=samples, mesh=mesh)
        for policy, mesh in zip(policies, (eight, mesh), strict=True)
    )
    assert given == [sampled, 3]
    assert [[one.tokens for one in group] for group in ours] == [[one.tokens for one in group] for group in expected]


def test_a_stop_text_cuts_the_completion(policy, mesh):
    """As where it is looked for in the whole text; the tokens end with its last one."""
    whole = generate(policy, PROMPTS, sampling=SAMPLING, samples=8, mesh=mesh)
    long = next(one for group in whole for one in group if len(one.text) > 6)
    stop = long.text[3:5]
    cut = generate(policy, PROMPTS, sampling=SAMPLING, samples=8, stop=[stop, "==="], mesh=mesh)
    pairs = [pair for groups in zip(whole, cut, strict=True) for pair in zip(*groups, strict=True)]
    for before, after in pairs:
        at = before.text.find(stop)
        if at < 0:
            assert dataclasses.replace(after, logprobs=[]) == dataclasses.replace(before, logprobs=[])
            continue
        assert (after.text, after.finished) == (before.text[:at], True)
        assert TOKENIZER.decode([token for token in after.tokens if token > 1]) == before.text[: at + 2]
        assert after.tokens == before.tokens[: len(after.tokens)]
        np.testing.assert_allclose(after.logprobs, before.logprobs[: len(after.tokens)], atol=1e-5)
    assert any(before.text != after.text for before, after in pairs)


class Bytes:
    """A token a byte, three a Chinese character."""

    bos_token_id = eos_token_id = pad_token_id = None
    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        return [bytes([number]) for number in range(256)]


@pytest.mark.parametrize(
    ("stop", "text", "kept"),
    [
        (["漢字"], "ab", "ab漢字"),
        (["b"], "a", "ab"),
        (["b漢字c", "漢"], "ab", "ab漢"),  # the first to be complete, not to begin
        (["漢", "b漢"], "a", "ab漢"),
        (["no"], "ab漢字c", "ab漢字c"),
    ],
)
def test_tokens_reach_to_the_last_byte_of_a_stop_text(stop, text, kept, mesh):
    """A model that says each byte of a text after the one before it."""
    said = "1ab漢字c".encode()
    config = ModelConfig(256, 256, 8, 1, 1, 1, 8, max_position_embeddings=32)
    model = Transformer(config)
    params = jax.tree.map(np.zeros_like, model.init(jax.random.key(0)))
    params["embed"]["weight"] = np.eye(256, dtype=np.float32)
    params["final_norm"]["scale"] = np.ones(256, np.float32)
    params["lm_head"]["weight"] = np.zeros((256, 256), np.float32)
    for before, after in itertools.pairwise(said):
        params["lm_head"]["weight"][after, before] = 1.0
    policy, greedy = Policy(model, params, Bytes(), ()), SamplingConfig(max_tokens=len(said) - 1, temperature=0)
    [[cut]] = generate(policy, ["1"], sampling=greedy, stop=stop, mesh=mesh)
    assert (cut.text, bytes(cut.tokens).decode(), cut.finished) == (text, kept, stop != ["no"])
    assert len(cut.logprobs) == len(cut.tokens)


def test_what_the_readme_shows_runs(tiny, tmp_path, monkeypatch, capsys):
    section = (Path(__file__).parents[2] / "README.md").read_text().split("## Use the sampler alone")[1]
    code = section.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    tiny.save_checkpoint(tmp_path / "tiny")
    exec(compile(code.replace("SmolLM2-135M-Instruct.gguf", "tiny"), "README.md", "exec"), {})
    groups = [ast.literal_eval(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(group) for group in groups] == [2, 2]


def test_what_cannot_be_completed_is_told_with_its_number(policy, mesh):
    for prompts, stop, message in (
        ([], (), "there are no prompts"),
        ("1+1=", (), "lists of texts"),
        (["1="], "0", "lists of texts"),
        (["1="], [""], r"sampling.stop=\(''\,\) is out of range"),
        (["1="], ["a\ufffd"], "holds what stands for no character"),
        (["1=", ""], (), "prompt 1: "),
        (["1=", "x"], (), "prompt 1: character 'x'"),
        (["1=", [{"role": "user", "content": "1"}]], (), "prompt 1: .*no chat template"),
        (["1=", [{"content": "1"}]], (), "prompt 1: .*role"),
        (["1" * 21], (), "21 tokens and sampling.max_tokens=12 exceed the model's 32 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(policy, prompts, sampling=SAMPLING, stop=stop, mesh=mesh)
