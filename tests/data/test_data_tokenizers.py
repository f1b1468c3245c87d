import json
import subprocess
import sys

import numpy as np
import pytest

from jaxrl_llm.data.tokenizers import CharTokenizer

TEXTS = ["12+7=19", "", " 1  + 2\n", "<eos>", "é+日"]


@pytest.fixture
def tokenizer() -> CharTokenizer:
    return CharTokenizer("0123456789+= \n<eos>é日")


def test_ids_follow_the_alphabet():
    tokenizer = CharTokenizer("01+=")
    assert tokenizer.encode("1+0=") == [3, 4, 2, 5]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer.vocab_size == len(tokenizer) == 6


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_exact_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_written_or_skipped():
    tokenizer = CharTokenizer("01")
    ids = np.array([3, 2, 1, 0, 0], np.int32)
    assert tokenizer.decode(ids) == "10<eos><pad><pad>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "10"


def test_unknown_character_is_named_with_its_position():
    with pytest.raises(ValueError, match=r"character 'x' at position 2 of '1\+x'"):
        CharTokenizer("01+").encode("1+x")


@pytest.mark.parametrize("token", [-1, 4])
def test_unknown_id_raises(token):
    with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 4 tokens"):
        CharTokenizer("01").decode([2, token])


@pytest.mark.parametrize(("alphabet", "message"), [("", "empty"), ("0110", r"repeats \['0', '1'\]")])
def test_bad_alphabet(alphabet, message):
    with pytest.raises(ValueError, match=message):
        CharTokenizer(alphabet)


def test_no_chat_template():
    with pytest.raises(ValueError, match="no chat template"):
        CharTokenizer("01").apply_chat_template([{"role": "user", "content": "1"}])


def test_saved_folder_loads_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    assert CharTokenizer.from_pretrained(tmp_path / "new" / "folder") == tokenizer


def test_saved_folder_loads_in_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id) == (0, 1, None)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.decode(ids) == text
    assert loaded.decode([2, 1, 0], skip_special_tokens=True) == "0"
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        loaded.encode("1x")


@pytest.mark.parametrize("vocabulary", [{"a": 0, "b": 1}, {"<pad>": 0, "<eos>": 1, "word": 2}, [["a", 0.1]]])
def test_another_tokenizer_is_refused(tmp_path, vocabulary):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    with pytest.raises(ValueError, match="not a character tokenizer"):
        CharTokenizer.from_pretrained(tmp_path)


def test_needs_neither_transformers_nor_torch(tmp_path):
    code = (
        "import sys\n"
        "from jaxrl_llm.data.tokenizers import CharTokenizer\n"
        f"CharTokenizer('01').save_pretrained({str(tmp_path)!r})\n"
        "assert not {'transformers', 'torch', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
