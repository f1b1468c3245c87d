"""The page: one file that holds all it shows, and nothing that a model wrote as markup; written while a run goes on."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxrl_llm.training.run.page import live
from jaxrl_llm.training.run.page.digest import Digest
from jaxrl_llm.training.run.page.document import PAGE_FILE, page, write_page
from jaxrl_llm.training.run.page.live import LivePage

MakeRun = Callable[..., Path]


def data_of(document: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', document, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_it_stands_alone_and_reads_no_text_as_markup(make_run: MakeRun) -> None:
    digest = Digest(make_run(12, name="{{data}}<i>"), {"optimizer.b1": 0.8, "other": 1})
    digest.update()
    document = page([digest.data()])
    assert not re.search(r"""(src|href)=["']?\w+:|@import|url\(""", document) and "default-src 'none'" in document
    assert "<img" not in document and document.count("</script>") == 3 and "{{" not in document.replace("{{data}}", "")
    [run] = data_of(document)["runs"]
    assert run["name"] == "{{data}}<i>" and run["defaults"] == {"optimizer.b1": 0.8}
    assert run["samples"][0]["groups"][0]["samples"][0]["text"].startswith("</script><img src=x")


def test_a_page_appears_whole(make_run: MakeRun, tmp_path: Path) -> None:
    digest = Digest(make_run(3))
    digest.update()
    write_page(tmp_path / "page.html", [digest.data()])
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    with pytest.raises(OSError, match=r"No such file or directory: '.*/none/page.html'"):
        write_page(tmp_path / "none" / "page.html", [digest.data()])


def test_it_is_written_while_the_run_goes_on_and_at_its_end(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    monkeypatch.setattr(live, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(live, "write_page", lambda *given: (write_page(*given), written.set()))
    folder, said = make_run(5), []
    with LivePage(folder, {}, said.append) as running:
        running.begin()
        assert written.wait(10)
        assert data_of((folder / PAGE_FILE).read_text())["runs"][0]["step"] == 5
        make_run(9, first=6)
    assert data_of((folder / PAGE_FILE).read_text())["runs"][0]["step"] == 9 and said == []


def test_a_page_that_cannot_be_made_is_told_once_and_ends_nothing(make_run: MakeRun) -> None:
    folder, said = make_run(2), []
    (folder / PAGE_FILE).mkdir()
    with LivePage(folder, {}, said.append) as running:
        running.begin()
        running._write()
    assert len(said) == 1 and said[0].startswith("no report.html is written any more: [Errno 21] Is a directory")
    assert said[0].endswith(f"jaxrl-llm report {folder} makes one")


def test_nothing_is_written_of_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with LivePage(folder, {}, print) as running:
            running.begin()
    with LivePage(tmp_path, {}, print, enabled=False) as running:
        running.begin()
    assert list(tmp_path.iterdir()) == []
