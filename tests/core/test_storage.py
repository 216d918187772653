"""Files and folders appear whole or not at all, and once; nothing is left of killed runs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import refuse, refuses

from divmerge_core import storage
from divmerge_core.storage import cache_dir, fresh_file, fresh_folder, once, write_json

# What another process runs: argv[1] is the folder that it writes in.
WRITING = """
import json, sys
from pathlib import Path
from divmerge_core.storage import fresh_folder, write_json

base = Path(sys.argv[1])
for number in range(30):
    write_json(base / "one.json", list(range(100)))
    with fresh_folder(base / "one") as new:
        (new / "cell.json").write_text(json.dumps(list(range(100))))
"""
MAKING = """
import sys, time
from pathlib import Path
from divmerge_core.storage import once

def make(new):
    with open(Path(sys.argv[1], "made"), "a") as file:
        file.write("made ")
    time.sleep(0.5)
    (new / "file").write_text("whole")

print(once(Path(sys.argv[1], "result"), make).joinpath("file").read_text())
"""
DYING = """
import os, signal, sys, time
from pathlib import Path
from divmerge_core.storage import fresh_folder

with fresh_folder(Path(sys.argv[1], "dead")) as new:
    (new / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def started(code: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """A process's exit code and what it printed."""
    out, _ = process.communicate()
    return process.returncode, out


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


# --- whole or not at all
def test_the_cache_is_the_folder_that_is_named_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DIVMERGE_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("DIVMERGE_CACHE", "")
    assert cache_dir().name == "divmerge"


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_takes_its_place_only_when_its_block_ends_well(tmp_path, monkeypatch, swap):
    if not swap:
        monkeypatch.setattr(storage, "exchanged", lambda one, other: False)
    target = tmp_path / "a" / "made"
    for word, before in (("one", []), ("two", ["one"])):
        with pytest.raises(RuntimeError), fresh_folder(target) as new:
            (new / "half").write_text("half")
            raise RuntimeError
        assert sorted(path.name for path in target.glob("*")) == before
        with fresh_folder(target) as new:
            (new / word).write_text("whole")
            assert sorted(path.name for path in target.glob("*")) == before
        assert [path.name for path in target.iterdir()] == [word]
    assert hidden(tmp_path) == []


def test_a_file_takes_no_folders_place_and_other_errors_are_not_called_the_disks(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "kept").write_text("kept")
    with refuses("cannot write .*made: Is a directory; choose a writable"):
        write_json(tmp_path / "made", {})
    assert (tmp_path / "made" / "kept").read_text() == "kept" and hidden(tmp_path) == []
    with pytest.raises(FileNotFoundError), fresh_folder(tmp_path / "made"):
        (tmp_path / "nothing").read_text()
    with pytest.raises(ConnectionError), fresh_folder(tmp_path / "made"):
        raise ConnectionError("no network")


def test_every_file_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Files first, then their folder, then the new name, then the folder that holds it."""
    done = []
    real, replace = storage.synced, os.replace
    monkeypatch.setattr(storage, "synced", lambda path: (done.append(path.name), real(path)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("named"), replace(*names)))
    with fresh_folder(tmp_path / "made") as new:
        (new / "inner").mkdir()
        (new / "inner" / "deep").write_text("deep")
        (new / "file").write_text("file")
    assert set(done[:3]) == {"inner", "deep", "file"}
    assert done[3:] == [".made.divmerge-new", "named", tmp_path.name]
    done.clear()
    write_json(tmp_path / "one.json", {})
    assert done == [".one.json.divmerge-new", "named", tmp_path.name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_folders_and_files_take_the_users_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with fresh_folder(tmp_path / "made") as new:
            write_json(new / "inner.json", {})
        write_json(tmp_path / "one.json", {})
    finally:
        os.umask(before)
    for path in (tmp_path / "made", tmp_path / "made" / "inner.json", tmp_path / "one.json"):
        whole = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == whole & ~mask, path


# --- many at once
def test_three_threads_and_three_processes_write_while_others_read(tmp_path):
    """600 writes by threads, 180 by processes: none fails, and no read finds nothing."""
    paths, lost, failed = [tmp_path / "one.json", tmp_path / "one" / "cell.json"], [], []
    over = threading.Event()

    def write(times: int = 100) -> None:
        try:
            for _ in range(times):
                write_json(paths[0], list(range(100)))
                with fresh_folder(tmp_path / "one") as new:
                    (new / "cell.json").write_text(json.dumps(list(range(100))))
        except (OSError, ValueError) as error:
            failed.append(error)

    def read() -> None:
        while not over.is_set():
            lost.extend(p for p in paths if not (p.exists() and len(json.loads(p.read_text()))))

    write(1)
    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=write) for _ in range(3)]
    processes = [started(WRITING, tmp_path) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [ended(process)[0] for process in processes] == [0] * 3  # one may say that it waits
    over.set()
    reader.join()
    assert failed == [] and lost == [] and hidden(tmp_path) == []


def in_threads(*targets) -> None:
    threads = [threading.Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_of_three_processes_or_threads_one_makes_what_all_want(tmp_path):
    processes, made = [started(MAKING, tmp_path) for _ in range(3)], []
    assert [ended(process) for process in processes] == [(0, "whole\n")] * 3
    assert (tmp_path / "made").read_text() == "made " and hidden(tmp_path) == []

    def make(new: Path) -> None:
        made.append(new)
        time.sleep(0.1)
        new.write_text("whole")

    in_threads(*[lambda: once(tmp_path / "a" / "one", make, folder=False)] * 3)
    assert len(made) == 1 and (tmp_path / "a" / "one").read_text() == "whole"


def test_what_was_not_made_is_made_next_and_what_is_there_needs_no_lock(tmp_path, monkeypatch):
    def fail(new: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "one", fail)
    assert list(tmp_path.iterdir()) == []
    assert once(tmp_path / "one", lambda new: (new / "file").touch()).is_dir()
    monkeypatch.setattr(storage, "FileLock", refuse)  # as in a cache that cannot be written
    assert once(tmp_path / "one", refuse) == tmp_path / "one"


def test_who_waits_is_told_for_what(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "PATIENCE", 0.05)
    with fresh_folder(tmp_path / "made") as new:
        waiting = threading.Thread(target=once, args=(tmp_path / "made", refuse), daemon=True)
        waiting.start()
        while "waiting for another run" not in capsys.readouterr().err:
            time.sleep(0.01)
        assert new.is_dir()  # what another is writing is left alone
    waiting.join()
    assert (tmp_path / "made").is_dir()


# --- what killed runs leave
@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGKILL")
def test_what_a_killed_run_left_is_swept_by_the_next_write_beside_it(tmp_path):
    assert ended(started(DYING, tmp_path)) == (-signal.SIGKILL, "")
    assert hidden(tmp_path) == [".dead.divmerge-lock", ".dead.divmerge-new"]
    with fresh_file(tmp_path / "living") as new:
        new.write_text("whole")
        assert not (tmp_path / ".dead.divmerge-new").exists()
    assert hidden(tmp_path) == [] and [path.name for path in tmp_path.iterdir()] == ["living"]


def test_other_programs_hidden_files_and_living_runs_are_not_swept(tmp_path):
    (tmp_path / ".other.lock").touch()
    with fresh_folder(tmp_path / "one") as new:
        storage.sweep.__wrapped__(tmp_path)
        assert new.is_dir()
    assert hidden(tmp_path) == [".other.lock"]


def test_a_folder_that_was_moved_aside_is_put_back(tmp_path):
    """Where folders cannot be swapped, a run killed between two renames leaves the old one."""
    (tmp_path / ".made.divmerge-old").mkdir()
    (tmp_path / ".made.divmerge-old" / "old").touch()
    with pytest.raises(RuntimeError), fresh_folder(tmp_path / "made"):
        raise RuntimeError
    assert (tmp_path / "made" / "old").is_file() and hidden(tmp_path) == []
