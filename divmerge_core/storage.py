"""Atomic writes of files and folders, with locks: a killed process leaves no partial result.

One writer at a time: while a file or folder is written, a lock file `.NAME.divmerge-lock` stands
beside it. The lock dies with its process, so whatever its next holder finds beside the target was
left by a killed run, and goes. The holder removes the lock file before it lets go; filelock grants
no lock whose file is gone, so whoever waited makes a new one.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout
from tqdm import tqdm

LOCK, NEW, OLD = ".divmerge-lock", ".divmerge-new", ".divmerge-old"
PATIENCE = 5  # seconds that a run waits for another before it says so


def cache_dir() -> Path:
    """Where fetched assets, split tasks, experts and finished fits are kept.

    The folder named by DIVMERGE_CACHE, or `divmerge` in the user's cache folder.
    """
    chosen = os.environ.get("DIVMERGE_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("divmerge"))


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well, and vanishes otherwise.

    It replaces a folder that is there: in one step on Linux, else with a moment between, and a
    process killed in that moment leaves the old one to the next writer. Raises ValueError, saying
    what to do, where `target` cannot be written.
    """
    with locked(target), placed(target, folder=True) as new:
        yield new


@contextmanager
def fresh_file(target: Path) -> Iterator[Path]:
    """A new file's path that becomes `target` when the block ends well, and vanishes otherwise."""
    with locked(target), placed(target, folder=False) as new:
        yield new


def write_json(path: Path, data: object) -> None:
    """Write JSON: readers see the old file or the new one."""
    with fresh_file(path) as new:
        dump_json(new, data)


def dump_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def once(
    target: Path, make: Callable[[Path], object], *, folder: bool = True, holds: str = ""
) -> Path:
    """`target`, made by `make(new)` where it is not there yet.

    make: fills the new folder, or writes the new file, that becomes `target`. Of several threads or
    processes that want it, one makes it and the others wait. holds: a file without which a folder
    was damaged, and is made again.
    """
    if not (target / holds).exists():
        with locked(target):
            if not (target / holds).exists():
                with placed(target, folder=folder) as new:
                    make(new)
    return target


@contextmanager
def locked(target: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `target`, and remove what killed writers of it have left.

    Raises filelock's Timeout where another holds it and `wait` is False.
    """
    with writable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent.absolute())
        lock = FileLock(beside(target, LOCK), poll_interval=0.02)
        try:
            lock.acquire(timeout=PATIENCE if wait else 0)
        except Timeout:
            if not wait:
                raise
            tqdm.write(f"waiting for another run, which is making {target}", file=sys.stderr)
            lock.acquire(timeout=-1)
    try:
        clear(target)
        yield
    finally:
        release(lock)


@contextmanager
def placed(target: Path, *, folder: bool) -> Iterator[Path]:
    """A path beside `target` that takes its place when the block ends well; its lock is held."""
    new = beside(target, NEW)
    try:
        with writable(target):
            if folder:
                new.mkdir()
            yield new
            for path in (*new.rglob("*"), new):
                synced(path)
            replaced = folder and target.is_dir()
            if not (replaced and exchanged(new, target)):
                if replaced:
                    os.replace(target, beside(target, OLD))
                os.replace(new, target)
            synced(target.parent)
    finally:
        clear(target)


def beside(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}{ending}")


def clear(target: Path) -> None:
    """Remove what stands beside `target`, but put it back where only its old folder is left."""
    new, old = beside(target, NEW), beside(target, OLD)
    if old.exists() and not target.exists():
        os.replace(old, target)
    for left in (new, old):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def release(lock: FileLock) -> None:
    """Remove a lock's file and let go; on Windows, where open files stay, filelock removes it."""
    if os.name != "nt":
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


@cache
def sweep(folder: Path) -> None:
    """Remove what killed runs have left in a folder, once in a process."""
    for path in folder.glob(f".*{LOCK}"):
        lock = FileLock(path)
        with suppress(Timeout):  # held: by a run that lives
            lock.acquire(timeout=0)
            clear(path.with_name(path.name[1 : -len(LOCK)]))
            release(lock)


@contextmanager
def writable(target: Path) -> Iterator[None]:
    """Raise ValueError, with what to do, where the system refuses to write."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOENT):  # not the disk: a network, or a file to be read
            raise
        hint = "choose a writable folder on a disk with room for it"
        if target.absolute().is_relative_to(cache_dir().absolute()):
            hint = "set DIVMERGE_CACHE to a writable folder with a few GB free"
        reason = error.strerror or error
        raise ValueError(f"cannot write {target}: {reason}; {hint}") from error


def synced(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchanged(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot (no Linux, some file systems)."""
    if os.name == "nt":  # where a process is no library of its own
        return False
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    arguments = (here, os.fsencode(one), here, os.fsencode(other), exchange)
    return swap is not None and swap(*arguments) == 0


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
