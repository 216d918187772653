"""Grids of runs: one notebook with many parameters, on this machine or on a Ray cluster.

python -m divmerge_book grid grid.yaml

The file is described in `divmerge_book.runner.gridfile`. A finished run is kept under a key of the
notebook's code, its parameters and the package's code, and never run again: the same command goes
on after an interruption, and a larger grid adds to a smaller one.
"""

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from divmerge_book.runner.executors import Cluster, Job, Local, unpacked
from divmerge_book.runner.gathering import Finished, gather
from divmerge_book.runner.gridfile import Grid, read
from divmerge_core.storage import fresh_file, fresh_folder, locked, write_json

EXECUTOR: dict[str, Callable] = {"local": Local, "ray": Cluster}


def run(path: str | os.PathLike, *, only_list: bool = False) -> int:
    """Run what is not finished, gather all that is; 1 where a run failed, 0 otherwise."""
    grid = read(path)
    jobs = grid.jobs()
    folders = {job.key: grid.output / "cells" / job.key for job in jobs}
    missing = [job for job in jobs if not (folders[job.key] / "cell.json").is_file()]
    if only_list:
        for job in jobs:
            state = "open" if job in missing else "finished"
            print(f"{job.key}  {state:8}  {brief(grid, job)}")
        return 0
    with held(grid.output), terminated():
        failures = {}
        if missing:
            with closing(EXECUTOR[grid.executor](**grid.options)) as executor:
                failures = conduct(grid, executor, missing, folders, len(jobs))
        return report(grid, jobs, folders, failures)


def brief(grid: Grid, job: Job) -> str:
    """What tells a run from the others."""
    return ", ".join(f"{name}={job.parameters[name]}" for name in grid.varying) or "the only run"


def conduct(grid: Grid, executor, jobs: list[Job], folders: Mapping, total: int) -> dict[str, str]:
    """Run these jobs, keep each as it ends, try failed ones again; what failed, by key."""
    tries, failures = Counter(), {}
    with tqdm(total=total, initial=total - len(jobs), desc=grid.notebook.stem, unit="run") as bar:
        pending = {executor.submit(job): job for job in jobs}
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                job = pending.pop(future)
                error = future.exception()
                if error is None:
                    with fresh_folder(folders[job.key]) as folder:
                        unpacked(future.result(), folder)
                    bar.update()
                    continue
                text = str(getattr(error, "cause", None) or error)  # Ray wraps what a task raised
                again = tries[job.key] < grid.retries
                tries[job.key] += 1
                bar.write(f"{brief(grid, job)}: {last(text)}{'; tried again' if again else ''}")
                if again:
                    pending[executor.submit(job)] = job
                else:
                    failures[job.key] = text
                    bar.update()
    return failures


def last(text: str) -> str:
    """The line of an error that names it."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def report(grid: Grid, jobs: list[Job], folders: Mapping, failures: Mapping) -> int:
    """Gather what is finished, write down what failed, and say both."""
    states = []
    for job in jobs:
        note = grid.output / "failed" / f"{job.key}.txt"
        note.unlink(missing_ok=True)
        if job.key in failures:
            with fresh_file(note) as new:
                new.write_text(f"{brief(grid, job)}\n\n{failures[job.key]}\n", encoding="utf-8")
        state = "failed" if job.key in failures else "finished"
        states.append({"key": job.key, "state": state, "parameters": dict(job.parameters)})
    done = [
        Finished(
            folders[job.key],
            json.loads((folders[job.key] / "cell.json").read_text("utf-8")),
            {name: job.parameters[name] for name in grid.varying},
        )
        for job in jobs
        if job.key not in failures
    ]
    facts = {"notebook": grid.notebook.name, "varied": grid.varying}
    written = gather(done, grid.output / "results", **facts, finished=f"{len(done)} of {len(jobs)}")
    write_json(grid.output / "grid.json", {**facts, "runs": states})
    print(f"{len(done)} of {len(jobs)} runs are finished, in {grid.output / 'cells'}")
    for path in written:
        print(f"gathered: {path}")
    if done and not written:
        print(f"nothing to gather: {grid.notebook.name} wrote no Report and no tables to results/")
    for job in jobs:
        if job.key in failures:
            print(f"failed: {brief(grid, job)}: see {grid.output / 'failed' / job.key}.txt")
    return 1 if failures else 0


@contextmanager
def held(output: Path) -> Iterator[None]:
    """The output folder for this process alone."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(output, wait=False))
        except Timeout as error:
            raise ValueError(
                f"another grid is writing to {output}; wait for it, or choose another"
            ) from error
        yield


@contextmanager
def terminated() -> Iterator[None]:
    """Within, a request to terminate ends the runs as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
