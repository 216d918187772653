"""The boxes "In short": made of stored results, of three to five sentences, near the top."""

import importlib
import pkgutil
import re
from pathlib import Path

import nbformat
import pytest
from divmerge_book.findings import in_short
from helpers import RESULTS
from test_structure import CHAPTERS, names

MODULES = [
    importlib.import_module(f"{in_short.__name__}.{module.name}")
    for module in pkgutil.iter_modules(in_short.__path__)
]
FUNCTIONS = [
    function
    for module in MODULES
    for function in vars(module).values()
    if getattr(function, "__annotations__", {}).get("stored") is in_short.Stored
    and function.__module__ == module.__name__
]


@pytest.mark.parametrize("path", CHAPTERS, ids=names)
def test_a_chapter_opens_with_its_box(path):
    """Before the first section."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    first = next(n for n, text in enumerate(cells) if re.search(r"^## ", text, re.M))
    ((module, name),) = re.findall(r"^box\((\w+)\.(\w+)\)$", "\n".join(cells[:first]), re.M)
    imported = re.search(rf"^from (\S+) import .*\b{module}\b", "\n".join(cells[:first]), re.M)[1]
    assert callable(getattr(importlib.import_module(f"{imported}.{module}"), name))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_box_has_three_to_five_sentences_and_names_its_files(function, monkeypatch):
    monkeypatch.chdir(RESULTS.parents[1])
    lines = in_short.box(function).data.splitlines()
    sentences = [line for line in lines if line.startswith("- ")]
    assert 3 <= len(sentences) <= 5 and not re.search(r"\bnan\b|NaN|None", "".join(sentences))
    files = re.findall(r"`([\w/.]+)` \(((?:[^()]*, )?\d{4}-\d\d-\d\d|as printed)\)", lines[-2])
    assert files and all(Path(name).is_file() for name, _ in files)
    of_encoders = [said for name, said in files if "_" in Path(name).stem]
    assert all(re.match(r"\w+, \d seeds?, ", said) for said in of_encoders)


def test_a_box_says_where_nothing_is_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = in_short.box(lambda stored: stored.report("embedded.json")).data
    assert "`embedded.json` is not stored here" in text
