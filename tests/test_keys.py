"""Everything that decides a result is in its key, and nothing else is."""

import shutil
from pathlib import Path

import pytest

from divmerge_core.digests import ROOT, code_digest

# --- the code that a result reaches ---------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path):
    """A copy of the package, and how to write a piece of it otherwise."""
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))

    def edit(module: str, old: str, new: str) -> Path:
        path = tmp_path / "copy" / f"{module}.py"
        text = path.read_text("utf-8")
        assert old in text, f"{module} holds no {old!r}"
        path.write_text(text.replace(old, new), "utf-8")
        return tmp_path / "copy"

    return edit


def digest(thing: object, root: Path = ROOT) -> str:
    return (
        code_digest(*thing, root=root)
        if isinstance(thing, tuple)
        else code_digest(thing, root=root)
    )
