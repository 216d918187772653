"""Everything that decides a result is in its key, and nothing else is."""

import shutil
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
from helpers import MARKERS, TINY_RECIPE, toy_splits, toy_task

from divmerge_core import bench, digests, experts, tuning
from divmerge_core.bench import SIZES, prepare
from divmerge_core.cells import cell, kept
from divmerge_core.comparison import references
from divmerge_core.digests import ROOT, code_digest, key_of
from divmerge_core.encoders import load_base
from divmerge_core.experts import Recipe, described, fine_tune, folder_of
from divmerge_core.interference import weights
from divmerge_core.language.bench import prepare_language
from divmerge_core.language.completions import completions
from divmerge_core.methods import METHODS
from divmerge_core.storage import cache_dir
from divmerge_core.studies import evidence, pools, prediction, serving, stress
from divmerge_core.tasks import TASKS
from divmerge_core.tuning import Merges

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
