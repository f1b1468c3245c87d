"""Writes docs/objectives.md and docs/objectives/ from the docstrings, so that the pages cannot go stale.

    python docs/generate_objectives.py              # write them
    python docs/generate_objectives.py --check      # fail if they are not what the docstrings say

Every public function of `jaxrl_llm.losses` and `jaxrl_llm.advantages`, and of a few modules beside them, is on a page
(`documented.py`), a page a family: with the equation of its docstring in LaTeX (`equations.py`) if it has one, else by
its first sentence. The examples are the files of docs/examples.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from documented import PARTS, Entry, StaleError, entries, load, preset_names
from equations import latex_block

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent
CONTENTS, PAGES = "objectives.md", "objectives"
"""The page of contents, and the folder of the others, in docs/."""
COMMAND = "python docs/generate_objectives.py"
FRAMEWORKS = {"plain_jax": "plain JAX", "flax_nnx": "Flax NNX", "equinox_modules": "Equinox"}
"""Files of docs/examples, each with one function for each of `FAMILIES`."""
FAMILIES = {
    "policy_gradient": "A policy gradient",
    "advantages": "Advantages with a critic",
    "preference": "A preference loss",
    "reward_model": "A reward model",
    "distillation": "Fine-tuning and distillation",
}

INTRODUCTION = """\
Every loss and every advantage estimator is a pure function of arrays: it works under `jit`, `vmap` and `grad`, in any
code base, and importing it loads jax and numpy alone. *Terms* return the shape that they are given. *Named losses*
(`…_loss`) are terms with the reduction and the defaults of their paper, and return `(loss, metrics)`.

In the equations *A* is an advantage, *R* a reward or a return, *V* a value of a critic, π the policy, *r* = π / π_old
the importance ratio of a token, *H* an entropy; *t* counts tokens, *i* and *j* samples, *k* steps; *n* is a number of
tokens, *G* the size of a group. Of a preference pair *y_w* is the chosen completion, *y_l* the rejected one, *h* the
margin. sg is `stop_gradient`, σ the logistic function, Agg the reduction that the argument `aggregation` names
(`aggregate`). Upright names are arguments, and so are β (`beta`), γ (`gamma`), λ (`lam`), τ (`tau`), ….
"""

ARXIV = re.compile(r"(?<!\d)(\d{4}\.\d{5})(?!\d)")


# ---- The pages -----------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """The text of each page, by its path in docs/."""
    found = entries()
    sections = {
        entry.name: f"{slug(part)}.md#{slug(entry.name if entry.has_section else short_path(module))}"
        for part, modules in PARTS.items()
        for module in modules
        for entry in found[module]
    }
    used = preset_names()
    written = {CONTENTS: whole("Objectives", contents(found, sections))}
    written[f"{PAGES}/{slug(EXAMPLES)}.md"] = whole(EXAMPLES, examples())
    for part, modules in PARTS.items():
        lines = [line for module in modules for line in ["", *module_section(module, found[module], sections, used)]]
        written[f"{PAGES}/{slug(part)}.md"] = whole(part, [f"[All objectives](../{CONTENTS})", *lines])
    return written


def whole(title: str, lines: list[str]) -> str:
    """A page."""
    head = f"<!-- Written by `{COMMAND}` from the docstrings: change those, and run it again. -->"
    return "\n".join([head, "", f"# {title}", "", *lines]).rstrip() + "\n"


def contents(found: dict[str, list[Entry]], sections: dict[str, str]) -> list[str]:
    """What the letters mean, and a table for each part: function, what it is, paper."""
    sections = {name: f"{PAGES}/{target}" for name, target in sections.items()}
    lines = [link(INTRODUCTION, sections), f"Examples: [{EXAMPLES.lower()}]({PAGES}/{slug(EXAMPLES)}.md)"]
    for part, modules in PARTS.items():
        rows = [entry for module in modules for entry in found[module] if entry.has_section]
        lines += ["", f"## {part}", "", f"[Equations]({PAGES}/{slug(part)}.md)", "", "| | | |", "|---|---|---|"]
        lines += [
            f"| [`{e.name}`]({sections[e.name]}) | {cell(e.doc.summary)} | {papers(e.doc.source)} |" for e in rows
        ]
    return lines


def module_section(module: str, listed: list[Entry], sections: dict[str, str], used: dict[str, set[str]]) -> list[str]:
    """A module: what it says of itself, its functions with an equation, the others in a list."""
    short = short_path(module)
    summary, *rest = inspect.cleandoc(load(module).__doc__ or "").split("\n\n")
    lines = [f"## {short}", "", f"{link(' '.join(summary.split()), sections)} [code](../../jaxrl_llm/{short})"]
    for paragraph in rest:
        lines += ["", *block(paragraph, sections)]
    for entry in listed:
        if entry.has_section:
            lines += ["", *function_section(entry, sections, used)]
    if brief := [entry for entry in listed if not entry.has_section]:
        lines += ["", f"Also in `{short}`:", ""]
        lines += [f"- `{entry.name}`: {link(describe(entry), sections)}" for entry in brief]
    return lines


def short_path(module: str) -> str:
    """Where a module is, within the package."""
    return Path(load(module).__file__ or "").relative_to(REPOSITORY / "jaxrl_llm").as_posix()


def function_section(entry: Entry, sections: dict[str, str], used: dict[str, set[str]]) -> list[str]:
    """A function with an equation."""
    doc = entry.doc
    arguments = list(inspect.signature(entry.value).parameters)
    sections = {name: target for name, target in sections.items() if name != entry.name}
    lines = [f"### `{entry.name}`", "", link(doc.summary, sections)]
    lines += ["", "```math", latex_block(doc.equation, arguments=arguments), "```"]
    for paragraph in doc.prose:
        lines += ["", *block(paragraph, sections)]
    if doc.unlike:
        lines += ["", "**Unlike**" + link(doc.unlike, sections).removeprefix("Unlike")]
    lines += ["", "```python", signature(entry), "```"]
    facts = [f"Source: {with_links(doc.source)}"] if doc.source else []
    if chosen := [preset for preset, names in used.items() if entry.name in names]:
        where = (
            "[`jaxrl_llm.algorithms.policy_gradient.presets`](../../jaxrl_llm/algorithms/policy_gradient/presets.py)"
        )
        facts.append(f"Preset{'s' * (len(chosen) > 1)}: {', '.join(f'`{preset}`' for preset in chosen)} in {where}")
    return lines + ([""] + [f"- {fact}" for fact in facts] if facts else [])


def block(paragraph: str, sections: dict[str, str]) -> list[str]:
    """A paragraph; an indented one is code if Python reads it so, and else an equation."""
    if not paragraph.startswith("    "):
        return link(paragraph, sections).split("\n")
    content = textwrap.dedent(paragraph)
    try:
        ast.parse(content)
    except SyntaxError:
        return ["```math", latex_block(content), "```"]
    return ["```python", *content.split("\n"), "```"]


def signature(entry: Entry, width: int = 100) -> str:
    """Name, arguments and defaults, without types."""
    pieces, keyword_only = [], False
    for parameter in inspect.signature(entry.value).parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY and not keyword_only:
            pieces.append("*")
            keyword_only = True
        default = "" if parameter.default is parameter.empty else f"={_literal(parameter.default)}"
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        pieces.append(f"{stars}{parameter.name}{default}")
    text = ", ".join(pieces)
    if len(entry.name) + len(text) + 2 <= width:
        return f"{entry.name}({text})"
    wrapped = textwrap.fill(f"{text},", width - 4, break_on_hyphens=False)
    return f"{entry.name}(\n{textwrap.indent(wrapped, '    ')}\n)"


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def describe(entry: Entry) -> str:
    """One line on what has no equation: the first sentence, or the choices of a `Literal`."""
    if get_origin(entry.value) is Literal:
        return " | ".join(f'"{choice}"' for choice in get_args(entry.value))
    return entry.doc.summary


# ---- Examples ------------------------------------------------------------------------------------

EXAMPLES = "In your own code"


def examples() -> list[str]:
    """The functions of docs/examples: by family, the first framework open, the others folded."""
    sources = {stem: (FOLDER / "examples" / f"{stem}.py").read_text(encoding="utf-8") for stem in FRAMEWORKS}
    lines = [
        "Each function makes one step of gradient descent on a small recurrent model; the files are tested as they"
    ]
    lines += ["stand here. What the model is written in makes no difference to the functions: arrays go in.", ""]
    for stem, framework in FRAMEWORKS.items():
        preamble = sources[stem].split("\n# ----", 1)[0].split('"""', 2)[2].strip()
        lines += folded(f"The model in {framework}", preamble, stem)
    for name, family in FAMILIES.items():
        lines += [f"## {family}", ""]
        for number, (stem, framework) in enumerate(FRAMEWORKS.items()):
            code = function_source(sources[stem], name)
            lines += (["```python", code, "```", ""]) if number == 0 else folded(f"In {framework}", code, stem)
    return lines[:-1]


