"""Where runs take place: in a pool of processes on this machine, or as tasks of a Ray cluster.

Each executor is a context manager that gives `submit(call, *arguments) -> Future`. A process of the
pool runs papermill, which starts the kernel. What a run of a grid returns is the executed notebook
and what it wrote below `results/`, as bytes, so that the machines of a cluster share no folder.
"""

import io
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nbformat
from papermill.exceptions import PapermillExecutionError

from divmerge_book.data.code_digest import package_digest
from divmerge_book.runner.execute import execute

Submit = Callable[..., Future]
DEATHS = 3  # how often Ray starts a run again whose node or process died
PATIENCE = 10  # seconds that a process has to end its kernel


class RunFailed(RuntimeError):
    """A run gave no result; the message says why."""


@dataclass(frozen=True)
class Job:
    """One run: a notebook as text and its parameters.

    code: the digest of the package's code that has to run it; empty on this machine.
    """

    key: str
    name: str
    page: str
    parameters: Mapping
    code: str


def work(job: Job) -> bytes:
    """Run the notebook in an empty folder: the executed copy, `results/` and a record, zipped.

    Raises RunFailed for whatever goes wrong in the run, and where this machine has other code.
    """
    if job.code and package_digest() != job.code:
        raise RunFailed(
            f"{platform.node()} has other code of this package than the machine that started the "
            "grid; install the same version on every node"
        )
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="divmerge-run-") as place:
        folder, archive = Path(place, "run"), io.BytesIO()
        (folder / "results").mkdir(parents=True)
        run_page(job.page, folder / job.name, job.parameters, cwd=folder)
        record = {"key": job.key, "notebook": job.name, "parameters": dict(job.parameters)}
        record |= {"seconds": round(time.monotonic() - start, 1), "host": platform.node()}
        (folder / "cell.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        written = (folder / job.name, folder / "cell.json", *folder.glob("results/**/*"))
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as new:
            for path in sorted(path for path in written if path.is_file()):
                new.write(path, path.relative_to(folder))
        return archive.getvalue()


def run_page(page: str, output: Path, values: Mapping, *, cwd: Path) -> None:
    """Execute a notebook that is given as text. Raises RunFailed with the cell that failed."""
    try:
        execute(nbformat.reads(page, as_version=4), output, values, cwd=cwd, clean=True)
    except Exception as error:
        raise RunFailed(error_message(error)) from None


def error_message(error: BaseException) -> str:
    """What went wrong, with the source of the cell where it did, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}".strip())
    if isinstance(error, PapermillExecutionError):
        text = f"cell {error.cell_index} failed:\n{error.source}\n{text}"
    return text


# --- this machine --------------------------------------------------------------------------------
@contextmanager
def processes(parallel: int = 1, cpus: float | None = None, gpus: float = 0.0) -> Iterator[Submit]:
    """Runs on this machine, `parallel` at once; when the block ends, so does all that still runs.

    cpus: threads of a run; None shares the machine's cores. gpus: devices of a run, or the part of
    one; 0 leaves them to the notebook.
    """
    context = multiprocessing.get_context("spawn")
    slots = context.SimpleQueue()
    for variables in environments(parallel, cpus, gpus):
        slots.put(variables)
    pool = ProcessPoolExecutor(parallel, context, start_worker, (slots,))
    try:
        yield partial(pool.submit, stoppable)
    finally:
        workers = list((pool._processes or {}).values())  # public from Python 3.14 on
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(PATIENCE)
            worker.kill()


def start_worker(slots) -> None:
    """Take a slot's environment variables, and end when the parent process has ended."""
    os.environ.update(slots.get())

    def watch() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def terminated() -> Iterator[None]:
    """Within, SIGTERM interrupts as Ctrl-C does; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stoppable(call: Callable, *arguments: object) -> object:
    """The call's result; Ctrl-C and SIGTERM end its kernel, and then this process."""
    try:
        with terminated():
            return call(*arguments)
    except KeyboardInterrupt:
        os._exit(1)


def environments(parallel: int, cpus: float | None, gpus: int | float) -> list[dict[str, str]]:
    """For each run at once: how many threads it has, and which GPUs it sees."""
    threads = max(1, int(cpus or (os.cpu_count() or 1) // parallel))
    own = {"OMP_NUM_THREADS": str(threads)} if cpus or parallel > 1 else {}
    if not gpus:
        return [own] * parallel
    import torch

    devices = [str(n) for n in range(torch.cuda.device_count())]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        devices = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[: len(devices)]
    each = max(1, int(gpus))
    room = len(devices) // each * max(1, math.floor(1 / gpus + 1e-9))
    if parallel > room:
        raise ValueError(
            f"{parallel} runs at once with gpus: {gpus} each need more than this machine's "
            f"{len(devices)} GPUs, which have room for {room}; lower parallel or gpus"
        )
    first = [slot * each if gpus >= 1 else slot * len(devices) // room for slot in range(parallel)]
    return [own | {"CUDA_VISIBLE_DEVICES": ",".join(devices[n : n + each])} for n in first]


# --- a cluster -----------------------------------------------------------------------------------
@contextmanager
def cluster(
    address: str | None = None, cpus: float | None = None, gpus: float = 0.0
) -> Iterator[Submit]:
    """Runs as tasks of a Ray cluster, as many at once as their shares of CPUs and GPUs allow.

    Every node needs the environment of this one, with the same version of the package and of Ray,
    and a cache of its own (or one that DIVMERGE_CACHE names for all). A run whose node dies starts
    again elsewhere. address: None takes RAY_ADDRESS or the cluster that this machine belongs to.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "executor ray needs Ray: pip install -e '.[cluster]', on every node"
        ) from error
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"there is no Ray cluster at {address}: start one with `ray start --head` and give "
            f"its address as `address:` or in RAY_ADDRESS. {error}"
        ) from error
    wanted = {"CPU": cpus or 1, "GPU": gpus}
    offered = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(one.get(k, 0) >= v for k, v in wanted.items()) for one in offered):
        print(f"no node offers {wanted} now: the runs wait until one joins", file=sys.stderr)
    shares = {"num_cpus": wanted["CPU"], "num_gpus": gpus, "max_retries": DEATHS}
    try:
        yield lambda call, *given: ray.remote(call).options(**shares).remote(*given).future()
    finally:
        ray.shutdown()  # ends the tasks that still run
