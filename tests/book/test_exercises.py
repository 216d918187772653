"""The exercises that change a parameter show what they ask for (`make test-exercises`, slow)."""

import re
from pathlib import Path

import nbformat
import pytest
from divmerge_book import __main__
from divmerge_book.runner import execute
from test_structure import CHAPTERS, ROOT, code, names

# Parameters that only some tables of a chapter depend on; the others stay the stored ones.
SOME = {"planes", "methods"}
GIVEN = re.compile(r"-p (\w+) ([^\s`]+)")


def exercises(path: Path) -> str:
    """The text under a chapter's heading Exercises, up to the next heading; lines joined."""
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    (text,) = re.findall(r"^## Exercises\n(.*?)(?=^## |\Z)", prose, re.M | re.S)
    return re.sub(r"\\\n\s+", "", text)


def calls(path: Path) -> list[dict[str, str]]:
    """What the exercises say after `-p`, by span of code or by command."""
    text = exercises(path)
    commands = re.findall(r"^python -m divmerge_book run notebooks/(.*)$", text, re.M)
    assert all(command.startswith(f"{path.name} ") for command in commands)
    spans = re.findall(r"`(-p [^`]*)`", re.sub(r"\n +", " ", text))
    found = [dict(GIVEN.findall(one)) for one in [*spans, *commands]]
    return [one for n, one in enumerate(found) if "publish" not in one and one not in found[:n]]


DRAWING = [path for path in CHAPTERS if any("stored_or_" in cell.source for cell in code(path))]
CALLS = [pytest.param(p, one, id=f"{p.stem} {one}") for p in CHAPTERS for one in calls(p)]


@pytest.mark.parametrize("path", CHAPTERS, ids=names)
def test_an_exercise_names_parameters_as_they_are_given(path):
    """So that each can be copied, and is run below."""
    allowed = execute.parameters(path)
    assert {name for one in calls(path) for name in one} <= set(allowed)
    quoted = set(re.findall(r"`(\w+)`", exercises(path)))
    assert quoted & set(allowed) == set(), "write `-p NAME VALUE`"


def test_every_chapter_with_stored_tables_has_an_exercise_that_is_run():
    assert DRAWING and all(calls(path) for path in DRAWING)


def test_every_exercise_has_its_solution_and_leads_to_it():
    cells = nbformat.read(ROOT / "notebooks" / "solutions.ipynb", as_version=4).cells
    for path in CHAPTERS:
        title = nbformat.read(path, as_version=4).cells[0].source
        (label,) = re.findall(r"^\((chapter-[\w-]+)\)=", title)
        (text,) = [c.source for c in cells if f"Exercises of {{ref}}`{label}`" in c.source]
        asked = re.findall(r"^(\d+)\. ", exercises(path), re.M)
        assert re.findall(r" Solution (\d+)$", text, re.M) == asked, path.stem
        own = label.replace("chapter", "solutions")
        assert text.startswith(f"({own})=\n## ") and f" <{own}>` are" in exercises(path), path.stem


@pytest.mark.exercise
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("path", "given"), CALLS)
def test_an_exercise_shows_its_own_result(path, given, tmp_path):
    typed = [word for pair in {"size": "smoke", **given}.items() for word in ("-p", *pair)]
    output = tmp_path / "out.ipynb"
    assert __main__.main(["run", str(path), str(output), *typed]) == 0
    page = nbformat.read(output, as_version=4)
    shown = [
        str(out.get("text", "")) + str(out.get("data", {}).get("text/markdown", ""))
        for cell in page.cells
        if cell.cell_type == "code"
        for out in cell.outputs
    ]
    drawn = re.findall(r"Drawn from (this|the stored) run: .*", "\n".join(shown))
    if path in DRAWING:
        assert "this" in drawn
        assert "the stored" not in drawn or SOME & set(given)
