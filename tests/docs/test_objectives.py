"""The pages of objectives are what the docstrings say, their formulas and links are sound, docstrings lack no part."""

from __future__ import annotations

import ast
import inspect
import os
import re
from pathlib import Path

import pytest
from matplotlib.mathtext import MathTextParser

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pages(objectives) -> dict[str, str]:
    return objectives.pages()


@pytest.fixture(scope="module")
def page(pages) -> str:
    """All of them."""
    return "\n".join(pages.values())


def headings(page: str) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.*)$", prose, re.MULTILINE)


def test_the_pages_are_what_the_docstrings_say(objectives, pages):
    stale = objectives.stale(objectives.FOLDER, pages)
    assert not stale, f"{stale}: stale: run `{objectives.COMMAND}` and commit what it writes"


def test_check_tells_a_stale_page(objectives, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(objectives, "pages", lambda: {"objectives.md": "new\n", "objectives/critics.md": "too\n"})
    assert objectives.main([], tmp_path) == 0 and objectives.main(["--check"], tmp_path) == 0
    gone = tmp_path / "objectives" / "actors.md"
    gone.write_text("of a family that is no more")
    (tmp_path / "objectives.md").write_text("old\n")
    assert objectives.main(["--check"], tmp_path) == 1
    assert "objectives.md, objectives/actors.md: not what the docstrings say: run py" in capsys.readouterr().err
    assert objectives.main([], tmp_path) == 0 and objectives.main(["--check"], tmp_path) == 0 and not gone.exists()


def test_formulas_can_be_typeset(page):
    parser, formulas = MathTextParser("path"), re.findall(r"^```math\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert len(formulas) > 100
    for formula in formulas:
        assert formula.count(r"\begin{aligned}") == formula.count(r"\end{aligned}") <= 1
        inner = re.sub(r"\\(?:begin|end)\{aligned\}\n?", "", formula)
        for piece in re.split(r"\\\\\n|(?<!\\)&", inner):
            if piece.strip():
                parser.parse(f"${piece.strip()}$")


def test_links_lead_somewhere(objectives, pages):
    anchors = {name: [objectives.slug(heading) for heading in headings(text)] for name, text in pages.items()}
    for name, text in pages.items():
        assert len(anchors[name]) == len(set(anchors[name]))
        for link in re.findall(r"\]\(([^)]*)\)", text):
            if not link.startswith("https://arxiv.org/abs/"):
                path, _, anchor = link.partition("#")
                target = (objectives.FOLDER / name).parent / path
                assert target.is_file(), (name, link)
                known = anchors.get(os.path.relpath(target, objectives.FOLDER), [])
                assert not anchor or anchor in known, (name, link)


def test_all_that_is_public_is_there(documented, page):
    import jaxrl_llm.advantages
    import jaxrl_llm.losses

    described = [entry.name for listed in documented.entries().values() for entry in listed]
    assert len(described) == len(set(described))
    for name in (*jaxrl_llm.losses.__all__, *jaxrl_llm.advantages.__all__):
        assert name in described
        assert f"### `{name}`\n" in page or f"\n- `{name}`: " in page


def test_no_docstring_lacks_a_part(documented):
    """Summary, equation, "Unlike …" and source, but where a table at the top of the file takes their place."""
    lacking = []
    for module, listed in documented.entries().items():
        if not module.startswith(("losses.", "advantages.")) or "\n| " in (documented.load(module).__doc__ or ""):
            continue
        for entry in listed:
            parts = ("summary", "equation", "unlike", "source") if inspect.isfunction(entry.value) else ()
            lacking += [f"{module}.{entry.name}: {part}" for part in parts if not getattr(entry.doc, part)]
    assert not lacking, "docstrings lack parts of the form that CONTRIBUTING.md describes: " + "; ".join(lacking)


def test_presets_are_named_at_what_they_use(documented, objectives, page):
    """Each at the loss of its name, from the same paper, and at what its parts are made of."""
    described = {entry.name: entry for listed in documented.entries().values() for entry in listed}
    used = documented.preset_names()
    assert {"grpo_loss", "group_advantages"} <= used["grpo"]
    for preset, names in used.items():
        assert names, f"the preset {preset} names no loss or advantage of the page, nor has it the name of one"
        cited = getattr(documented.presets, preset).__doc__
        paper = objectives.ARXIV.search(cited) or re.search(r"[A-Z]\w+ \d{4}", cited)  # from before arXiv
        for name in names & {f"{preset}_loss", f"{preset}_advantages"}:
            assert paper and paper[0] in described[name].doc.source
        assert re.search(rf"^- Presets?: .*`{preset}`", page, re.MULTILINE)


def test_a_module_that_is_in_no_part_is_told(documented, monkeypatch):
    parts = {title: modules for title, modules in documented.PARTS.items() if title != "Critics"}
    monkeypatch.setattr(documented, "PARTS", parts)
    with pytest.raises(documented.StaleError, match=r"in no part of PARTS: losses\.value"):
        documented.entries()
    monkeypatch.setattr(documented, "PARTS", {**documented.PARTS, "Critics": ("losses.value", "losses.entropy")})
    monkeypatch.setattr(documented, "exported", lambda: {"losses.value": ["value_loss"]})
    with pytest.raises(documented.StaleError, match="exports nothing"):
        documented.entries()


def test_signatures_are_those_of_the_functions(documented, objectives):
    for listed in documented.entries().values():
        for entry in listed:
            if inspect.isfunction(entry.value):
                text = objectives.signature(entry)
                assert max(map(len, text.splitlines())) <= 100
                (stub,) = ast.parse(f"def {text}: pass").body
                ours, theirs = inspect.signature(entry.value).parameters.values(), stub.args
                given = [*theirs.args, *theirs.kwonlyargs, *([theirs.kwarg] if theirs.kwarg else [])]
                assert [argument.arg for argument in given] == [parameter.name for parameter in ours]
                defaults = [ast.literal_eval(node) for node in (*theirs.defaults, *theirs.kw_defaults) if node]
                assert defaults == [p.default for p in ours if p.default is not p.empty]


DOCSTRING = """A loss.

    a / b        b > 0
    c

Prose with `a`. Unlike `other_loss` of Doe et
al. 2020 or Dr. GRPO, it is
another. More of it.

    loss = f(x)

Args:
    a: A number.

Source: Doe 2020, "A
title" (2001.01234).
"""


def test_docstrings_are_taken_apart(documented, objectives):
    doc = documented.parse_docstring(DOCSTRING)
    assert doc.summary == "A loss."
    assert doc.equation == "a / b        b > 0\nc"
    assert doc.prose == ("Prose with `a`.\nMore of it.", "    loss = f(x)")
    assert doc.unlike == "Unlike `other_loss` of Doe et al. 2020 or Dr. GRPO, it is another."
    assert doc.source == 'Doe 2020, "A title" (2001.01234).'
    assert documented.parse_docstring(None) == documented.Doc("", "", (), "", "")
    assert objectives.block(doc.prose[1], {}) == ["```python", "loss = f(x)", "```"]
    assert objectives.block("    Σₜ xₜ / n", {})[1] == r"\frac{\sum_{t} x_{t}}{n}"


def test_the_examples_are_shown_as_they_are(objectives, page):
    for stem in objectives.FRAMEWORKS:
        source = (REPOSITORY / "docs" / "examples" / f"{stem}.py").read_text(encoding="utf-8")
        for family in objectives.FAMILIES:
            shown = objectives.function_source(source, family)
            assert shown in source and f"```python\n{shown}\n```" in page
            assert len(shown.splitlines()) <= 14
    with pytest.raises(objectives.StaleError, match="lacks the function missing"):
        objectives.function_source("x = 1", "missing")
