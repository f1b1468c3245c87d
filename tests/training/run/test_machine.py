"""What is said of the system."""

import pytest

from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.run import machine


@pytest.mark.parametrize(
    ("pages", "environment", "told"),
    [
        ("always [madvise] never", {}, True),
        ("[always] madvise never", {}, False),
        ("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, False),
        ("always [madvise] never", {"LD_PRELOAD": "libjemalloc.so.2"}, False),
    ],
)
def test_huge_pages_are_told_of_where_they_could_be_had(pages, environment, told, tmp_path, monkeypatch):
    (tmp_path / "enabled").write_text(pages)
    monkeypatch.setattr(machine, "_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(machine, "_malloc_can_ask", lambda: True)
    for name in ("GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (machine.machine_remark(make_mesh()) is not None) is told
