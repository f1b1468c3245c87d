"""Small tokenizers that treat spaces as real ones do: SentencePiece of several kinds, and bytes."""

from __future__ import annotations

import functools
from typing import Any, Literal

Kind = Literal["prepend", "first", "always", "never", "bytes"]
KINDS: tuple[Kind, ...] = ("prepend", "first", "always", "never", "bytes")
"""A space before each piece of text between special tokens (Llama 2 and Mistral 0.1 as converted); before the first
piece (TinyLlama, newer conversions); before each that has none (T5); none (Gemma); bytes (GPT-2, Llama 3, Qwen)."""

TEXT = "the capital of France is Paris . user assistant system yes no hello what London four 4 5\nyes.\n\nno\n\n\n\n"
_SPLIT = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Of Llama 3, without its contractions."""
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]


@functools.cache
def _backend(kind: Kind) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    spaces = "▁"
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([TEXT] * 20, trainer)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=spaces, prepend_scheme="first", split=True)
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=SPECIAL + bytes_, max_token_length=12, show_progress=False
        )
        trained.train_from_iterator([line for line in TEXT.splitlines() if line] * 20, trainer)
        tokenizer = Tokenizer(trained.model)
        if kind == "prepend":
            steps = [normalizers.Prepend(spaces), normalizers.Replace(" ", spaces)]
            tokenizer.normalizer = normalizers.Sequence(steps)
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=spaces, prepend_scheme=kind, split=False)
        steps = [decoders.Replace(spaces, " "), decoders.ByteFallback(), decoders.Fuse()]
        strip = [] if kind == "never" else [decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps + strip)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def small_tokenizer(kind: Kind, template: str | None = None) -> Any:
    """A transformers tokenizer of one kind, with a chat template."""
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_backend(kind),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
"""Llama 2, Mistral: nothing after the prompt; the turn itself begins with a space."""
LINES = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
"""Zephyr, TinyLlama."""
MARKED = (
    "{% for m in messages %}<|end|>{{ m['role'] }}\n\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant\n\n{% endif %}"
)
"""Llama 3: a line break that merges with one that follows."""
PLAIN = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
PLAIN += "{% if add_generation_prompt %}assistant {% endif %}"
"""No token ends a turn, and the prompt ends with a space."""
