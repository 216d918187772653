"""Run notebooks: one with strictly checked parameters, a grid of runs, or all of them as a book.

python -m divmerge_book run notebooks/04_merge.ipynb out.ipynb -p size smoke -p seeds 0,1
python -m divmerge_book run notebooks/04_merge.ipynb --list
python -m divmerge_book grid grid.yaml
python -m divmerge_book book --size smoke
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from papermill.exceptions import PapermillExecutionError

from divmerge_book.runner.execute import checked, describe, execute

ROOT = Path(__file__).resolve().parents[2]


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


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 for a refused request, 1 for a failure, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m divmerge_book", description=__doc__)
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
    many.add_argument("file", help="see `python -m pydoc divmerge_book.runner.gridfile`")
    many.add_argument("--list", action="store_true", help="show the runs and stop")
    every = commands.add_parser("book", help="run all notebooks and build the HTML")
    every.add_argument("--size", default="default")
    every.add_argument("--root", type=Path, default=ROOT)
    every.add_argument("--workers", type=int, help="notebooks side by side; default: as fit")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = ["grid", *arguments]
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "grid":
            from divmerge_book.runner import grid

            return grid.run(chosen.file, only_list=chosen.list)
        if chosen.command == "book":
            from divmerge_book.runner import book

            book.build(chosen.size, root=chosen.root.resolve(), workers=chosen.workers)
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
