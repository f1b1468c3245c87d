"""The page in a browser: it draws itself, without an error, narrow and wide, in light and dark."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxrl_llm.training.run.page.digest import Digest
from jaxrl_llm.training.run.page.document import page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium: install one (on Debian apt install chromium), or name it by CHROMIUM=path"
)

# Moves over a chart and a token, through the steps, and changes what can be changed; then says what there is.
PROBE = """
const all = (what) => [...document.querySelectorAll(what)];
const move = (element) => {
  const box = element.getBoundingClientRect();
  const place = {clientX: box.left + box.width / 2, clientY: box.top + 5};
  element.dispatchEvent(new MouseEvent("mousemove", {bubbles: true, ...place}));
};
window.onload = () => setTimeout(() => {
  const found = {charts: all(".chart path.curve").length, tokens: all(".token").length};
  found.sections = all("section").map((part) => part.id);
  move(all(".chart svg")[0]);
  found.pointed = all(".chart .title")[0].textContent;
  if (found.tokens) { move(all(".token")[0]); found.tip = document.getElementById("tip").textContent; }
  for (const input of all("input[type=range]")) { input.value = input.min; input.dispatchEvent(new Event("input")); }
  for (const input of all("input[type=checkbox]")) input.click();
  for (const choice of all("select")) {
    choice.selectedIndex = choice.options.length - 1;
    choice.dispatchEvent(new Event("change"));
  }
  for (const title of all(".chart .title")) title.click();
  for (const key of all(".key")) key.click();
  const theme = document.documentElement.dataset.theme;
  all("header button")[0].click();
  found.themes = [theme, document.documentElement.dataset.theme];
  found.beyond = document.documentElement.scrollWidth - innerWidth;
  found.title = document.title;
  document.body.setAttribute("data-found", JSON.stringify(found));
}, 100);
"""


def look(document: str, folder: Path, *, width: int) -> tuple[dict, bytes]:
    """What the probe found, and a picture of the page as it is opened."""
    assert BROWSER is not None
    probed, plain, picture = folder / "probed.html", folder / "plain.html", folder / "page.png"
    probed.write_text(document.replace("</head>", f"</head><script>{PROBE}</script>"), encoding="utf-8")
    plain.write_text(document, encoding="utf-8")
    flags = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder}/user",
    ]
    flags += [f"--window-size={width},1600", "--virtual-time-budget=4000"]
    run = {"capture_output": True, "timeout": 120, "check": True}
    dumped = subprocess.run([*flags, "--dump-dom", probed.as_uri()], text=True, **run)
    shot = subprocess.run([*flags, f"--screenshot={picture}", plain.as_uri()], text=True, **run)
    problems = [line for line in (dumped.stderr + shot.stderr).splitlines() if "CONSOLE" in line]
    assert not problems, problems
    found = re.search(r'data-found="([^"]*)"', dumped.stdout)
    assert found is not None, dumped.stdout[-3000:]
    return json.loads(html.unescape(found[1])), picture.read_bytes()


def test_the_page_of_a_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    digest = Digest(make_run(900))
    digest.update()
    found, picture = look(page([digest.data()]), tmp_path, width=1300)
    assert found["sections"] == ["curves", "samples", "held-out", "lengths", "prompts", "settings"]
    assert found["charts"] == 3 and found["tokens"] == 4 and found["pointed"].startswith("rewardstep 4")
    assert "log-prob: -1" in found["tip"] and "KL to the reference: " in found["tip"] and "entropy: 0.5" in found["tip"]
    assert found["themes"] == ["light", "dark"] and found["title"] == "run" and found["beyond"] <= 0
    assert picture.startswith(b"\x89PNG") and len(picture) > 30_000


def test_the_page_of_several_runs_on_a_narrow_screen(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = []
    for number in range(2):
        digest = Digest(make_run(40, name=f"run-{number}", seed=number))
        digest.update()
        runs.append(digest.data())
    found, picture = look(page(runs), tmp_path, width=500)
    assert found["sections"] == ["final", "curves", "settings"] and found["charts"] == 6
    assert found["beyond"] <= 0 and len(picture) > 20_000
