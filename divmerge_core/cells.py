"""Finished pieces of a comparison, kept in the cache under a key of all that decides them."""

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from divmerge_core.assets import cache_dir, fresh_folder
from divmerge_core.bench import Bench
from divmerge_core.report import write_json


@cache
def code_digest() -> str:
    """A digest of the code that decides a merge and its score."""
    root = Path(__file__).parent
    paths = ["problem", "live", "minimizers", "ledger", "fitting", "coefficients", "vectors"]
    paths += ["encoders", "evaluation"]
    for folder in ("divergences", "kernels", "methods"):
        paths += [f"{folder}/{path.stem}" for path in sorted((root / folder).glob("*.py"))]
    return digest_of(*paths)


@cache
def digest_of(*paths: str) -> str:
    """A digest of some modules of the package, blind to comments and docstrings."""
    digest = hashlib.sha256()
    for path in paths:
        tree = ast.parse((Path(__file__).parent / f"{path}.py").read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
                node
            ):
                node.body[0].value.value = ""
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def cell(bench: Bench, *what: object) -> Path:
    """Where a finished piece of work on this bench is kept."""
    key = json.dumps([code_digest(), bench.digest, *what], sort_keys=True, default=str)
    return cache_dir() / "cells" / hashlib.sha256(key.encode()).hexdigest()[:24]


def keep(folder: Path, data: object) -> None:
    """Store a finished piece of work, whole or not at all."""
    with fresh_folder(folder) as new:
        write_json(new / "cell.json", data)


def recall(folder: Path) -> object:
    return json.loads((folder / "cell.json").read_text("utf-8"))
