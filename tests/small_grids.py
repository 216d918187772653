"""A notebook of a moment, and grids of it: for the tests of runs on one machine and on many."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import chdir, contextmanager
from functools import partial
from pathlib import Path

import nbformat
import psutil
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

PARAMETERS = """\
divergence: str = "js"  # what is minimised
seeds: list[int] = [0]  # of the experts
lr: float = 0.1  # step size
log: str = ""  # a file that counts the runs
patience: float = 0.0  # seconds that a run takes
publish: bool = False  # store the table"""

# It writes what `tables.save` and `Report.save` write, without waiting for torch to be imported.
BODY = """\
import json, os, time
from pathlib import Path

with open(log, "a") as file:
    file.write(f"{divergence}{seeds[0]} {os.environ.get('OMP_NUM_THREADS')}\\n")
time.sleep(patience)
wrong = {"js": "1", "kl": "0"}[divergence]
labels = {"suite": "toy", "subset": "a", "seed": seeds[0], "task": "a", "gold": "0101"}
rows = [
    {**labels, "method": "expert", "predicted": "0101"},
    {**labels, "method": "fit", "predicted": "010" + wrong},
]
if publish:
    facts = {"seeds": seeds, "host": "here"}
    report = {"rows": rows, "fits": [{"method": "fit", "seed": seeds[0]}], "provenance": facts}
    Path("results/toy.json").write_text(json.dumps(report))
    table = {"tables": {"t": {"seed": seeds, "x": [lr]}}, "provenance": facts}
    Path("results/study.json").write_text(json.dumps(table))"""


def write_cells(path: Path, parameters: str, *cells: str) -> Path:
    """A notebook: its parameters cell, and these code cells."""
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    page = new_notebook(cells=[first, *map(new_code_cell, cells)], metadata={"kernelspec": kernel})
    nbformat.write(page, path)
    return path


def write_notebook(path: Path, body: str = BODY) -> Path:
    return write_cells(path, PARAMETERS, body)


@contextmanager
def in_this_process(*_, **__):
    """An executor that makes every call at once, in this process."""

    def submit(call, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(call(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    yield submit


def run_cells(page, output, values, *, cwd, clean) -> None:
    """`execute` without a kernel: the code cells in this process."""
    first, *rest = page.cells
    space = {}
    with chdir(cwd):
        exec(first.source, space)
        space |= values
        for number, cell in enumerate(rest, 1):
            try:
                exec(cell.source, space)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                fail = PapermillExecutionError(number, 1, cell.source, "", "", [text])
                raise fail from None
    nbformat.write(page, output)


def write_grid(folder: Path, **changes: object) -> Path:
    """`grid.yaml` for `page.ipynb` beside it: two divergences by two seeds, unless changed."""
    described = {"notebook": "page.ipynb", "output": "out", "fixed": {"log": str(folder / "log")}}
    described |= {"grid": {"divergence": ["js", "kl"], "seeds": [[0], [1]]}, "retries": 0}
    described |= changes
    path = folder / "grid.yaml"
    kept = {name: value for name, value in described.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
    return path


def started(folder: Path) -> list[str]:
    """The runs that began, in order: divergence and seed."""
    log = folder / "log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.is_file() else []


def finished(folder: Path) -> list[str]:
    """The runs that are kept: divergence and seed, sorted."""
    records = [json.loads(path.read_text()) for path in folder.glob("out/cells/*/cell.json")]
    given = [record["parameters"] for record in records]
    return sorted(f"{one['divergence']}{one['seeds'][0]}" for one in given)


def command(path: Path, **environment: str) -> subprocess.Popen:
    """The command itself, in a process of its own, its words in `said` beside the grid.

    It hears Ctrl-C even where the tests run in the background of a shell, which ignores it.
    """
    with open(path.with_name("said"), "ab") as said:
        options = {"env": {**os.environ, **environment}, "stdout": said, "stderr": said}
        options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([sys.executable, "-m", "divmerge_book", str(path)], **options)


def alive(number: int) -> bool:
    """Whether a process of this number runs."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_the_end(numbers: Iterable[int]) -> None:
    """Return when none of these processes runs any more; the test's time limit ends it else."""
    for number in numbers:
        while alive(number):
            time.sleep(0.05)
