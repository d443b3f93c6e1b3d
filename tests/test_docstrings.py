"""Examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import tune_hypergrad

PACKAGE = Path(tune_hypergrad.__file__).parent
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]
MODULES = [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in FILES]
OFTEN_MET = ("Budget", "Problem", "Schedule", "complement", "hypergradient", "schedule")


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name: str) -> None:
    tests = [test for test in doctest.DocTestFinder().find(import_module(name)) if test.examples]
    assert tests, "an example is in no docstring"
    for test in tests:
        said: list[str] = []
        failed, _ = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
        assert not failed, "".join(said)


@pytest.mark.parametrize("name", OFTEN_MET)
def test_what_is_often_met_has_an_example(name: str) -> None:
    assert ">>> " in getattr(tune_hypergrad, name).__doc__
