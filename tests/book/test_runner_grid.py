"""Grids of runs: refused before anything runs, or every run there once, whatever happens."""

import json
import signal
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import small_grids
from divmerge_book import Report, __main__
from divmerge_book.evaluation import stored_tables
from divmerge_book.runner import collect, executors, grid, grid_file
from small_grids import BODY, command, finished, run_cells, started, write_grid, write_notebook


@pytest.fixture
def folder(tmp_path):
    write_notebook(tmp_path / "page.ipynb")
    return tmp_path


@pytest.fixture
def here(monkeypatch):
    """Runs take place in this process, without a kernel."""
    monkeypatch.setattr(grid, "processes", small_grids.in_this_process)
    monkeypatch.setattr(executors, "execute", run_cells)


# --- the file ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gird": {}}, "line 13: unknown field 'gird'.*did you mean 'grid'"),
        ({"grid": {"divergance": ["js"]}}, "line 6: unknown field 'divergance'.*'divergence'"),
        ({"grid": {"lr": ["fast"]}}, r"line 7: grid.lr\[1\]: parameter lr must be float, got 'fas"),
        ({"grid": {"seeds": [0, 1]}}, r"must be list\[int\], got 0; in a grid every entry"),
        ({"grid": {"lr": 0.1}}, "line 6: grid.lr: Input should be a valid list"),
        ({"grid": {"lr": []}}, "grid.lr: List should have at least 1 item"),
        ({"grid": {"lr": [0.1, 1e-1]}}, "runs 1 and 2 are the same"),
        ({"cells": [{"divergence": "kl"}]}, "runs 3 and 5 are the same"),  # seeds: the default
        ({"cells": {"lr": 1}}, "cells: Input should be a valid list"),
        ({"grid": {"log": ["a"]}}, "line 5: log is fixed already"),
        ({"fixed": {"publish": "yes"}}, "publish must be bool, got 'yes'"),
        ({"notebook": None}, "lacks notebook"),
        ({"notebook": "none.ipynb"}, "there is no notebook"),
        ({"parallel": 0}, "parallel: Input should be greater than or equal to 1, got '0'"),
        ({"retries": "many"}, "retries: Input should be a valid integer"),
        ({"gpus": 1.5}, "gpus: must be a whole number or a part of one"),
        ({"cpus": "nan"}, "cpus: Input should be a finite number"),
        ({"executor": "slurm"}, "executor: Input should be 'local' or 'ray', got 'slurm'"),
        ({"executor": "ray", "parallel": 2}, "cpus and gpus decide"),
        ({"address": "here"}, "line 13: executor local takes no `address`"),
    ],
)
def test_a_wrong_grid_is_refused_with_its_line_before_a_run(folder, monkeypatch, changes, message):
    monkeypatch.setattr(grid, "processes", lambda *_, **__: pytest.fail("a run started"))
    path = write_grid(folder, **changes)
    assert __main__.main([str(path)]) == 2
    with pytest.raises(ValueError, match=message):
        grid_file.read(path)
    assert not (folder / "out").exists()


def test_a_missing_or_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no grid"):
        grid_file.read(tmp_path / "grid.yaml")
    (tmp_path / "grid.yaml").write_text("# nothing\n")
    with pytest.raises(ValueError, match="a grid has the fields notebook, output"):
        grid_file.read(tmp_path / "grid.yaml")


def test_runs_are_the_product_of_the_grid_and_then_the_cells(folder):
    path = write_grid(folder, cells=[{"lr": 1}])
    path.write_text(path.read_text().replace("lr: 1", "lr: 1e-3"))  # to YAML, this is a word
    grid = grid_file.read(path)
    runs = [job.parameters for job in grid.jobs]
    found = [(run["divergence"], run["seeds"], run["lr"]) for run in runs]
    product = [(name, [seed], 0.1) for name in ("js", "kl") for seed in (0, 1)]
    assert found == [*product, ("js", [0], 0.001)]
    assert grid.varying == ["divergence", "seeds", "lr"]
    assert all(run["publish"] for run in runs), "results are what a grid is run for"


def test_a_key_follows_code_and_parameters_but_not_prose_or_how_they_are_written(folder):
    def keys(**changes):
        return [job.key for job in grid_file.read(write_grid(folder, **changes)).jobs]

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
def test_every_run_is_there_once_and_a_larger_grid_runs_only_what_is_new(folder, here, capsys):
    path = write_grid(folder, grid={"divergence": ["js", "kl"]})
    assert __main__.main([str(path)]) == 0
    assert sorted(started(folder)) == finished(folder) == ["js0", "kl0"]
    assert __main__.main(["grid", str(path)]) == 0  # nothing runs again
    assert __main__.main([str(write_grid(folder))]) == 0
    assert sorted(started(folder)) == finished(folder) == ["js0", "js1", "kl0", "kl1"]
    capsys.readouterr()
    assert __main__.main(["grid", str(path), "--list"]) == 0
    assert capsys.readouterr().out.count("finished") == 4
    kept = {entry.name for entry in (folder / "out" / "cells").iterdir()}
    assert kept == {job.key for job in grid_file.read(path).jobs}

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


