"""Digests of source code, blind to comments and docstrings: better words invalidate nothing."""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

# What writes pages and what sets runs going decides no number.
APART = {"book", "executors", "gathering", "gridfile", "grids", "pages", "runs"}


def source_digest(paths: Iterable[Path]) -> str:
    """One digest of these modules' code, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
                node
            ):
                node.body[0].value.value = ""
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


@cache
def package_digest() -> str:
    """A digest of all code of this package that a notebook's numbers may depend on."""
    root = Path(__file__).parent
    modules = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return source_digest(root / path for path in modules if path.stem not in APART)
