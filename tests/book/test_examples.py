"""The examples that readers copy run as they stand."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import divmerge_core

README = Path(__file__).resolve().parents[2] / "README.md"
MODULES = [one.name for one in pkgutil.walk_packages(divmerge_core.__path__, "divmerge_core.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_readme_example_runs(capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)
    exec(example, {})
    printed = capsys.readouterr().out
    assert "trec" in printed and "movie" in printed


def test_every_public_name_exists_and_is_documented():
    for name in divmerge_core.__all__:
        public = getattr(divmerge_core, name)
        assert public.__doc__, name
