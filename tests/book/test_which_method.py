"""The page "Which method should I use" names the best stored method for every choice."""

import re

import pandas as pd
from divmerge_book.figures.baselines import INPUTS, LABELS, NO_DATA
from divmerge_book.runner import which_method
from helpers import RESULTS

from divmerge_core.methods import METHODS, parse


def test_the_best_looks_at_no_more_data_and_stores_no_more_than_there_is():
    rows = pd.DataFrame(
        {
            "value": [0.5, 0.6, 0.9, 0.7, 0.8],
            "stored": [1.0, 1.0, 2.0, 1.2, 1.0],
            "block": [NO_DATA, INPUTS, NO_DATA, INPUTS, LABELS],
        },
        index=["plain", "inputs", "masks", "additions", "labels"],
    )
    found = which_method.best(rows, rows, 4)
    weights, inputs, labels = which_method.DATA
    plain, more, half = which_method.STORED
    assert {spec: (data, stored) for spec, (data, stored, _) in found.items()} == {
        **{"plain": (weights, plain), "masks": (weights, half)},
        **{"inputs": (inputs, plain), "additions": (inputs, more), "labels": (labels, plain)},
    }
    assert "masks" not in which_method.best(rows, rows, 2), "half of two experts is one model"


def test_without_labelled_rows_the_published_options_decide():
    tuned = pd.DataFrame({"value": [0.9, 0.8], "stored": 1.0, "block": NO_DATA}, ["a", "b"])
    found = which_method.best(tuned, tuned.assign(value=[0.5, 0.7]), 4)
    said = {spec: (data, row.value) for spec, (data, _, row) in found.items()}
    assert said == {"b": ("nothing but weights", 0.7), "a": ("labelled validation rows", 0.9)}


def test_the_page_and_the_lines_on_methods_are_made_of_the_stored_table():
    text = which_method.tables(RESULTS)
    _, found = which_method.summaries(RESULTS)
    for count, two in found.items():
        part = text.partition(f"at T = {count}\n")[2].partition("\n## ")[0]
        for spec in which_method.best(*two, count):
            assert part.count(which_method.link(spec)) == 1
            assert which_method.command(spec) in text
    glue = text.partition("## The best on GLUE\n")[2].partition("\n## ")[0]
    assert f"`{which_method.TABLE}`" in text and f"`{which_method.GLUE}`" in glue
    assert re.search(r"by ANP, DivMerge\+ \(.* ProDistill \(.* points", glue)
    largest, _ = found[max(found)]
    lines = which_method.standings(RESULTS)
    assert set(lines) == {parse(spec)[0] for spec in largest.index} <= set(METHODS)
    first = largest.value.idxmax()
    assert any("(number 1 of" in line for line in lines[parse(first)[0]])
    assert f"with published options {100 * largest.published['ties']:.1f} %" in lines["ties"][0]
    assert len(lines["divmerge"]) == sum(m.startswith("divmerge/") for m in largest.index)


def test_without_a_stored_table_the_pages_say_so(tmp_path):
    (tmp_path / "results").mkdir()
    which_method.write(tmp_path)
    assert "No table is stored yet" in (tmp_path / "results" / "which_method.md").read_text()
    assert "- measured" not in (tmp_path / "methods" / "ties.md").read_text()
