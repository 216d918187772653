"""Run notebooks: one with strictly checked parameters, or all of them into the HTML book.

python -m divmerge_core.runs run notebooks/04_merge.ipynb out.ipynb -p size smoke -p seeds 0,1
python -m divmerge_core.runs run notebooks/04_merge.ipynb --list
python -m divmerge_core.runs book --size smoke
"""

import argparse
import ast
import difflib
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import nbformat
import papermill
import yaml
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SCALARS = {"int": int, "float": float, "str": str, "bool": bool}
KINDS = (*SCALARS, *(f"list[{name}]" for name in SCALARS))


@dataclass(frozen=True)
class Parameter:
    """One line `name: kind = default  # help` of a notebook's parameters cell."""

    name: str
    kind: str
    default: object
    help: str


def parameters(notebook: str | Path) -> dict[str, Parameter]:
    """What a notebook may be given, read from its parameters cell without running it."""
    if not Path(notebook).is_file():
        raise ValueError(f"there is no notebook {notebook}; the book's own are in notebooks/")
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook} has {len(tagged)} cells tagged 'parameters', it needs one")
    source = tagged[0].source
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for line in ast.parse(source).body:
        if not isinstance(line, ast.AnnAssign) or ast.unparse(line.annotation) not in KINDS:
            raise ValueError(
                f"{notebook}: `{ast.unparse(line)}` is not `name: type = default  # help`"
                f" with a type out of {', '.join(KINDS)}"
            )
        name, kind = ast.unparse(line.target), ast.unparse(line.annotation)
        text = comments.get(line.end_lineno, "")[1:].strip()
        found[name] = Parameter(name, kind, ast.literal_eval(line.value), text)
        _check(found[name], found[name].default)
    return found


def describe(notebook: str | Path) -> str:
    """The table of a notebook's parameters: name, type, default, help."""
    found = parameters(notebook).values()
    rows = [(p.name, p.kind, json.dumps(p.default), p.help) for p in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3] if rows else []
    lines = ["  ".join(["", *map(str.ljust, row, widths), row[3]]).rstrip() for row in rows]
    return "\n".join([f"parameters of {notebook}:", *(lines or ["  (none)"])])


def _check(parameter: Parameter, value: object) -> object:
    """The value in the parameter's type; only an int given for a float is converted."""
    inner = parameter.kind.removeprefix("list[").removesuffix("]")
    if inner == parameter.kind:
        if inner == "float" and type(value) is int:
            value = float(value)
        if type(value) is SCALARS[inner] and (inner != "float" or math.isfinite(value)):
            return value
    elif isinstance(value, (list, tuple)):
        return [_check(Parameter(parameter.name, inner, None, ""), item) for item in value]
    raise ValueError(f"parameter {parameter.name} must be {parameter.kind}, got {value!r}")


def _parse(parameter: Parameter, text: str) -> object:
    """A value typed on the command line: JSON or Python, a bare word, or a list with commas."""
    plural = parameter.kind.startswith("list[")
    if parameter.kind == "str" and text[:1] not in ("'", '"'):
        return text
    if plural and text[:1] not in ("[", "("):
        inner = Parameter(parameter.name, parameter.kind[5:-1], None, "")
        return [_parse(inner, word.strip()) for word in text.split(",") if word.strip()]
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return read(text)
    return text  # refused by _check, which knows what was wanted


def _checked(notebook: str | Path, given: Mapping[str, object], *, text: bool) -> dict[str, object]:
    """The given parameters in the notebook's types, parsed first where they are `text`."""
    allowed = parameters(notebook)
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown parameter {name!r}{hint}\n{describe(notebook)}")
    if text:
        given = {name: _parse(allowed[name], value) for name, value in given.items()}
    return {name: _check(allowed[name], value) for name, value in given.items()}


