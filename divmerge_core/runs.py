"""Run notebooks: one with strictly checked parameters, a grid of runs, or all of them as a book.

python -m divmerge_core.runs run notebooks/04_merge.ipynb out.ipynb -p size smoke -p seeds 0,1
python -m divmerge_core.runs run notebooks/04_merge.ipynb --list
python -m divmerge_core.runs grid grid.yaml
python -m divmerge_core.runs book --size smoke
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import nbformat
import yaml
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from divmerge_core.notebooks import checked, describe, execute, parameters
from divmerge_core.storage import write_json

ROOT = Path(__file__).resolve().parent.parent


def run(notebook: str | Path, output: str | Path, /, **parameters: object) -> Path:
    """Execute a notebook with these parameters and write the executed copy to `output`.

    Raises ValueError, before a kernel starts, for a name or a type the notebook does not have.
    """
    values = checked(notebook, parameters, text=False)
    notebook, output = Path(notebook).resolve(), Path(output).resolve()
    if output == notebook or output.is_dir():
        raise ValueError(f"the output must be a file of its own, got {output}")
    page = nbformat.read(notebook, as_version=4)
    execute(page, output, values, cwd=notebook.parent, clean=False)
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
    package = Path(__file__).parent.rglob("*")
    sources = [notebook, *(p for p in package if p.is_file() and p.suffix != ".pyc")]
    key = {"run": _digest(sources, values, versions, sys.version)}
    sidecar, results = output.with_suffix(".json"), root / "book" / "results"
    stored = json.loads(sidecar.read_text()) if sidecar.is_file() and output.is_file() else {}
    if stored == {**key, "results": _digest(results.rglob("*.json"))}:
        tqdm.write(f"{name}: up to date")
        return output
    start = time.monotonic()
    sidecar.unlink(missing_ok=True)
    page = nbformat.read(notebook, as_version=4)
    execute(page, output, values, cwd=notebook.parent, clean=True)
    # Results are read afterwards: a notebook that fills them must not make itself stale.
    write_json(sidecar, {**key, "results": _digest(results.rglob("*.json"))})
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
    many = commands.add_parser("grid", help="run one notebook with many parameters")
    many.add_argument("file", help="see `python -m pydoc divmerge_core.gridfile`")
    many.add_argument("--list", action="store_true", help="show the runs and stop")
    every = commands.add_parser("book", help="run all notebooks and build the HTML")
    every.add_argument("--size", default="default")
    every.add_argument("--root", type=Path, default=ROOT)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = ["grid", *arguments]
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "grid":
            from divmerge_core import grids

            return grids.run(chosen.file, only_list=chosen.list)
        if chosen.command == "book":
            book(chosen.size, root=chosen.root.resolve())
        elif chosen.list:
            print(describe(chosen.notebook))
        elif chosen.output is None:
            one.error("an output path is needed, or --list")
        else:
            names = [name for name, _ in chosen.given]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"given more than once: {', '.join(twice)}; lists have commas")
            values = checked(chosen.notebook, dict(chosen.given), text=True)
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