def test_a_failed_run_is_tried_again_reported_and_stops_no_other(folder, here, capsys):
    flaky = 'from pathlib import Path\nif divergence == "js" and not Path(log + "2").exists():\n'
    flaky += '    Path(log + "2").touch()\n    raise RuntimeError("once")\n'
    write_notebook(folder / "page.ipynb", flaky + BODY)
    path = write_grid(folder, grid={"divergence": ["tv", "js"]}, retries=1)  # it knows no `tv`
    assert __main__.main([str(path)]) == 1
    assert finished(folder) == ["js0"]
    assert started(folder).count("tv0") == 2 and started(folder).count("js0") == 1
    (note,) = (folder / "out" / "failed").iterdir()
    words = ("KeyError: 'tv'", "divergence=tv", "wrong = ", "cell 1 failed")
    assert [word for word in words if word not in note.read_text()] == []
    said = capsys.readouterr().out
    assert "1 of 2 runs are finished" in said and "failed: divergence=tv: see" in said
    assert Report.load(folder / "out" / "results" / "toy.json").provenance["finished"] == "1 of 2"
    states = json.loads((folder / "out" / "grid.json").read_text())["runs"]
    assert [one["state"] for one in states] == ["failed", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_an_interrupted_grid_ends_kernels_keeps_finished_runs_and_resumes(folder, how, monkeypatch):
    """With the real command, processes and kernels."""
    slow = BODY.replace("time.sleep(patience)", "time.sleep(patience if seeds == [1] else 0)")
    note = 'import os\nopen(log + ".pid", "a").write(f"{os.getpid()} {os.getppid()} ")\n'
    write_notebook(folder / "page.ipynb", note + slow)
    fixed = {"log": str(folder / "log"), "patience": 600.0}
    path = write_grid(folder, fixed=fixed, grid={"seeds": [[0], [1]]}, cpus=1)
    process = command(path)
    try:
        while started(folder) != ["js0", "js1"]:
            assert process.poll() is None, (folder / "said").read_text()
            time.sleep(0.05)
        process.send_signal(how)
        assert process.wait(60) == (-9 if how == signal.SIGKILL else 130)
    finally:
        process.kill()
    numbers = (folder / "log.pid").read_text().split()  # of kernels and workers
    small_grids.wait_for_the_end(map(int, numbers))
    assert {line.split()[1] for line in (folder / "log").read_text().splitlines()} == {"1"}  # cpus
    assert len(list((folder / "out" / "cells").iterdir())) == 1 and finished(folder) == ["js0"]
    monkeypatch.setattr(grid, "processes", lambda *_, **__: pytest.fail("it ran again"))
    assert __main__.main([str(write_grid(folder, grid={"seeds": [[0]]}, fixed=fixed))]) == 0


def test_two_grids_do_not_write_to_one_folder(folder, capsys):
    with grid.lock(folder / "out"):
        assert __main__.main([str(write_grid(folder))]) == 2
    assert "another grid is writing to" in capsys.readouterr().err


def test_other_code_than_the_keys_is_not_run(folder):
    job = grid_file.read(write_grid(folder)).jobs[0]
    other = executors.Job(job.key, job.name, job.page, job.parameters, "of another version")
    with pytest.raises(executors.RunFailed, match="install the same version"):
        executors.work(other)


def test_without_ray_the_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert __main__.main([str(write_grid(folder, executor="ray"))]) == 2
    assert "pip install -e '.[cluster]'" in capsys.readouterr().err


# --- what is collected ---------------------------------------------------------------------------
def parts(*reports, **varied):
    """Finished runs with one fit each, whose parameter has these values."""
    (name, values), found = *varied.items(), []
    for rows, given in zip(reports, values, strict=True):
        labels = {"suite": "toy", "subset": "a", "seed": 0, "task": "a", "gold": "01"}
        frame = pd.DataFrame([{**labels, "method": m, "predicted": p} for m, p in rows.items()])
        found.append((collect.Finished(Path(), {}, {name: given}), Report(frame, [], {})))
    return found


def labels(found):
    rows = collect.concatenated(found, {}).rows
    return list(zip(rows.suite, rows.method, strict=True))


def test_what_differs_is_labelled_in_the_methods_name_or_the_suites():
    same, other = {"expert": "01", "fit": "00"}, {"expert": "01", "fit": "11"}
    methods = ("expert", "fit [lr=0.1]", "fit [lr=0.2]")
    assert labels(parts(same, other, lr=[0.1, 0.2])) == [("toy", method) for method in methods]
    better = {"expert": "00", "fit": "00"}  # other experts: nothing may be compared across
    suites = [suite for suite, _ in labels(parts(same, better, size=["smoke", "full"]))]
    assert suites == ["toy [size=smoke]"] * 2 + ["toy [size=full]"] * 2
    # `seeds` is a column already, unless runs contradict each other in the same seed
    assert labels(parts(same, same, seeds=[[0], [0, 1]])) == [("toy", "expert"), ("toy", "fit")]
    assert ("toy", "fit [seeds=0+1]") in labels(parts(same, other, seeds=[[0], [0, 1]]))


def test_origins_are_put_side_by_side():
    one = {"device": "cpu", "seeds": [0, 1], "rows": {"test": 100}}
    two = {"device": "H100", "seeds": [1, 2], "rows": {"test": 100, "merge": 9}}
    rows = {"test": 100, "merge": 9}
    assert collect.merged([one, two]) == {"device": "cpu or H100", "seeds": [0, 1, 2], "rows": rows}
