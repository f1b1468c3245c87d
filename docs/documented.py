"""What docs/objectives.md describes: the public functions, and their docstrings taken apart."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_origin

from jaxrl_llm.algorithms.policy_gradient import presets

PACKAGES = ("jaxrl_llm.losses", "jaxrl_llm.advantages")

PARTS: dict[str, tuple[str, ...]] = {
    "Policy gradients": (
        *("losses.policy", "losses.reinforce", "losses.sequence", "losses.gates", "losses.geometric_mean"),
        *("losses.detached", "losses.covariance", "losses.regression", "losses.ratio"),
    ),
    "What is added to a policy loss": (
        *(
            "losses.kl_loss",
            "losses.kl",
            "losses.entropy",
            "losses.observation",
            "losses.correction",
            "losses.rejection",
            "losses.token_masks",
            "losses.router",
        ),
    ),
    "Critics": ("losses.value",),
    "Advantages": (
        *("advantages.group", "advantages.relative", "advantages.rloo", "advantages.reinforce", "advantages.remax"),
        *("advantages.gae", "advantages.token_baseline", "advantages.multi_reward", "advantages.entropy"),
        *("advantages.difficulty", "advantages.pairwise", "advantages.optimal", "advantages.roles"),
    ),
    "Rewards and filters": (
        *("advantages.shaping", "advantages.kl_control", "advantages.filters", "advantages.process"),
        *("advantages.selection",),
    ),
    "Preference pairs": (
        *("losses.dpo", "losses.preference", "losses.preference_sides", "losses.reference_free", "losses.aot"),
        *("losses.online", "losses.sequence_logprobs", "losses.preference_terms"),
    ),
    "Labelled completions": ("losses.kto", "losses.bco"),
    "Reward models": ("losses.reward", "losses.process_reward"),
    "Supervised learning and distillation": (
        "losses.supervised",
        "losses.distillation",
        "losses.self_distillation",
        "algorithms.star",
    ),
    "Trust region policy optimization": (
        *(
            "algorithms.trust_region.natural_gradient",
            "algorithms.trust_region.conjugate_gradient",
            "algorithms.trust_region.fisher",
        ),
    ),
    "Primitives": ("losses.aggregate", "logprobs", "masking", "records"),
}
"""Every module with public names, in the order of the page."""

SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Sources?|Example|Examples):", re.MULTILINE)
UNLIKE = re.compile(r"(?<!\S)Unlike\s.*?(?<!\bDr)(?<!\bal)[.](?=\s+[^a-z\s]|\s*$)", re.DOTALL)


class StaleError(Exception):
    """The page, or a list here, is not what the package is."""


@dataclasses.dataclass(frozen=True)
class Doc:
    """A docstring, taken apart."""

    summary: str
    equation: str
    """As it is written, or empty."""
    prose: tuple[str, ...]
    """Paragraphs, without the sentence of `unlike`."""
    unlike: str
    """The sentence that says how it differs from its neighbour."""
    source: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public name."""

    name: str
    value: Any
    doc: Doc

    @property
    def has_section(self) -> bool:
        """Whether it has a section of its own on the page, and not only a line."""
        return bool(self.doc.equation)


def parse_docstring(text: str | None) -> Doc:
    """Takes a docstring apart: summary, equation, paragraphs, the sentence with "Unlike", the source."""
    text = inspect.cleandoc(text or "")
    found = SECTION.search(text)
    body = text[: found.start()] if found else text
    source = re.search(r"^Sources?:(.*)\Z", text, re.MULTILINE | re.DOTALL)
    summary, *paragraphs = re.split(r"\n[ ]*\n", body.strip("\n")) or [""]
    equation = ""
    while paragraphs and paragraphs[0].startswith("    "):
        equation += "\n" * bool(equation) + textwrap.dedent(paragraphs.pop(0))
    unlike, prose = "", []
    for paragraph in paragraphs:
        sentence = None if unlike or paragraph.startswith(" ") else UNLIKE.search(paragraph)
        if sentence:
            unlike = " ".join(sentence.group().split())
            paragraph = (paragraph[: sentence.start()].rstrip() + "\n" + paragraph[sentence.end() :].lstrip()).strip()
        if paragraph:
            prose.append(paragraph)
    return Doc(
        summary=" ".join(summary.split()),
        equation=equation,
        prose=tuple(prose),
        unlike=unlike,
        source=" ".join(source.group(1).split()) if source else "",
    )


def load(name: str) -> ModuleType:
    """The module `jaxrl_llm.<name>`."""
    return importlib.import_module(f"jaxrl_llm.{name}")


def exported() -> dict[str, list[str]]:
    """Public names of `PACKAGES` by module (`losses.policy`), in the order in which they are defined there."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [alias.name for alias in node.names if alias.name in module.__all__]
                found.setdefault(node.module.removeprefix("jaxrl_llm."), []).extend(names)
    return {module: [name for name in defined(load(module)) if name in names] for module, names in found.items()}


def defined(module: ModuleType) -> list[str]:
    """Public names that a module defines, in order, but for constants in capitals."""
    tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names += [node.targets[0].id] * (not node.targets[0].id.isupper())
    return [name for name in names if not name.startswith("_")]


def entries() -> dict[str, list[Entry]]:
    """All that is documented, by module in the order of `PARTS`.

    Raises:
        StaleError: a module with public names is not in `PARTS`, or one in it is not there.
    """
    public = exported()
    listed = [module for modules in PARTS.values() for module in modules]
    if missing := set(public) - set(listed):
        raise StaleError(f"modules with public names that are in no part of PARTS: {', '.join(sorted(missing))}")
    for module in listed:
        if module.startswith(("losses.", "advantages.")) and module not in public:
            raise StaleError(f"PARTS lists {module}, which exports nothing")
    found = {}
    for module in listed:
        loaded = load(module)
        values = {name: getattr(loaded, name) for name in public.get(module) or defined(loaded)}
        found[module] = [
            Entry(name, value, parse_docstring(value.__doc__))
            for name, value in values.items()
            if inspect.isfunction(value) or inspect.isclass(value) or get_origin(value) is Literal
        ]
    return found


def preset_names() -> dict[str, set[str]]:
    """For each preset, the public functions that it is an instance of or made of.

    Those are the loss of its name (`grpo_loss`) or the advantage of its name, what its docstring names, and what the
    docstrings of its record and of the parts of that name.
    """
    public = {name for found in entries().values() for name in (entry.name for entry in found)}
    used = {}
    for function in (*presets.PRESETS, *presets.OF_ROLES, *presets.OF_GIVEN_ROWS):
        preset = function.__name__
        names = {f"{preset}_loss", f"{preset}_advantages"}
        for text in [function.__doc__ or "", *_record_docstrings(function())]:
            names |= {word.rpartition(".")[2] for word in re.findall(r"`([\w.]+)`", text)}
        used[preset] = names & public
    return used


def _record_docstrings(record: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(record):
        yield inspect.getdoc(type(record)) or ""
        for field in dataclasses.fields(record):
            yield from _record_docstrings(getattr(record, field.name))
