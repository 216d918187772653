"""Grids of runs: one notebook with many parameters, on this machine or on a Ray cluster.

python -m divmerge_book grid grid.yaml

`grid_file` describes the file. A finished run is kept under a key of the notebook's code, its
parameters and the package's code, and never run again: the same command goes on after an
interruption, and a larger grid adds to a smaller one.
"""

import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from divmerge_book.runner.executors import (
    Job,
    Submit,
    cluster,
    error_message,
    processes,
    terminated,
    work,
)
from divmerge_book.runner.grid_file import Grid, read
from divmerge_core.storage import fresh_file, fresh_folder, locked, write_json


def run(path: str | os.PathLike, *, only_list: bool = False) -> int:
    """Run what is not finished, collect all that is; 1 where a run failed, 0 otherwise."""
    grid = read(path)
    file, missing = grid.file, [job for job in grid.jobs if not grid.finished(job)]
    if only_list:
        for job in grid.jobs:
            state = "open" if job in missing else "finished"
            print(f"{job.key}  {state:8}  {grid.label(job)}")
        return 0
    with lock(file.output), terminated():
        failures = {}
        if missing:
            start = {"ray": (cluster, file.address), "local": (processes, file.parallel)}
            executor, own = start[file.executor]
            with executor(own, cpus=file.cpus, gpus=file.gpus) as submit:
                failures = run_all(grid, submit, missing)
        return report(grid, failures)


def run_all(grid: Grid, submit: Submit, jobs: Sequence[Job]) -> dict[str, str]:
    """Run these jobs, keep each as it ends, try failed ones again; error messages by key."""
    tries, failures, total = Counter(), {}, len(grid.jobs)
    name = grid.file.notebook.stem
    with tqdm(total=total, initial=total - len(jobs), desc=name, unit="run") as bar:
        pending = {submit(work, job): job for job in jobs}
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                job, error = pending.pop(future), future.exception()
                if error is None:
                    with fresh_folder(grid.folder(job)) as folder:
                        zipfile.ZipFile(io.BytesIO(future.result())).extractall(folder)
                    bar.update()
                    continue
                text = str(getattr(error, "cause", None) or error)  # Ray wraps what a task raised
                text = text or error_message(error)
                again = tries[job.key] < grid.file.retries and not isinstance(error, BrokenExecutor)
                tries[job.key] += 1
                last = text.strip().splitlines()[-1]
                bar.write(f"{grid.label(job)}: {last}{'; tried again' if again else ''}")
                if again:
                    pending[submit(work, job)] = job
                else:
                    failures[job.key] = text
                    bar.update()
    return failures


def report(grid: Grid, failures: Mapping[str, str]) -> int:
    """Collect what is finished, write down what failed, and print both."""
    from divmerge_book.runner.collect import Finished, collect  # imports torch, which takes seconds

    output, states, done, said = grid.file.output, [], [], []
    for job in grid.jobs:
        note, failed = output / "failed" / f"{job.key}.txt", job.key in failures
        note.unlink(missing_ok=True)
        if failed:
            with fresh_file(note) as new:
                new.write_text(f"{grid.label(job)}\n\n{failures[job.key]}\n", encoding="utf-8")
            said.append(f"failed: {grid.label(job)}: see {note}")
        else:
            record = json.loads((grid.folder(job) / "cell.json").read_text("utf-8"))
            values = {name: job.parameters[name] for name in grid.varying}
            done.append(Finished(grid.folder(job), record, values))
        state = {"key": job.key, "state": "failed" if failed else "finished"}
        states.append({**state, "parameters": dict(job.parameters)})
    name, count = grid.file.notebook.name, f"{len(done)} of {len(grid.jobs)}"
    facts = {"notebook": name, "varied": grid.varying}
    written = collect(done, output / "results", **facts, finished=count)
    write_json(output / "grid.json", {**facts, "runs": states})
    print(f"{count} runs are finished, in {output / 'cells'}")
    if done and not written:
        print(f"nothing to collect: {name} wrote no Report and no tables to results/")
    for line in (*(f"collected: {path}" for path in written), *said):
        print(line)
    return 1 if failures else 0


@contextmanager
def lock(output: Path) -> Iterator[None]:
    """The output folder for this process alone."""
    try:
        with locked(output, wait=False):
            yield
    except Timeout as error:
        raise ValueError(
            f"another grid is writing to {output}; wait for it, or choose another"
        ) from error
