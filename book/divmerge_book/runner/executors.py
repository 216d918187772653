"""Where the runs of a grid take place: in processes of this machine, or as tasks of a Ray cluster.

An executor has `submit(job)`, which gives a future, and `close()`. What a run hands over is what it
writes under `results/` of the folder it runs in; with the executed notebook it travels as bytes, so
that the machines of a cluster share no folder. A chapter run there finds no `../book/results` and
writes to `results/` by itself.
"""

import io
import json
import math
import os
import platform
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from papermill.exceptions import PapermillExecutionError

from divmerge_book.data.code_digest import package_digest
from divmerge_book.runner.execute import execute

DEATHS = 3  # how often Ray starts a run again whose node or process died
CHILD = "from divmerge_book.runner import executors as e; "
CHILD += "e.child(lambda **job: e.work(e.Job(**job)))"


class RunFailed(RuntimeError):
    """A run came to no result; the message says why."""


@dataclass(frozen=True)
class Job:
    """One run: a notebook as text, its parameters, the digest of the code that has to run it."""

    key: str
    name: str
    page: str
    parameters: Mapping
    code: str


def work(job: Job) -> bytes:
    """Run the notebook in an empty folder: the executed copy, `results/` and a record, zipped.

    Raises RunFailed for whatever goes wrong in the run, and where this machine has other code.
    """
    if package_digest() != job.code:
        raise RunFailed(
            f"{platform.node()} has other code of divmerge_core than the machine that started the "
            "grid; install the same version on every node"
        )
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="divmerge-run-") as place:
        folder = Path(place, "run")
        (folder / "results").mkdir(parents=True)
        page = nbformat.reads(job.page, as_version=4)
        try:
            execute(page, folder / job.name, job.parameters, cwd=folder, clean=True)
        except Exception as error:
            raise RunFailed(told(error)) from None
        record = {"key": job.key, "notebook": job.name, "parameters": dict(job.parameters)}
        record |= {"seconds": round(time.monotonic() - start, 1), "host": platform.node()}
        (folder / "cell.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        kept = [folder / job.name, folder / "cell.json", *sorted(folder.glob("results/**/*"))]
        return packed(folder, kept)


def told(error: Exception) -> str:
    """What went wrong, with the source of the cell it went wrong in, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}".strip())
    if isinstance(error, PapermillExecutionError):
        text = f"cell {error.cell_index} failed:\n{error.source}\n{text}"
    return text


def packed(folder: Path, files: Sequence[Path]) -> bytes:
    """These files of a folder as one zip archive."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as new:
        for path in files:
            if path.is_file():
                new.write(path, path.relative_to(folder))
    return archive.getvalue()


def unpacked(archive: bytes, folder: Path) -> None:
    """Put what `packed` packed into a folder."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        old.extractall(folder)


# --- this machine --------------------------------------------------------------------------------


class Local:
    """Runs on this machine, `parallel` at once, each a process of its own.

    cpus: threads of a run; None shares the machine's cores. gpus: devices of a run, or the part of
    one; 0 leaves them to the notebook. program: Python source that hands a job's fields to `child`.
    """

    def __init__(
        self,
        *,
        parallel: int = 1,
        cpus: float | None = None,
        gpus: float = 0.0,
        program: str = CHILD,
    ):
        self.program = program
        self.environments = environments(parallel, cpus, gpus)
        self.free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(parallel):
            self.free.put(slot)
        self.pool = ThreadPoolExecutor(parallel)
        self.children: set[subprocess.Popen] = set()
        self.closed = threading.Event()

    def submit(self, job) -> Future:
        return self.pool.submit(self.run, job)

    def run(self, job) -> bytes:
        """Have a child do the work; it ends when its standard input does, so not after us."""
        slot = self.free.get()
        try:
            with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
                child = subprocess.Popen(
                    [sys.executable, "-c", self.program],
                    **{"stdin": subprocess.PIPE, "stdout": out, "stderr": err},
                    env={**os.environ, **self.environments[slot]},
                    start_new_session=True,  # Ctrl-C is for us, who then end it
                )
                self.children.add(child)
                if self.closed.is_set():
                    child.kill()
                with suppress(OSError, ValueError):  # it is gone already: the return code tells
                    child.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
                    child.stdin.flush()
                code = child.wait()
                self.children.discard(child)
                with suppress(OSError):
                    child.stdin.close()
                out.seek(0)
                found = out.read()
                if code == 0:
                    return found
                err.seek(0)
                last = err.read()[-2000:].decode(errors="replace")
                raise RunFailed(found.decode(errors="replace") or f"it ended with {code}: {last}")
        finally:
            self.free.put(slot)

    def close(self) -> None:
        """End what still runs, and wait until it has ended."""
        self.closed.set()
        self.pool.shutdown(wait=False, cancel_futures=True)
        for child in list(self.children):
            with suppress(OSError):
                child.stdin.close()
        self.pool.shutdown()


def child(call: Callable[..., bytes]) -> None:
    """Read a job's fields and write what `call` makes of them, or, with code 3, what went wrong."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints past Jupyter must not end up in the archive
    fields = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    try:
        out.write(call(**fields))
    except RunFailed as error:
        out.write(str(error).encode())
        out.flush()
        sys.exit(3)
    out.flush()


def end_with_the_parent() -> None:
    """Interrupt this process, and so its kernel, when nobody holds its standard input any more."""
    while os.read(0, 1):
        pass
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(10)
    os._exit(1)


def environments(parallel: int, cpus: float | None, gpus: int | float) -> list[dict[str, str]]:
    """For each run at once: how many threads it has, and which GPUs it sees.

    Raises ValueError where the machine has fewer GPUs than that.
    """
    shared = [{} for _ in range(parallel)]
    if cpus or parallel > 1:
        threads = max(1, int(cpus or (os.cpu_count() or 1) // parallel))
        shared = [{"OMP_NUM_THREADS": str(threads)} for _ in range(parallel)]
    if not gpus:
        return shared
    import torch

    devices = [str(n) for n in range(torch.cuda.device_count())]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        devices = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[: len(devices)]
    whole = gpus >= 1
    room = len(devices) // int(gpus) if whole else len(devices) * math.floor(1 / gpus + 1e-9)
    if parallel > room:
        raise ValueError(
            f"{parallel} runs at once with gpus: {gpus} each need more than this machine's "
            f"{len(devices)} GPUs, which have room for {room}; lower parallel or gpus"
        )
    for slot, one in enumerate(shared):
        first = slot * int(gpus) if whole else slot * len(devices) // room
        one["CUDA_VISIBLE_DEVICES"] = ",".join(devices[first : first + max(1, int(gpus))])
    return shared


# --- a cluster -----------------------------------------------------------------------------------


class Cluster:
    """Runs as tasks of a Ray cluster, as many at once as their shares of CPUs and GPUs allow.

    Every node needs the environment of this one, with the same version of the package and of Ray,
    and a cache of its own (or one that DIVMERGE_CACHE names for all). A run whose node dies starts
    again elsewhere. address: None takes RAY_ADDRESS or the cluster that this machine belongs to.
    """

    def __init__(self, *, address: str | None = None, cpus: float | None = None, gpus: float = 0.0):
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                "executor ray needs Ray: pip install -e '.[cluster]', on every node"
            ) from error
        self.ray = ray
        address = address or os.environ.get("RAY_ADDRESS") or "auto"
        try:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if host:  # Ray itself would knock for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"there is no Ray cluster at {address}: start one with `ray start --head` and give "
                f"its address as `address:` or in RAY_ADDRESS. {error}"
            ) from error
        shares = {"num_cpus": cpus or 1, "num_gpus": gpus}
        self.task = ray.remote(work).options(**shares, max_retries=DEATHS)
        offered = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        wanted = {"CPU": shares["num_cpus"], "GPU": shares["num_gpus"]}
        if not any(all(one.get(k, 0) >= v for k, v in wanted.items()) for one in offered):
            print(f"no node offers {wanted} now: the runs wait until one joins", file=sys.stderr)

    def submit(self, job: Job) -> Future:
        return self.task.remote(job).future()

    def close(self) -> None:
        """Leave the cluster; it ends the tasks that still run."""
        self.ray.shutdown()