def folded(title: str, code: str, stem: str) -> list[str]:
    """Code that is shown on a click."""
    link_to = f"[docs/examples/{stem}.py](../examples/{stem}.py)"
    head = f'<details markdown="1"><summary>{title}</summary>'
    return [head, "", link_to, "", "```python", code, "```", "", "</details>", ""]


def function_source(source: str, name: str) -> str:
    """A function as it is written, decorators included."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    raise StaleError(f"an example lacks the function {name}")


# ---- Markdown ------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs make it."""
    return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))


def cell(text: str) -> str:
    """Text for a table."""
    return text.replace("|", "\\|").rstrip(".")


def link(text: str, sections: dict[str, str]) -> str:
    """Names that are on a page become links to where they are."""

    def one(found: re.Match[str]) -> str:
        name = found.group(1).rpartition(".")[2]
        return f"[`{name}`]({sections[name]})" if name in sections else found.group()

    return re.sub(r"`(?:jaxrl_llm\.\w+\.(?:\w+\.)?)?(\w+)`", one, text)


def with_links(source: str) -> str:
    """A source whose arXiv numbers are links."""
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def papers(source: str) -> str:
    """The papers of a source in short: its arXiv numbers, or else its first authors and year."""
    if numbers := dict.fromkeys(ARXIV.findall(source)):
        return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)
    return cell(source.split(",", 1)[0])


def stale(folder: Path, written: dict[str, str]) -> list[str]:
    """The pages of a folder that are not what they are to be, or not to be there."""
    there = {path.relative_to(folder).as_posix() for path in (folder / PAGES).glob("*.md")}
    same = {name for name, text in written.items() if (path := folder / name).exists() and path.read_text() == text}
    return sorted((there | written.keys()) - same)


def main(args: list[str] | None = None, folder: Path = FOLDER) -> int:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    check, written = parser.parse_args(args).check, pages()
    changed = stale(folder, written)
    if check and changed:
        print(f"{', '.join(changed)}: not what the docstrings say: run {COMMAND}", file=sys.stderr)
        return 1
    for name in changed:
        if name in written:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(written[name], encoding="utf-8")
        else:
            (folder / name).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
