"""One notebook: its parameters, checked strictly before anything runs, and its execution."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from divmerge_book.runner.parameters import Parameter, check, declared, known, parse
from divmerge_core.storage import fresh_file

FOLDERS = ("DIVMERGE_CACHE", "DIVMERGE_GLUE_DIR")  # relative to where a command is typed


def parameters(notebook: str | Path) -> dict[str, Parameter]:
    """What a notebook may be given, read from its parameters cell without running it."""
    if not Path(notebook).is_file():
        raise ValueError(f"there is no notebook {notebook}; the book's own are in notebooks/")
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook} has {len(tagged)} cells tagged 'parameters', it needs one")
    found = declared(tagged[0].source, str(notebook))
    for parameter in found.values():
        check(parameter, parameter.default)
    return found


def describe(notebook: str | Path) -> str:
    """The table of a notebook's parameters: name, type, default, help."""
    found = parameters(notebook).values()
    rows = [(p.name, p.kind, json.dumps(p.default), p.help) for p in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(["", *map(str.ljust, row, widths)]).rstrip() for row in rows]
    return "\n".join([f"parameters of {notebook}:", *(lines or ["  (none)"])])


def checked(notebook: str | Path, given: Mapping[str, object], *, text: bool) -> dict[str, object]:
    """The given parameters in the notebook's types, parsed first where they are `text`.

    A file or folder that is read is named from the root: the notebook runs in a folder of its own.
    """
    allowed, found = parameters(notebook), {}
    for name, value in given.items():
        known(name, allowed, f"\n{describe(notebook)}")
        value = check(allowed[name], parse(allowed[name].kind, value) if text else value)
        found[name] = value if name == "output" else absolute(value)
    return found


def absolute(value: object) -> object:
    """A text with a slash that names a file or a folder, from the root; else the value itself."""
    if isinstance(value, list):
        return [*map(absolute, value)]
    path = isinstance(value, str) and "/" in value and Path(value).expanduser()
    return str(path.absolute()) if path and path.exists() else value


class OwnKernel(AsyncKernelManager):
    """A kernel of this very interpreter, whatever kernels the user has installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        env = {
            "OMP_WAIT_POLICY": "PASSIVE",  # idle threads yield: a busy machine is four times faster
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore:IProgress not found",  # bars are text here
        }
        flags = "-m ipykernel_launcher --log-level=50 -f {connection_file}"
        flags += " --InlineBackend.figure_formats=svg"  # sharp at any size of a page
        return KernelSpec(argv=[sys.executable, *flags.split()], env=env, language="python")


def execute(
    page: nbformat.NotebookNode, output: Path, values: Mapping, *, cwd: Path, clean: bool
) -> None:
    """Run a notebook in the folder `cwd`; `output` appears whole, or not at all.

    `clean`, for pages, leaves out what cells write to stderr, as progress bars are for the
    terminal, and folds the cell of the given parameters.
    """
    for name in (name for name in FOLDERS if os.environ.get(name)):
        os.environ[name] = str(Path(os.environ[name]).expanduser().absolute())
    with fresh_file(output) as new:
        executed = papermill.execute_notebook(
            page,
            None,
            parameters=dict(values),
            kernel_name="python3",
            kernel_manager_class=OwnKernel,
            cwd=cwd,
            progress_bar=not clean,
            stderr_file=sys.stderr,
        )
        for cell in executed.cells if clean else []:
            if cell.cell_type == "code":
                cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            if "injected-parameters" in cell.metadata.get("tags", []):
                cell.metadata.tags.append("hide-input")
        nbformat.write(executed, new)
