"""Folders that appear whole or not at all, whenever the process that writes them is killed."""

import ctypes
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its place when the block ends well.

    Killed at any moment, the process leaves the old `folder` or the new one (or none, as before).
    What it leaves beside it is removed by the next call: a lock, which dies with its process, tells
    what is left over from what another process is writing. Raises ValueError where the disk is
    full or read-only.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.writing")
    lock = FileLock(f"{temporary}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.writing.lock"):
            sweep(left)
        lock.acquire()
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            synced(path)
        if not (folder.is_dir() and exchanged(temporary, folder)):
            if folder.is_dir():
                os.replace(folder, folder.with_name(f"{temporary.name}.old"))
            os.replace(temporary, folder)
        synced(folder.parent)
    except OSError as error:
        raise ValueError(
            f"cannot write {folder}: {error.strerror or error}; choose a writable folder on a disk "
            "with room for the model"
        ) from error
    finally:
        cleared(temporary, lock)


def sweep(left: Path) -> None:
    """Remove what a killed process left, by its lock; leave alone what a live one is writing."""
    lock = FileLock(left)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return
    cleared(left.with_suffix(""), lock)


def cleared(temporary: Path, lock: BaseFileLock) -> None:
    """Remove a temporary folder, the old one that it replaced, and at last its lock."""
    for left in (temporary, temporary.with_name(f"{temporary.name}.old")):
        shutil.rmtree(left, ignore_errors=True)
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


def synced(path: Path) -> None:
    """Wait until a file, or (where the system can say so) a folder's list, is on the disk."""
    folder = path.is_dir()
    if os.name == "nt" and folder:
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchanged(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot (no Linux, some file systems)."""
    swap = None if os.name == "nt" else getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    arguments = (here, os.fsencode(one), here, os.fsencode(other), exchange)
    return swap is not None and swap(*arguments) == 0
