"""Rewards for the shape of a completion, whatever it says."""

from __future__ import annotations

import re

from jaxrl_llm.rewards.per_sample import RewardFunction, make_per_sample_reward


def make_regex_reward(pattern: str, *, flags: re.RegexFlag = re.DOTALL, name: str = "regex_reward") -> RewardFunction:
    """Returns the reward 1 for a completion that `pattern` matches as a whole, else 0.

    Args:
        pattern: A regular expression. Python's matcher has no time limit: avoid nested repetition such as
            `(a+)+`.
        flags: By default `.` also matches a newline.
        name: The metric's name.

    Raises:
        ValueError: If the pattern does not compile.
    """
    try:
        compiled = re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"{name}: the pattern {pattern!r} is no regular expression: {error}") from error

    def score(text: str) -> float:
        """1 where the pattern matches the whole completion, else 0."""
        return float(compiled.fullmatch(text) is not None)

    return make_per_sample_reward(score, name)


def make_think_answer_reward(
    *,
    reasoning_tag: str = "think",
    answer_tag: str = "answer",
    graded: bool = False,
    must_open: bool = False,
    name: str = "think_answer_reward",
) -> RewardFunction:
    """Returns the reward for `<think>…</think><answer>…</answer>`.

    A completion is well formed if each of the four tags occurs exactly once, in this order, with nothing but
    white space before, between and after the two blocks. Then the reward is 1, otherwise 0, or, graded,

        r = (k + w) / 5

    with k the number of tags that occur exactly once and w ∈ {0, 1} for a well-formed completion: a slope for
    a model that seldom gets everything right by chance. A tag that is repeated counts nothing, so spamming
    does not pay.

    Where the prompt ends in the opening tag (many templates write it), the completion begins inside the first
    block. A completion without that tag, whose first block does end, is taken so.

    Args:
        reasoning_tag: The first block's tag, without brackets.
        answer_tag: The second block's tag, without brackets.
        graded: Whether to give partial credit.
        must_open: Whether the completion itself must write the first tag.
        name: The metric's name.

    Raises:
        ValueError: If a tag is not a word, or both are the same.
    """
    if not (reasoning_tag.isidentifier() and answer_tag.isidentifier() and reasoning_tag != answer_tag):
        raise ValueError(f"{name}: the tags must be two different words, got {reasoning_tag!r} and {answer_tag!r}")
    tags = [f"<{reasoning_tag}>", f"</{reasoning_tag}>", f"<{answer_tag}>", f"</{answer_tag}>"]
    whole = re.compile(r"\s*{}.*{}\s*{}.*{}\s*".format(*tags), re.DOTALL)

    def score(text: str) -> float:
        """1 for a reasoning block, then an answer block, nothing else; graded: 1/5 for each single tag."""
        if not must_open and tags[0] not in text and tags[1] in text:
            text = tags[0] + text
        single = sum(text.count(tag) == 1 for tag in tags)
        well_formed = single == len(tags) and whole.fullmatch(text) is not None
        return (single + well_formed) / (len(tags) + 1) if graded else float(well_formed)

    return make_per_sample_reward(score, name)
