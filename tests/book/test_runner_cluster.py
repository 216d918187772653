"""Grids on a Ray cluster of several nodes, one of which dies: every run is there once."""

import os
import time
from contextlib import contextmanager

import pytest
from divmerge_book.evaluation.report import Report
from small_grids import BODY, command, finished, started, write_grid, write_notebook

pytestmark = pytest.mark.scale
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
EIGHT = {"divergence": ["js", "kl"], "seeds": [[0], [1], [2], [3]]}
NAMES = [f"{name}{seed}" for name in ("js", "kl") for seed in range(4)]


@contextmanager
def nodes(number: int):
    """A cluster on this machine: a head without CPUs, and nodes of one CPU each."""
    pytest.importorskip("ray", reason="Ray is not installed; make test-scale builds it in")
    from ray.cluster_utils import Cluster

    os.environ.update(QUIET)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
    try:
        yield cluster, [cluster.add_node(num_cpus=1, **SMALL) for _ in range(number)]
    finally:
        cluster.shutdown()


@pytest.fixture
def start():
    """Starts the command on a grid; what still runs after the test is ended."""
    processes = []
    yield lambda path: processes.append(command(path)) or processes[-1]
    for process in processes:
        process.kill()
        process.wait()


def until(true, process=None) -> None:
    limit = time.monotonic() + 180
    while not true():
        assert process is None or process.poll() is None, "the grid ended early"
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def test_a_node_dies_half_way_and_every_run_is_there_once(tmp_path, start):
    write_notebook(tmp_path / "page.ipynb")
    fixed = {"log": str(tmp_path / "log"), "patience": 4.0}
    with nodes(3) as (cluster, workers):
        ray = {"executor": "ray", "address": cluster.address, "grid": EIGHT, "fixed": fixed}
        path = write_grid(tmp_path, **ray)
        process = start(path)
        until(lambda: len(finished(tmp_path)) >= 3, process)
        until(lambda: len(started(tmp_path)) == len(finished(tmp_path)) + 3, process)
        done = finished(tmp_path)
        busy = set(started(tmp_path)) - set(done)  # one run on every node
        cluster.remove_node(workers[0], allow_graceful=False)
        assert process.wait(240) == 0, (tmp_path / "said").read_text()
        assert finished(tmp_path) == NAMES
        began = started(tmp_path)
        assert all(began.count(name) == 1 for name in done), "what was finished ran again"
        again = [name for name in NAMES if began.count(name) > 1]
        assert len(again) == 1 and set(again) <= busy, "what the node was running, and only that"

        report = Report.load(tmp_path / "out" / "results" / "toy.json")
        keys = ["suite", "subset", "method", "seed", "task"]
        assert not report.rows.duplicated(keys).any() and len(report.rows) == 4 + 8
        assert len(report.provenance["cells"]) == 8

        before = sorted((tmp_path / "out").rglob("*.ipynb"))
        stamps = [file.stat().st_mtime_ns for file in before]
        assert start(path).wait(120) == 0  # nothing is left to run
        assert started(tmp_path) == began
        assert [file.stat().st_mtime_ns for file in before] == stamps


def test_a_failed_run_is_told_by_its_own_error_and_the_others_are_kept(tmp_path, start):
    write_notebook(tmp_path / "page.ipynb", BODY)
    grid = {"divergence": ["js", "tv"]}  # the notebook knows no `tv`
    options = {"executor": "ray", "grid": grid, "retries": 1, "cpus": 1}
    with nodes(1) as (cluster, _):
        path = write_grid(tmp_path, address=cluster.address, **options)
        assert start(path).wait(240) == 1, (tmp_path / "said").read_text()
    assert finished(tmp_path) == ["js0"] and started(tmp_path).count("tv0") == 2
    (note,) = (tmp_path / "out" / "failed").iterdir()
    assert "KeyError: 'tv'" in note.read_text() and "wrong = " in note.read_text()


def test_a_cluster_that_is_not_there_is_told_with_what_to_do(tmp_path, start):
    pytest.importorskip("ray", reason="Ray is not installed; make test-scale builds it in")
    write_notebook(tmp_path / "page.ipynb")
    path = write_grid(tmp_path, executor="ray", address="nowhere:1")
    assert start(path).wait(120) == 2
    assert "there is no Ray cluster at nowhere:1" in (tmp_path / "said").read_text()
