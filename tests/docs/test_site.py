"""The site has every page, says which link is dead, and is not built with one."""

from __future__ import annotations

import importlib
import json
import re

import pytest


def test_every_page_is_in_the_navigation_and_links_are_of_the_site(site, tmp_path):
    site.write_pages(tmp_path)
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")}
    named = re.findall(r"[\w/-]+\.md$", (site.REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {name for name in written if not name.startswith("source/")} == set(named) and len(named) == len(set(named))
    start = (tmp_path / "index.md").read_text()
    assert "](trees.md)" in start and "](docs/" not in start
    assert "(../source/jaxrl_llm/losses/value.py.md)" in (tmp_path / "objectives" / "critics.md").read_text()
    assert "def value_loss" in (tmp_path / "source" / "jaxrl_llm" / "losses" / "value.py.md").read_text()
    assert (tmp_path / "results" / "grpo_gsm8k.log").is_file()


def test_a_link_to_no_file_is_an_error(site):
    with pytest.raises(ValueError, match=r"docs/trees.md: there is no file docs/tree.md, which it links as tree.md"):
        site.with_links("docs/trees.md", "[a](tree.md#b)", {"docs/trees.md": "trees.md"})
    text = "```python\nx[0](tree.md)\n```\n[b](https://arxiv.org/x) [c](#c)"
    assert site.with_links("docs/trees.md", text, {"docs/trees.md": "trees.md"}) == (text, {})


def test_a_notebook_is_a_page_with_its_outputs(site):
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "[b](../docs/trees.md)"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [{"output_type": "stream", "text": ["1\n"]}, {"data": {"image/png": "AB==\n"}}],
        },
    ]
    page = site.as_markdown(json.dumps({"cells": cells}))
    assert page.startswith("# A\n[b](../docs/trees.md)\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n<img")
    assert 'src="data:image/png;base64,AB=="' in page


def test_dead_links_and_what_comes_from_elsewhere_are_told(site, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b.html").write_text('<h1 id="there">B</h1><a href="https://arxiv.org">x</a><a href="#here">y</a>')
    (tmp_path / "a" / "a.html").write_text(
        '<script src="https://unpkg.com/x.js"></script><img src="a.png"><a href="../b.html#there">1</a>'
        '<a href="../b.html#nowhere">2</a><a href="c.html">3</a>'
    )
    assert site.problems(tmp_path) == [
        "a/a.html: fetches https://unpkg.com/x.js",
        "a/a.html: ../b.html#nowhere leads to no heading",
        "a/a.html: c.html leads to no file",
        "a/a.html: a.png leads to no file",
        "b.html: #here leads to no heading",
    ]


def test_equations_of_docstrings_are_set(site):
    pytest.importorskip("latex2mathml")
    mathml = importlib.import_module("mathml")
    docstring = "A loss.\n\n    −A r / n\n\nSo:\n\n    loss ☃ x\n\nArgs:\n    r: A / B\n"
    text = mathml.with_equations(docstring)
    assert text == docstring.replace("    −A r / n", "```math\n-\\frac{A\\, r}{n}\n```")
    assert mathml.equation("x = -1").count('<mo form="prefix">&#x02212;') == 1
    assert mathml.equation("x - 1").count("prefix") == 0
