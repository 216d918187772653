"""Folders that appear whole or not at all, whenever the process that writes them is killed."""

import ctypes
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its place when the block ends well.

    Killed at any moment, the process leaves the old `folder` or the new one (or none, as before).
    What it leaves beside it is removed by the next call: a lock, which dies with its process, tells
    what is left over from what another process is writing. Raises ValueError where the disk is
    full or read-only.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.writing")
    lock = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.writing"):
            sweep(left)
        temporary.mkdir()
        lock = locked(temporary)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            synced(path)
        if not (folder.is_dir() and exchanged(temporary, folder)):
            if folder.is_dir() and any(folder.iterdir()):
                os.replace(folder, folder.with_name(f"{temporary.name}.writing"))
            os.replace(temporary, folder)
        synced(folder.parent)
    except OSError as error:
        raise ValueError(
            f"cannot write {folder}: {error.strerror or error}; choose a writable folder on a disk "
            "with room for the model"
        ) from error
    finally:
        for left in (temporary, folder.with_name(f"{temporary.name}.writing")):
            shutil.rmtree(left, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def locked(folder: Path) -> int | None:
    """An open descriptor that holds the folder's lock; None where another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def sweep(folder: Path) -> None:
    """Remove what a killed process left; leave alone what a live one is writing."""
    lock = locked(folder)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def synced(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchanged(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot (no Linux, some file systems)."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    arguments = (here, os.fsencode(one), here, os.fsencode(other), exchange)
    return swap is not None and swap(*arguments) == 0
