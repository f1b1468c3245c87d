"""What an entry of a model's description may be, and what the error says of one that may not."""

from __future__ import annotations

import math

import pytest

from jaxrl_llm.models import entries
from jaxrl_llm.models.entries import check_entries

NESTED: list = []
for _ in range(2000):
    NESTED = [NESTED]

TABLE = {
    "whole": entries.whole("how many", 1, 10),
    "number": entries.number("how much", 0, 1),
    "between": entries.number_between("how much", 0, 1),
    "truth": entries.truth("whether"),
    "text": entries.text("which"),
    "one": entries.one_of("which", "none", True),
    "mapping": entries.mapping("of what"),
    "list": entries.list_of(entries.whole("which", 0, 9)),
    "several": entries.one_or_list_of(entries.whole("which", 0, 9)),
    "null": entries.truth("whether").or_null(),
}
GOOD = {
    "whole": [1, 10],
    "number": [0, 1, 0.5],
    "between": [0.5, 1e-300],
    "truth": [True, False],
    "text": ["x"],
    "one": ["none", True],
    "mapping": [{}, {"a": 1}],
    "list": [[], [0, 9]],
    "several": [0, [0, 9]],
    "null": [None, True],
}
BAD = {
    "whole": [0, 11, 2.0, True, "2", None, [2], 10**5000],
    "number": [-0.1, 1.1, math.nan, math.inf, True, "0", None, {}, 10**5000],
    "between": [0, 1, math.nan, -math.inf, False, "0.5"],
    "truth": [0, 1, "true", None, []],
    "text": ["", 0, None, ["x"], {}],
    "one": [1, "None", False, None, ["none"]],
    "mapping": [[], None, "a", 1],
    "list": [0, None, [10], [None], [[1]], [True], NESTED],
    "several": [None, 10, [10], [[1]], "1", True],
    "null": [0, "null"],
}


@pytest.mark.parametrize("name", TABLE)
def test_what_may_be_meant(name):
    for value in GOOD[name]:
        check_entries({name: value}, TABLE)
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"^place\.{name}=.* must be {TABLE[name].wanted[:5]}.* \(") as error:
            check_entries({name: value}, TABLE, "place.")
        assert len(str(error.value)) < 300


def test_entries_that_are_absent_or_unknown_are_let_through():
    check_entries({"unknown": math.nan}, TABLE)


def test_the_file_and_a_missing_entry_are_named():
    for absent in ({}, {"size": None}):
        with (
            pytest.raises(ValueError, match=r"^file\.json: rope\.'size' is missing$"),
            entries.errors_name("file.json"),
        ):
            entries.require(absent, "size", "rope.")
