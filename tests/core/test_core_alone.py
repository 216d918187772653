"""The core imports and works without the packages of the book, and stays small."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    *sys.stdlib_module_names,
    *("torch", "safetensors", "jaxtyping", "tqdm", "numpy", "filelock", "huggingface_hub"),
    *("platformdirs", "triton", "cma", "divmerge_core"),  # cma and triton: on demand
}
# Lines of Python: a change that needs more has to say why here.
LIMITS = {"divmerge_core": 9_998, "book/divmerge_book": 26_352, "tests": 25_220}


def test_the_core_works_where_the_books_packages_cannot_be_imported():
    command = [sys.executable, str(ROOT / "tests" / "core" / "core_alone.py")]
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=plain)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the core works alone\n"


def test_the_core_imports_its_own_dependencies_only():
    found = set()
    for path in (ROOT / "divmerge_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    assert found <= ALLOWED


@pytest.mark.parametrize("folder", LIMITS)
def test_the_packages_and_the_tests_do_not_grow(folder):
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py"))
    assert lines <= LIMITS[folder]
