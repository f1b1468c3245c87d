"""Builds the documentation as a site, build/site, and checks it.

    pip install -e '.[docs]' && python docs/build_site.py

docs/ is Markdown that reads well as it is. What the site has beyond it is written here: pages that lie elsewhere
(README.md, notebooks, …); a page for each room of `api/` in the navigation of mkdocs.yml, of its docstrings; a page for
each file of the repository that is linked. No link may lead nowhere, and a browser fetches nothing from elsewhere.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent
PAGES, SITE = REPOSITORY / "build" / "pages", REPOSITORY / "build" / "site"
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tpu_scripts/README.md": "cloud_tpus.md",
    "notebooks/sums_by_grpo.ipynb": "notebooks/sums_by_grpo.md",
    "notebooks/dpo_with_lora.ipynb": "notebooks/dpo_with_lora.md",
    "notebooks/losses_in_your_code.ipynb": "notebooks/losses_in_your_code.md",
}
"""Pages that are not in docs/, and their places in the site."""
ASSETS = (".png", ".svg", ".log")
LANGUAGES = {".py": "python", ".sh": "bash", ".yml": "yaml", ".toml": "toml"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")
CODE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


# ---- Pages ---------------------------------------------------------------------------------------


def write_pages(folder: Path) -> None:
    """Writes the Markdown of the whole site into an empty folder."""
    sources = OUTSIDE | {
        f"docs/{path.relative_to(DOCS)}": str(path.relative_to(DOCS)) for path in sorted(DOCS.rglob("*.md"))
    }
    linked: dict[str, str] = {}
    for source, page in sources.items():
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        text, found = with_links(source, as_markdown(text) if source.endswith(".ipynb") else text, sources)
        linked |= found
        _write(folder / page, text)
    for source, page in linked.items():
        path = REPOSITORY / source
        if path.suffix in ASSETS:
            (folder / page).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / page)
        else:
            _write(folder / page, shown(source, path.read_text(encoding="utf-8")))
    for room in re.findall(r"\bapi/(\w+)\.md$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE):
        _write(folder / "api" / f"{room}.md", api_page(room))


def api_page(room: str) -> str:
    """The page of a room: of the names that it exports, or else of all its files."""
    package = REPOSITORY / "jaxrl_llm" / room / "__init__.py"
    exports = package.is_file() and "__all__" in package.read_text(encoding="utf-8")
    options = "    options: {show_submodules: false}\n" if exports else ""
    return f"# jaxrl_llm.{room}\n\n::: jaxrl_llm.{room}\n{options}"


def as_markdown(notebook: str) -> str:
    """A notebook's cells, with the outputs that it has."""
    blocks = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                blocks.append(f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            else:
                blocks.append(f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```")
    return "\n\n".join(blocks) + "\n"


def with_links(source: str, text: str, pages: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The text of a page with links of the site, and the other files that it links, with their places in the site.

    Raises:
        ValueError: a link leads to no file of the repository.
    """
    linked: dict[str, str] = {}

    def one(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        if not (REPOSITORY / target).is_file():
            raise ValueError(f"{source}: there is no file {target}, which it links as {found[1]}")
        if target not in pages:
            asset = target.startswith("docs/") and target.endswith(ASSETS)
            linked[target] = target.removeprefix("docs/") if asset else f"source/{target}.md"
        place = pages.get(target) or linked[target]
        return posixpath.relpath(place, posixpath.dirname(pages[source]) or ".")

    return outside_code(lambda prose: LINK.sub(one, prose), text), linked


def outside_code(change: Callable[[str], str], text: str) -> str:
    """`text` with everything but its blocks of code changed."""
    pieces, at = [], 0
    for block in CODE.finditer(text):
        pieces += [change(text[at : block.start()]), block[0]]
        at = block.end()
    return "".join([*pieces, change(text[at:])])


def shown(source: str, text: str) -> str:
    """A page that is a file."""
    return f"# {source}\n\n~~~~~~{LANGUAGES.get(Path(source).suffix, 'text')}\n{text}\n~~~~~~\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ---- The site ------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Anchors, links and what is fetched of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(given["href"])
        elif "src" in given:
            self.fetched.append(given["src"])


def problems(site: Path) -> list[str]:
    """What is wrong with a site: links that lead nowhere, and what comes from elsewhere."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        found += [f"{where}: fetches {url}" for url in page.fetched if urlsplit(url).netloc]
        for link in (*page.links, *page.fetched):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{where}: {link} leads to no file")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{where}: {link} leads to no heading")
    return list(dict.fromkeys(found))


def main() -> int:
    """Builds and checks the site."""
    for folder in (PAGES, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    write_pages(PAGES)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(DOCS), os.environ.get("PYTHONPATH", "")])}
    build = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    found = [line for line in build.stdout.splitlines() if line.startswith("griffe:")]  # of docstrings: no warnings yet
    if build.returncode:
        found.append(build.stdout)
    (SITE / "404.html").unlink(missing_ok=True)  # for servers at the root of a host alone
    found += problems(SITE)
    print("\n".join(found) or f"{len(list(SITE.rglob('*.html')))} pages in {SITE}; every link leads somewhere")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
