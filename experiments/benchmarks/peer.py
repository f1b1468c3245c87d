"""What the scripts of other frameworks share: prompts, the reward, the clock, the record."""

from __future__ import annotations

import random
import re
import time
from typing import Any

from measure import Bystanders, Shape, Work, conventional_flops, peak_rss_gib, process_age, summarise

COUNTED_TOKEN = 260
SHAPE = Shape()
ROWS = SHAPE.prompts * SHAPE.samples


def exact_texts(tokenizer: Any, count: int, *, tokens: int = SHAPE.prompt_tokens) -> list[str]:
    """Texts of exactly so many tokens, out of words that are one token wherever they stand."""
    draw, words = random.Random(0), []

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for token in draw.sample(range(len(tokenizer)), len(tokenizer)):
        if re.fullmatch(r" ?[a-z]+\d*", tokenizer.decode([token])):
            twice = encode(tokenizer.decode([token, token]))
            words += [token] if twice == [token, token] else []
        if len(words) == 256:
            break
    texts: list[str] = []
    for _ in range(100 * count):
        text = tokenizer.decode(draw.choices(words, k=tokens))
        if len(encode(text)) == tokens and len(texts) < count:
            texts.append(text)
    if len(texts) < count:
        raise ValueError(f"only {len(texts)} of {count} texts encode to {tokens} tokens again")
    return texts


class Times:
    """Seconds of each repetition; the first is start-up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start_up = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        if len(self.seconds) == 1:
            self.start_up, self.bystanders = process_age(), Bystanders()


def record(times: Times, work: Work, *, parameters: int, reference: bool = False, **about: Any) -> dict[str, Any]:
    """What is published of a work."""
    seconds = summarise(times.seconds[1:])
    flops = conventional_flops(work, parameters, SHAPE, reference=reference)
    return {
        **about,
        "work": work,
        "parameters": parameters,
        "seconds": seconds,
        "other_cpu": times.bystanders.share(),
        "start_up_s": round(times.start_up, 2),
        "peak_rss_gib": peak_rss_gib(),
        "tokens_per_second": round(SHAPE.sampled_tokens / seconds["median"], 1),
        "flops": {"convention": flops},
        "gflops_per_second": {"convention": round(1e-9 * flops / seconds["median"], 2)},
    }
