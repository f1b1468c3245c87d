"""Tokenizers from folders and GGUF files, and the tokens at which completions stop."""

from __future__ import annotations

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from jaxrl_llm.models.checkpoints import tokenizers
from jaxrl_llm.models.checkpoints.locate import import_transformers
from jaxrl_llm.models.checkpoints.pretrained import from_pretrained, load_generation_config, save_pretrained
from jaxrl_llm.models.checkpoints.tokenizers import load_tokenizer, stop_token_ids

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DEFINED = ["<think>"]
# Merges that show where text was cut before merging: digits, spaces, contractions, letters with their space.
MERGES = ["1 2", "12 3", "Ġ Ġ", "Ġ h", "Ġh i", "h i", "' s", "' S", "Ċ Ċ", "Ġ 1", "Ã ©"]


def byte_level_vocab() -> list[str]:
    merged = [merge.replace(" ", "") for merge in MERGES]
    whole = ["hihihi"]  # a word in the vocabulary that no merge makes
    return SPECIAL + DEFINED + sorted(pre_tokenizers.ByteLevel.alphabet()) + merged + whole


def write_tokenizer(path, *, model="gpt2", pre="smollm", tokens=None, template=CHATML, extra=lambda writer: None):
    tokens = tokens or byte_level_vocab()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kinds = {
        **dict.fromkeys(SPECIAL, gguf.TokenType.CONTROL),
        **dict.fromkeys(DEFINED, gguf.TokenType.USER_DEFINED),
    }
    kinds |= {"<unk>": gguf.TokenType.UNKNOWN, "<s>": gguf.TokenType.CONTROL, "</s>": gguf.TokenType.CONTROL}
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    if model == "gpt2":
        writer.add_token_merges(MERGES)
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eot_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "123", ["123"]),
        ("gpt-2", " 1", ["Ġ1"]),
        ("gpt-2", "it'S", ["i", "t", "'", "S"]),  # contractions in lower case only
        ("smollm", "123", ["1", "2", "3"]),
        ("smollm", " 1", ["Ġ", "1"]),
        ("smollm", "  12", ["ĠĠ", "1", "2"]),
        ("smollm", "\n\n1", ["ĊĊ", "1"]),
        ("smollm", "  hi", ["Ġ", "Ġhi"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("qwen2", "it'S", ["i", "t", "'S"]),
        ("llama-bpe", "1231", ["123", "1"]),
        ("llama-bpe", "hihihi", ["hihihi"]),  # a whole word before merges
        ("qwen2", "hihihi", ["hi", "hi", "hi"]),
        ("qwen2", "e\u0301", ["Ã©"]),  # composed first
        ("llama-bpe", "e\u0301", ["e", "Ì", "ģ"]),
        ("tekken", "123", ["1", "2", "3"]),
        ("gpt-4o", "1231", ["123", "1"]),
    ],
)
def test_text_is_split_as_in_training(pre, text, expected, tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", pre=pre))
    assert pieces(tokenizer, text) == expected


def test_words_of_gpt_oss(tmp_path):
    backend = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", pre="gpt-4o")).backend_tokenizer
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("it's HiHi 1234")]
    assert words == ["it's", "ĠHi", "Hi", "Ġ", "123", "4"]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_any_text_survives(pre, tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", pre=pre))
    text = "Hi, it's  12345 … naïve 北京 🙂\n\n\tdef f(x): return x  "
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_and_template(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode("<|im_start|>hi<|im_end|><think>", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "hi", "<|im_end|>", "<think>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi<think>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0, None)
    assert len(tokenizer) == len(byte_level_vocab())  # nothing was added behind the model's embedding


@pytest.mark.parametrize(
    ("pre", "stated", "adds"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_beginning_of_sequence_is_added_where_the_file_says(pre, stated, adds, tmp_path):
    def extra(writer):
        if stated is not None:
            writer.add_add_bos_token(stated)

    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", pre=pre, extra=extra))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hi")) == (["<|im_start|>"] if adds else []) + ["hi"]
    assert pieces(tokenizer, "hi") == ["hi"]


def test_sentencepiece(tmp_path):
    """Merges follow the scores; unknown characters fall back to bytes; a space is put in front once."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words = {"▁": -9, "a": -9, "b": -9, "c": -9, "ab": -1, "bc": -2, "▁a": -3, "▁ab": -4, "abc": -5}
    scores = [0.0] * len(tokens) + [float(score) for score in words.values()]
    tokens += list(words)

    def extra(writer):
        writer.add_token_scores(scores)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    path = write_tokenizer(tmp_path / "t.gguf", model="llama", pre="default", tokens=tokens, template=None, extra=extra)
    tokenizer = load_tokenizer(path)
    assert pieces(tokenizer, "ab") == ["▁ab"]
    assert pieces(tokenizer, "abc") == ["▁ab", "c"]  # "ab" is merged first, then "▁ab" before "abc"
    assert pieces(tokenizer, "bc") == ["▁", "bc"]
    assert pieces(tokenizer, "aé") == ["▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a</s>"))[0] == "<s>"  # the default of these files
    assert tokenizer.decode(tokenizer.encode("ab é abc", add_special_tokens=False)) == "ab é abc"
    assert tokenizer.chat_template is None
    assert stop_token_ids(tokenizer) == (2,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre": "deepseek-coder"}, r"pre='deepseek-coder' is not known.*known: gpt-2.*Hugging Face folder"),
        ({"pre": None}, "pre=None is not known"),
        ({"tokens": ["a", "b", "c"]}, "inconsistent"),
        ({"model": "bert"}, "model='bert' is not supported; known: gpt2, llama"),
    ],
)
def test_unknown_tokenizers(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write_tokenizer(tmp_path / "t.gguf", **options))


# ---------------------------------------------------------------- folders


@pytest.fixture
def fast_tokenizer():
    """A byte-level tokenizer whose chat template ends turns with another token than its end of sequence."""
    tokens = {token: number for number, token in enumerate(byte_level_vocab())}
    backend = Tokenizer(BPE(vocab=tokens, merges=[tuple(merge.split(" ")) for merge in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=CHATML
    )


def test_stop_tokens_of_a_chat_template(fast_tokenizer):
    assert fast_tokenizer.eos_token_id == 0
    assert stop_token_ids(fast_tokenizer) == (
        0,
        2,
    )  # <|im_end|> is in no list, but the template ends turns with it
    assert stop_token_ids(fast_tokenizer, {"eos_token_id": [2, 7]}) == (0, 2, 7)
    assert stop_token_ids(fast_tokenizer, {"eos_token_id": 9}) == (0, 9, 2)
    fast_tokenizer.chat_template = None
    assert stop_token_ids(fast_tokenizer, {"eos_token_id": None}) == (0,)
    fast_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    assert stop_token_ids(fast_tokenizer) == (0,)


def test_stop_tokens_of_a_gguf_file(tmp_path):
    path = write_tokenizer(tmp_path / "t.gguf", template=None)
    assert load_generation_config(path) == {"bos_token_id": 1, "eos_token_id": [0, 2]}
    assert stop_token_ids(load_tokenizer(path), load_generation_config(path)) == (0, 2)


def test_exported_folder_has_the_tokenizer_and_its_stop_tokens(fast_tokenizer, checkpoint, tmp_path):
    transformer, params = from_pretrained(checkpoint("llama"))
    folder = save_pretrained(tmp_path / "export", transformer, params, tokenizer=fast_tokenizer)
    loaded = load_tokenizer(folder)
    text = "hi  123 it's <|im_end|>"
    assert loaded.encode(text) == fast_tokenizer.encode(text)
    assert loaded.chat_template == CHATML
    assert load_generation_config(folder)["eos_token_id"] == [0, 2]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == [0, 2]
    assert import_transformers().GenerationConfig.from_pretrained(str(folder)).eos_token_id == [0, 2]


def test_gguf_tokenizer_survives_export(checkpoint, tmp_path):
    transformer, params = from_pretrained(checkpoint("llama"))
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", pre="llama-bpe"))
    loaded = load_tokenizer(save_pretrained(tmp_path / "export", transformer, params, tokenizer=tokenizer))
    random = np.random.RandomState(0)
    alphabet = [*"hi 123's\n\té北", "<think>", "<|im_end|>"]
    for _ in range(50):
        text = "".join(random.choice(alphabet, 20))
        assert loaded.encode(text) == tokenizer.encode(text), text


def test_the_class_that_a_llama_names_is_that_which_transformers_finds(fast_tokenizer, checkpoint):
    folder = checkpoint("llama")
    fast_tokenizer.save_pretrained(folder)
    assert tokenizers._is_generic(folder)
    theirs = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = load_tokenizer(folder)
    assert type(ours) is type(theirs) and ours.init_kwargs == theirs.init_kwargs
    assert ours.get_vocab() == theirs.get_vocab()


def test_folder_without_tokenizer(checkpoint):
    with pytest.raises(ValueError, match=r"has no tokenizer: none of tokenizer\.json"):
        load_tokenizer(checkpoint("llama"))


def test_broken_tokenizer_file(checkpoint):
    folder = checkpoint("llama")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"the tokenizer in .*llama_checkpoint cannot be loaded"):
        load_tokenizer(folder)


def test_no_notice_about_pytorch():
    """A user who needs no PyTorch is not told that it is missing; nothing is left in the environment."""
    code = (
        "import os; from jaxrl_llm.models.checkpoints.tokenizers import import_transformers;"
        "import_transformers().AutoTokenizer;"
        "print('TRANSFORMERS_NO_ADVISORY_WARNINGS' in os.environ)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert "PyTorch" not in done.stderr
