"""Stored results that hold the same quantity agree where settings do, else say what differs."""

import json
from collections import defaultdict
from itertools import combinations

import pandas as pd
import pytest
from divmerge_book.evaluation import stored_tables
from divmerge_book.evaluation.report import Report, caption
from divmerge_book.evaluation.sizes import SIZES, STANDARD, departures
from divmerge_book.findings import same_quantity
from divmerge_book.findings.in_short import Stored
from helpers import RESULTS

POINTS = 2.0  # of ANP: how far two fits in one setting may be apart on experts trained twice
ROWS = 2  # test rows that an expert trained twice, in bfloat16, may answer otherwise


def experts():
    """(suite, encoder, task, seed, test rows) -> file -> correct answers of the task's expert."""
    found = defaultdict(dict)
    for path in sorted(RESULTS.rglob("*.json")):
        data, answers = json.loads(path.read_text()), []
        facts = data["provenance"]
        if "rows" in data and facts["suite"] != "embedded_lm":
            rows = Report.load(path).rows.query("method == 'expert'")
            answers += zip(rows.task, rows.seed, rows.predicted, rows.gold, strict=True)
        for table in stored_tables.load(path)[0].values() if "tables" in data else ():
            if "predicted" in table and "answered" in table:
                for row in table[table.method == "expert"].itertuples():
                    lists = row.answered.split("+"), row.predicted.split(), row.gold.split()
                    answers += ((t, row.seed, p, g) for t, p, g in zip(*lists, strict=True))
        for task, seed, predicted, gold in answers:
            key = (facts["suite"], facts["encoder"], task, seed, len(gold))
            right = sum(a == b for a, b in zip(predicted, gold, strict=True))
            found[key].setdefault(path.relative_to(RESULTS).as_posix(), set()).add(right)
    return found


def test_an_expert_has_one_accuracy_on_the_same_test_rows():
    shared = {key: files for key, files in experts().items() if len(files) > 1}
    assert len(shared) > 40
    for key, files in shared.items():
        counts = set().union(*files.values())
        assert max(counts) - min(counts) <= ROWS, (key, files)


@pytest.fixture(scope="module")
def stored():
    return Stored(RESULTS)


def test_where_results_are_not_stored_the_table_says_so(tmp_path):
    said = same_quantity.as_markdown(Stored(tmp_path))
    assert said.startswith("`embedded_bert_tiny.json` is not stored here")


def test_values_of_one_quantity_agree_or_their_settings_differ(stored):
    """DivMerge with all eight tasks on BERT-tiny, in five chapters."""
    table = same_quantity.values(stored)
    assert len(table) == 5 and table.anp.between(70, 90).all()
    for one, two in combinations(table.to_dict("records"), 2):
        known = [n for n in STANDARD if not (pd.isna(one[n]) or pd.isna(two[n]))]
        differ = [name for name in known if one[name] != two[name]]
        assert differ or abs(one["anp"] - two["anp"]) <= POINTS, (one, two)
    assert table.set_index("file").loc[same_quantity.TABLE, list(STANDARD)].to_dict() == STANDARD
    text = same_quantity.as_markdown(stored)
    assert "| **24** | 150 | 4 | 3 | **2** |" in text and "not stored" in text


def test_captions_name_what_departs_from_the_standard_setting(stored):
    facts = {"suite": "embedded", "inputs": 24, "rows": 150, "seeds": [0, 1, 2], "rates": [1, 2]}
    said = "; not the standard setting, as far as stored: inputs 24 (standard 32), "
    said += "candidates 2 (standard 6)"
    assert departures(facts) == said and departures(facts | {"suite": "glue"}) == ""
    assert stored.tables("choice/ablation.json").caption.endswith(f"{said}.")
    assert "not the standard" not in caption(stored.report(same_quantity.TABLE))
    said = caption(stored.report("bases/glue_minilm.json"))  # RTE has fewer rows than others
    assert " 277 to 500 test rows a task" in said and "inputs 100 (standard 32), rows 500" in said


def test_the_default_size_has_the_standard_rows():
    size = SIZES["default"]
    assert (size.merge_rows, size.test_rows) == (STANDARD["inputs"], STANDARD["rows"])
    assert size.epochs == STANDARD["epochs"]