class _OwnKernel(AsyncKernelManager):
    """A kernel of this very interpreter, whatever kernels the user has installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        env = {
            "OMP_WAIT_POLICY": "PASSIVE",  # idle threads yield: a busy machine is four times faster
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore:IProgress not found",  # bars are text here
        }
        flags = "-m ipykernel_launcher --log-level=50 -f {connection_file}"
        return KernelSpec(argv=[sys.executable, *flags.split()], env=env, language="python")


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place, in one step, when the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".draft-") as folder:
        yield Path(folder, path.name)
        Path(folder, path.name).replace(path)


def _execute(notebook: Path, output: Path, values: Mapping[str, object], *, clean: bool) -> None:
    """Run the notebook in its own folder; `output` appears whole, or not at all.

    `clean`, for pages, leaves out what cells write to stderr: progress bars are for the terminal.
    """
    with _draft(output) as draft:
        executed = papermill.execute_notebook(
            nbformat.read(notebook, as_version=4),
            None,
            parameters=dict(values),
            kernel_name="python3",
            kernel_manager_class=_OwnKernel,
            cwd=notebook.parent,
            progress_bar=not clean,
            stderr_file=sys.stderr,
        )
        for cell in executed.cells if clean else []:
            if cell.cell_type == "code":
                cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        nbformat.write(executed, draft)


def run(notebook: str | Path, output: str | Path, /, **parameters: object) -> Path:
    """Execute a notebook with these parameters and write the executed copy to `output`.

    Raises ValueError, before a kernel starts, for a name or a type the notebook does not have.
    """
    values = _checked(notebook, parameters, text=False)
    notebook, output = Path(notebook).resolve(), Path(output).resolve()
    if output == notebook or output.is_dir():
        raise ValueError(f"the output must be a file of its own, got {output}")
    _execute(notebook, output, values, clean=False)
    return output


def _digest(files: Iterable[Path], *facts: object) -> str:
    contents = [(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in sorted(files)]
    return hashlib.sha256(json.dumps([facts, contents]).encode()).hexdigest()


def _stage(root: Path, name: str, size: str, folder: Path) -> Path:
    """The executed copy of one notebook, run again only if something that determines it changed."""
    notebook, output = root / f"{name}.ipynb", folder / f"{name}.ipynb"
    offered = {"size": size, "publish": size == "full"}
    values = {name: offered[name] for name in offered if name in parameters(notebook)}
    versions = sorted(f"{d.name}=={d.version}" for d in metadata.distributions())
    sources = [notebook, *Path(__file__).parent.rglob("*.py")]
    key = {"run": _digest(sources, values, versions, sys.version)}
    sidecar, results = output.with_suffix(".json"), root / "book" / "results"
    stored = json.loads(sidecar.read_text()) if sidecar.is_file() and output.is_file() else {}
    if stored == {**key, "results": _digest(results.rglob("*.json"))}:
        tqdm.write(f"{name}: up to date")
        return output
    start = time.monotonic()
    sidecar.unlink(missing_ok=True)
    _execute(notebook, output, values, clean=True)
    # Results are read afterwards: a notebook that fills them must not make itself stale.
    with _draft(sidecar) as draft:
        draft.write_text(json.dumps({**key, "results": _digest(results.rglob("*.json"))}))
    tqdm.write(f"{name}: {time.monotonic() - start:.0f} s")
    return output


def book(size: str, *, root: Path = ROOT) -> Path:
    """Execute every notebook of the table of contents and build the HTML; warnings are errors."""
    from divmerge_core import bench, figures, pages

    if size not in bench.SIZES:
        raise ValueError(f"size must be one of {', '.join(bench.SIZES)}, got {size!r}")
    build, source = root / "_build", root / "_build" / "src"
    toc = yaml.safe_load((root / "book" / "_toc.yml").read_text(encoding="utf-8"))
    chapters, staged = [chapter["file"] for chapter in toc["chapters"]], {}
    with tqdm([c for c in chapters if c.startswith("notebooks/")], unit="notebook") as bar:
        for name in bar:
            bar.set_description(f"{name} ({size})")
            staged[name] = _stage(root, name, size, build / "executed" / size)
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(root / "book", source)
    figures.landing(source / "results")
    pages.write(source / "methods")
    for name, executed in staged.items():
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(executed, source / f"{name}.ipynb")
    return _pages(build, source)


def _pages(build: Path, source: Path) -> Path:
    """Build the HTML beside the old one and swap them when it is complete."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=build, prefix="pages-") as folder:
        command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
        command += [source, "--config", source / "_config.yml", "--toc", source / "_toc.yml"]
        command += ["-W", "-n", "--keep-going", "--path-output", folder]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{done.stdout}\nthe pages were not built: see the warnings above")
        html, old = build / "html", Path(folder, "old")
        if html.exists():
            html.replace(old)
        Path(folder, "_build", "html").replace(html)
    print(f"pages: {time.monotonic() - start:.0f} s\nopen file://{html}/index.html")
    return html / "index.html"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 for a refused request, 1 for a failure, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m divmerge_core.runs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run one notebook with checked parameters")
    one.add_argument("notebook")
    one.add_argument("output", nargs="?")
    one._negative_number_matcher = re.compile(r"-[\d.]")  # else -1e-3 and -1,-2 look like options
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    one.add_argument("-p", dest="given", help="a parameter; may be repeated", **pair)
    one.add_argument("--list", action="store_true", help="show the parameters and stop")
    every = commands.add_parser("book", help="run all notebooks and build the HTML")
    every.add_argument("--size", default="default")
    every.add_argument("--root", type=Path, default=ROOT)
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "book":
            book(chosen.size, root=chosen.root.resolve())
        elif chosen.list:
            print(describe(chosen.notebook))
        elif chosen.output is None:
            one.error("an output path is needed, or --list")
        else:
            values = _checked(chosen.notebook, dict(chosen.given), text=True)
            run(chosen.notebook, chosen.output, **values)
    except PapermillExecutionError as error:
        print(f"\ncell {error.cell_index} failed:\n{error.source}\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
