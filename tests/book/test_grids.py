"""Grids of runs: refused before anything runs, or every run there once, whatever happens."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from divmerge_book import __main__
from divmerge_book.evaluation import stored_tables
from divmerge_book.evaluation.report import Report
from divmerge_book.runner import executors, gathering, grid, gridfile
from small_grids import BODY, alive, finished, started, write_grid, write_notebook

ALL = ["js0", "js1", "kl0", "kl1"]


@pytest.fixture
def folder(tmp_path):
    write_notebook(tmp_path / "page.ipynb")
    return tmp_path


def until(true) -> None:
    """Wait; a test that waits in vain ends by its own limit."""
    while not true():
        time.sleep(0.05)


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gird": {}}, "unknown field 'gird' in the grid.*did you mean 'grid'"),
        ({"grid": {"divergance": ["js"]}}, "line 6: unknown field 'divergance'.*'divergence'"),
        ({"grid": {"lr": ["fast"]}}, "parameter lr must be float, got 'fast'"),
        ({"grid": {"seeds": [0, 1]}}, r"must be list\[int\], got 0; in a grid every entry"),
        ({"grid": {"lr": 0.1}}, "lr in grid must be a list"),
        ({"grid": {"lr": []}}, "lr in grid must be a list"),
        ({"grid": {"lr": [0.1, 1e-1]}}, "runs 1 and 2 are the same"),
        ({"cells": [{"divergence": "kl"}]}, "runs 3 and 5 are the same"),  # seeds: the default
        ({"cells": {"lr": 1}}, "cells must be a list of runs"),
        ({"grid": {"log": ["a"]}}, "log is fixed already"),
        ({"fixed": {"publish": "yes"}}, "publish must be bool, got 'yes'"),
        ({"notebook": None}, "the grid lacks notebook"),
        ({"notebook": "none.ipynb"}, "there is no notebook"),
        ({"parallel": 0}, "parallel must be a whole number of 1 or more, got '0'"),
        ({"retries": "many"}, "retries must be a whole number"),
        ({"gpus": 1.5}, "gpus must be a whole number or a part of one"),
        ({"cpus": "nan"}, "cpus must be a number"),
        ({"executor": "slurm"}, "executor must be one of local, ray, got 'slurm'"),
        ({"executor": "ray", "parallel": 2}, "cpus and gpus decide"),
        ({"address": "here"}, "executor local takes no `address`"),
    ],
)
def test_a_wrong_grid_is_refused_before_a_run_starts(folder, capsys, monkeypatch, changes, message):
    monkeypatch.setitem(grid.EXECUTOR, "local", lambda **_: pytest.fail("a run started"))
    path = write_grid(folder, **changes)
    assert __main__.main([str(path)]) == 2
    with pytest.raises(ValueError, match=message):
        gridfile.read(path)
    assert not (folder / "out").exists()


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no grid"):
        gridfile.read(tmp_path / "grid.yaml")
    (tmp_path / "grid.yaml").write_text("# nothing\n")
    with pytest.raises(ValueError, match="needs the fields notebook, output"):
        gridfile.read(tmp_path / "grid.yaml")


def test_runs_are_the_product_of_the_grid_and_then_the_cells(folder):
    path = write_grid(folder, cells=[{"lr": 1}])
    path.write_text(path.read_text().replace("lr: 1", "lr: 1e-3"))  # to YAML, this is a word
    grid = gridfile.read(path)
    found = [(run["divergence"], run["seeds"], run["lr"]) for run in grid.runs]
    product = [(name, [seed], 0.1) for name in ("js", "kl") for seed in (0, 1)]
    assert found == [*product, ("js", [0], 0.001)]
    assert grid.varying == ["divergence", "seeds", "lr"]
    assert all(run["publish"] for run in grid.runs), "results are what a grid is run for"


def test_a_key_follows_code_and_parameters_but_not_prose_or_how_they_are_written(folder):
    def keys(**changes):
        return [job.key for job in gridfile.read(write_grid(folder, **changes)).jobs()]

    one = keys(grid={"lr": [0.1, 0.2]})
    assert keys(grid={"lr": [0.2]}) == one[1:]
    assert keys(grid=None, cells=[{}, {"lr": 0.2}], parallel=2) == one  # 0.1 is the default
    page = nbformat.read(folder / "page.ipynb", as_version=4)
    page.cells.insert(0, nbformat.v4.new_markdown_cell("# Better words"))
    nbformat.write(page, folder / "page.ipynb")
    assert keys(grid={"lr": [0.1, 0.2]}) == one
    write_notebook(folder / "page.ipynb", BODY + "\nprint()")
    assert not set(keys(grid={"lr": [0.1, 0.2]})) & set(one)


# --- the runs ------------------------------------------------------------------------------------


def test_every_run_is_there_once_and_a_larger_grid_runs_only_what_is_new(folder, capsys):
    path = write_grid(folder, grid={"divergence": ["js", "kl"]}, parallel=2, cpus=1)
    assert __main__.main([str(path)]) == 0
    assert sorted(started(folder)) == finished(folder) == ["js0", "kl0"]
    assert {line.split()[1] for line in (folder / "log").read_text().splitlines()} == {"1"}
    assert __main__.main(["grid", str(path)]) == 0  # nothing runs again
    assert __main__.main([str(write_grid(folder, parallel=2, cpus=1))]) == 0
    assert sorted(started(folder)) == finished(folder) == ALL
    capsys.readouterr()
    assert __main__.main(["grid", str(path), "--list"]) == 0
    assert capsys.readouterr().out.count("finished") == 4
    kept = {entry.name for entry in (folder / "out" / "cells").iterdir()}
    assert kept == {job.key for job in gridfile.read(path).jobs()}

    report = Report.load(folder / "out" / "results" / "toy.json")
    methods = set(report.rows.method)
    assert methods == {"expert", "fit [divergence=js]", "fit [divergence=kl]"}
    assert len(report.rows) == 6, "two experts and four fits: a seed is a seed, not a label"
    assert report.provenance["seeds"] == [0, 1] and report.provenance["finished"] == "4 of 4"
    cells = report.provenance["cells"]
    came = {(cell["parameters"]["divergence"], *cell["provenance"]["seeds"]) for cell in cells}
    assert came == {(name, seed) for name in ("js", "kl") for seed in (0, 1)}
    assert [fit["method"] for fit in report.fits].count("fit [divergence=kl]") == 2
    scores = pd.read_csv(folder / "out" / "results" / "toy.csv")
    ratio = scores[(scores.metric == "ratio") & (scores.method == "fit")]
    assert ratio.groupby("divergence").value.mean().to_dict() == {"js": 1.0, "kl": 0.75}
    table, facts = stored_tables.load(folder / "out" / "results" / "study.json")
    assert list(table["t"].columns) == ["divergence", "seeds", "seed", "x"] and len(table["t"]) == 4
    assert len(facts["cells"]) == 4


def test_a_failed_run_is_tried_again_told_and_holds_up_no_other(folder, capsys):
    flaky = 'from pathlib import Path\nif divergence == "js" and not Path(log + "2").exists():\n'
    flaky += '    Path(log + "2").touch()\n    raise RuntimeError("once")\n'
    write_notebook(folder / "page.ipynb", flaky + BODY)
    grid = {"divergence": ["js", "tv"], "seeds": [[0]]}  # the notebook knows no `tv`
    path = write_grid(folder, grid=grid, retries=1, parallel=2)
    assert __main__.main([str(path)]) == 1
    assert finished(folder) == ["js0"]
    assert started(folder).count("tv0") == 2 and started(folder).count("js0") == 1
    (note,) = (folder / "out" / "failed").iterdir()
    assert all(part in note.read_text() for part in ("KeyError: 'tv'", "divergence=tv", "wrong = "))
    said = capsys.readouterr().out
    assert "1 of 2 runs are finished" in said and "failed: divergence=tv: see" in said
    assert Report.load(folder / "out" / "results" / "toy.json").provenance["finished"] == "1 of 2"
    states = json.loads((folder / "out" / "grid.json").read_text())["runs"]
    assert [one["state"] for one in states] == ["finished", "failed"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_grid_leaves_nothing_half_written_and_goes_on(folder, how):
    slow = BODY.replace("time.sleep(patience)", "time.sleep(patience if seeds == [1] else 0)")
    note = 'import os\nopen(log + ".pid", "a").write(f"{os.getpid()} ")\n'
    write_notebook(folder / "page.ipynb", note + slow)
    fixed = {"log": str(folder / "log"), "patience": 600.0}
    path = write_grid(folder, fixed=fixed, grid={"seeds": [[0], [1]]})
    # Forked, it need not import anything: most of the time would go there.
    process = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(__main__.main([str(path)])), daemon=True
    )
    process.start()
    try:
        until(lambda: started(folder) == ["js0", "js1"])
        os.kill(process.pid, how)
        process.join(60)
        assert process.exitcode == (-9 if how == signal.SIGKILL else 130)
    finally:
        process.kill()
    kernels = map(int, (folder / "log.pid").read_text().split())
    until(lambda: not any(map(alive, kernels)))
    entries = [entry.name for entry in (folder / "out" / "cells").iterdir()]
    assert len(entries) == 1 and finished(folder) == ["js0"]
    write_grid(folder, grid={"seeds": [[0]]}, fixed=fixed)
    assert __main__.main([str(path)]) == 0
    assert started(folder) == ["js0", "js1"]


def test_two_grids_do_not_write_to_one_folder(folder, capsys):
    with grid.held(folder / "out"):
        assert __main__.main([str(write_grid(folder))]) == 2
    assert "another grid is writing to" in capsys.readouterr().err


def test_other_code_than_the_key_speaks_of_is_not_run(folder):
    job = gridfile.read(write_grid(folder)).jobs()[0]
    other = executors.Job(job.key, job.name, job.page, job.parameters, "of another version")
    with pytest.raises(executors.RunFailed, match="install the same version"):
        executors.work(other)


def test_runs_at_once_share_cores_and_are_given_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def seen(parallel, gpus):
        return [one["CUDA_VISIBLE_DEVICES"] for one in executors.environments(parallel, 1.0, gpus)]

    assert seen(2, 2) == ["0,1", "2,3"]
    assert seen(8, 0.5) == ["0", "0", "1", "1", "2", "2", "3", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert seen(2, 1) == ["4", "5"]
    with pytest.raises(ValueError, match="have room for 4"):
        executors.environments(5, None, 1)
    assert executors.environments(1, None, 0) == [{}]


# --- what is gathered ----------------------------------------------------------------------------


def parts(*reports, **varied):
    """Finished runs with one fit each, whose parameter has these values."""
    (name, values), found = *varied.items(), []
    for rows, given in zip(reports, values, strict=True):
        labels = {"suite": "toy", "subset": "a", "seed": 0, "task": "a", "gold": "01"}
        frame = pd.DataFrame([{**labels, "method": m, "predicted": p} for m, p in rows.items()])
        found.append((gathering.Finished(Path(), {}, {name: given}), Report(frame, [], {})))
    return found


def labels(found):
    rows = gathering.together(found, {}).rows
    return list(zip(rows.suite, rows.method, strict=True))


def test_what_differs_is_labelled_in_the_methods_name_or_the_suites():
    same, other = {"expert": "01", "fit": "00"}, {"expert": "01", "fit": "11"}
    assert labels(parts(same, other, lr=[0.1, 0.2])) == [
        ("toy", "expert"),
        ("toy", "fit [lr=0.1]"),
        ("toy", "fit [lr=0.2]"),
    ]
    better = {"expert": "00", "fit": "00"}  # other experts: nothing may be compared across
    suites = [suite for suite, _ in labels(parts(same, better, size=["smoke", "full"]))]
    assert suites == ["toy [size=smoke]"] * 2 + ["toy [size=full]"] * 2
    # `seeds` is a column already, unless runs contradict each other in the same seed
    assert labels(parts(same, same, seeds=[[0], [0, 1]])) == [("toy", "expert"), ("toy", "fit")]
    assert ("toy", "fit [seeds=0+1]") in labels(parts(same, other, seeds=[[0], [0, 1]]))


def test_origins_are_put_side_by_side():
    one = {"device": "cpu", "seeds": [0, 1], "rows": {"test": 100}}
    two = {"device": "H100", "seeds": [1, 2], "rows": {"test": 100, "merge": 9}}
    assert gathering.merged([one, two]) == {
        "device": "cpu or H100",
        "seeds": [0, 1, 2],
        "rows": {"test": 100, "merge": 9},
    }


def test_without_ray_the_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert __main__.main([str(write_grid(folder, executor="ray"))]) == 2
    assert "pip install -e '.[cluster]'" in capsys.readouterr().err
