"""Live comparison of score models with PyTorch transformers, in both directions; needs the extra `parity`."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from jaxrl_llm.models.checkpoints.score_pretrained import load_score_model, save_score_model
from jaxrl_llm.models.config import RopeConfig
from jaxrl_llm.models.families import family_of
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.rows import PaddedLayout
from jaxrl_llm.models.transformer import Transformer

torch = pytest.importorskip("torch", reason="PyTorch is needed only to compare with it: pip install -e '.[parity]'")

# transformers and torch warn of their own deprecations; ours stay errors in every other file
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

PAD, PROMPT_WIDTH, WIDTH = 0, 4, 6
TOLERANCE = 1e-4


class Padding:
    """As much of a tokenizer as tells PyTorch what padding is."""

    bos_token_id, eos_token_id, pad_token_id = None, 1, PAD

    def save_pretrained(self, folder: str) -> None:
        """Writes nothing."""


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, ...]:
    """Prompts, their lengths, two answers each and their mask; no token is the padding."""
    rng = np.random.default_rng(0)
    lengths = np.array([[6, 1], [3, 5], [2, 4]])
    mask = np.arange(WIDTH) < lengths[..., None]
    completion = np.where(mask, rng.integers(1, 64, (3, 2, WIDTH)), PAD)
    return rng.integers(1, 64, (3, PROMPT_WIDTH)), np.array([1, 4, 3]), completion, mask


def sequences(rows: tuple[np.ndarray, ...]) -> np.ndarray:
    """`[P·G, T]`, right-padded."""
    prompt, prompt_lengths, completion, mask = rows
    whole = np.full((*mask.shape[:2], PROMPT_WIDTH + WIDTH), PAD)
    for p, g in np.ndindex(*mask.shape[:2]):
        tokens = [*prompt[p, : prompt_lengths[p]], *completion[p, g][mask[p, g]]]
        whole[p, g, : len(tokens)] = tokens
    return whole.reshape(-1, whole.shape[-1])


def of_torch(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(tokens != PAD).long()).logits.numpy()


GEMMA = {"norm_offset": 1.0, "scale_embeddings": True, "qk_norm": True, "norms": "sandwich", "activation": "gelu_tanh"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False, "qk_norm": True}, GEMMA, {"rope": RopeConfig(partial=0.5)}],
    ids=["llama", "qwen3_untied", "gemma3", "phi3"],
)
def test_reward_model_in_both_directions(changes, tiny_config, lively_params, rows, tmp_path):
    same_scores_in_both_directions(tiny_config(**changes), lively_params, rows, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gemma2", "smollm3", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss_long", "olmo2"])
def test_reward_model_of_a_family(case, golden_config, lively_params, rows, tmp_path):
    described = golden_config(case)
    family = family_of(described)
    config = dataclasses.replace(family.read_config(described), family=family.model_type, vocab_size=64, remat="none")
    same_scores_in_both_directions(config, lively_params, rows, tmp_path)


def same_scores_in_both_directions(config, lively_params, rows, tmp_path):
    """What transformers computes of the folder that we write, and we of the one that it writes."""
    from transformers import AutoModelForSequenceClassification

    model = ScoreModel(Transformer(config))
    params = lively_params(model)
    folder = save_score_model(tmp_path / "ours", model, params, tokenizer=Padding())
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ours = np.asarray(jax.jit(model.scores)(params, PaddedLayout.of(*rows[:3]), rows[3]))
    np.testing.assert_allclose(ours.reshape(-1), of_torch(theirs, sequences(rows))[:, 0], atol=TOLERANCE, rtol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    loaded, arrays, _ = load_score_model(tmp_path / "theirs", remat="none")
    assert loaded == model
    chex.assert_trees_all_equal(arrays, params)
    written = json.loads((folder / "config.json").read_text())["architectures"]
    assert written == [type(theirs).__name__]


def test_process_reward_model_in_both_directions(tiny_config, lively_params, rows, tmp_path):
    from transformers import AutoModelForTokenClassification

    model = ScoreModel(Transformer(tiny_config()), outputs=2, bias=True)
    params = lively_params(model)
    folder = save_score_model(tmp_path / "ours", model, params, tokenizer=Padding())
    theirs = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ours = np.asarray(jax.jit(model.token_scores)(params, PaddedLayout.of(*rows[:3])))
    expected = of_torch(theirs, sequences(rows)).reshape(3, 2, -1, 2)
    for p, g in np.ndindex(3, 2):
        length = rows[3][p, g].sum()
        own = expected[p, g, rows[1][p] : rows[1][p] + length]
        np.testing.assert_allclose(ours[p, g, :length], own, atol=TOLERANCE, rtol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    loaded, arrays, _ = load_score_model(tmp_path / "theirs", remat="none")
    assert loaded == model
    chex.assert_trees_all_equal(arrays, params)
