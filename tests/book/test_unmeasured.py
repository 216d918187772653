"""What is not measured has a command that the chapters take, and is gone once it is stored."""

import shlex

import pytest
from divmerge_book import SUITES, TASKS, Report
from divmerge_book.evaluation.benchmark import check_request
from divmerge_book.findings import unmeasured
from divmerge_book.runner.execute import checked
from helpers import ROOT

from divmerge_core.storage import write_json


@pytest.mark.parametrize("one", unmeasured.MEASUREMENTS, ids=lambda one: one.file)
def test_every_command_names_parameters_suites_tasks_and_methods_that_exist(one):
    words = shlex.split(one.command.removeprefix(f"{unmeasured.GLUE} "))
    assert words[:4] == ["python", "-m", "divmerge_book", "run"] and words[6] == "-p"
    given = checked(ROOT / words[4], dict(zip(words[7::3], words[8::3], strict=True)), text=True)
    assert given["publish"] is True and given["size"] == "full"
    suite = SUITES[given.get("suite", "embedded")]
    assert set(given.get("tasks", [])) <= set(suite.tasks) <= set(TASKS)
    check_request(given.get("methods", ["average"]), given.get("seeds", [0]), {}, 1)


def test_a_measurement_that_is_stored_is_not_listed_and_seconds_are_stored_ones(tmp_path):
    every = unmeasured.table(tmp_path)
    assert len(every) == len(unmeasured.MEASUREMENTS) and set(every.iloc[:, 2]) == {"not known"}
    first = unmeasured.MEASUREMENTS[0]
    for one in unmeasured.MEASUREMENTS[1:]:
        (tmp_path / one.file).parent.mkdir(parents=True, exist_ok=True)
        write_json(tmp_path / one.file, {})
    real = ROOT / "book" / "results" / first.like
    (tmp_path / first.like).write_bytes(real.read_bytes())
    (left,) = unmeasured.table(tmp_path).itertuples(index=False)
    fits = [fit for fit in Report.load(real).fits if fit["method"] == "divmerge/layer"]
    seconds = [fit["seconds"] for fit in fits if fit["subset"].count("+") == 7]
    assert left[0] == first.what and len(seconds) == 3
    assert left[2] == f"{sum(seconds) / 3:.0f} s (embedded, T = 8)"
