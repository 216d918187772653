"""Run notebooks, grids of runs or the whole book; merge your own models.

divmerge run notebooks/04_merge.ipynb out.ipynb -p size smoke -p seeds 0,1
divmerge run notebooks/04_merge.ipynb --list
divmerge grid grid.yaml
divmerge book --size smoke
divmerge example my_example
divmerge check my_models.yaml --method divmerge/layer
divmerge merge my_models.yaml merged/ --method divmerge/layer --set epochs=2 --set lr=0.05
divmerge merge mergekit_config.yml merged/

`python -m divmerge_book` is the same command.
"""

import argparse
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

CONFIG = re.compile(r"(?m)(^|[{,])\s*[\"']?merge_method[\"']?\s*:")  # mergekit's files alone
ROOT = Path(__file__).resolve().parents[2]


def run(notebook: str | Path, output: str | Path, /, **parameters: object) -> Path:
    """Execute a notebook with these parameters and write the executed copy to `output`.

    Raises ValueError, before a kernel starts, for a name or a type the notebook does not have.
    """
    import nbformat

    from divmerge_book.runner.execute import checked, execute

    values = checked(notebook, parameters, text=False)
    notebook, output = Path(notebook).resolve(), Path(output).resolve()
    if output == notebook or output.is_dir():
        raise ValueError(f"the output must be a file of its own, got {output}")
    page = nbformat.read(notebook, as_version=4)
    execute(page, output, values, cwd=notebook.parent, clean=False)
    return output


def is_config(path: str) -> bool:
    """Whether a file is a configuration of mergekit's and no description of ours."""
    file = Path(path).expanduser()
    return file.is_file() and CONFIG.search(file.read_text("utf-8-sig", "replace")) is not None


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="divmerge", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="run one notebook with checked parameters")
    one.add_argument("notebook", help="a chapter, such as notebooks/04_merge.ipynb")
    one.add_argument("output", nargs="?", help="where the executed notebook goes")
    one._negative_number_matcher = re.compile(r"-[\d.]")  # else -1e-3 and -1,-2 look like options
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    one.add_argument("-p", dest="given", help="a parameter of it; may be repeated", **pair)
    one.add_argument("--list", action="store_true", help="show the parameters and stop")
    many = commands.add_parser("grid", help="run one notebook with many parameters")
    many.add_argument("file", help="see `python -m pydoc divmerge_book.runner.grid_file`")
    many.add_argument("--list", action="store_true", help="show the runs and stop")
    every = commands.add_parser("book", help="run all notebooks and build the HTML")
    every.add_argument("--size", default="default", help="smoke, default or full")
    every.add_argument("--root", type=Path, default=ROOT, help="the checkout of the book")
    every.add_argument("--workers", type=int, help="notebooks at once; default by cores and memory")
    text = "make a small project of three experts, to start from"
    first = commands.add_parser("example", help=text)
    first.add_argument("folder", type=Path, help="a new folder")
    text = "say what is wrong with a description; read no weights"
    seen = commands.add_parser("check", help=text)
    own = commands.add_parser("merge", help="merge the models that a file describes")
    text = "such as ties or divmerge/block; may be repeated; default: divmerge/layer"
    how = {"action": "append", "default": [], "help": text}
    pairs = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    for one in (seen, own):
        one.add_argument("description", help="see `python -m pydoc divmerge_book.user_models`")
        one.add_argument("--method", dest="methods", **how)
        one.add_argument("--set", dest="options", help="option of the methods, as lr=0.02", **pairs)
        one.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
        one.add_argument("--precision", default="float32", help="float32 (default), bfloat16, auto")
    own.add_argument("output", help="folder of the merged model; of several: OUTPUT/METHOD")
    own.epilog = "The description may also be mergekit's YAML, merged from disk to disk."
    text = "options that each search tries on validation rows; default: all"
    own.add_argument("--budget", type=int, help=text)
    own.add_argument("--seed", type=int, default=0, help="of all that is drawn; default: 0")
    own.add_argument("--overwrite", action="store_true", help="replace a model in the output")
    return parser


def options_in(pairs: list[str]) -> dict[str, object]:
    """Options out of NAME=VALUE; values are JSON, Python, or words."""
    from divmerge_book.runner.parameters import parse

    found = {}
    for name, sign, value in (pair.partition("=") for pair in pairs):
        if not (name and sign and value) or name in found:
            raise ValueError(f"--set takes NAME=VALUE, each name once; got {', '.join(pairs)}")
        found[name] = parse("", value)
    return found


def execute_command(command: str, **given: object) -> int:
    """What the command line asks for; packages that take seconds to import wait until then."""
    if command == "run":
        from divmerge_book.runner.execute import checked, describe

        notebook, output = given["notebook"], given["output"]
        names = [name for name, _ in given["given"]]
        if given["list"]:
            print(describe(notebook))
            return 0
        if output is None:
            raise ValueError("an output path is needed, or --list")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"given more than once: {', '.join(twice)}; lists have commas")
        run(notebook, output, **checked(notebook, dict(given["given"]), text=True))
    elif command == "grid":
        from divmerge_book.runner import grid

        return grid.run(given["file"], only_list=given["list"])
    elif command == "book":
        from divmerge_book.runner import book

        book.build(given["size"], root=given["root"].resolve(), workers=given["workers"])
    elif command == "example":
        from divmerge_book.user_models.example import make_example

        path = make_example(given["folder"].expanduser())
        print(f"{path} describes three experts; next:")
        print(f"divmerge check {shlex.quote(str(path))}")
        output = shlex.quote(str(path.with_name("merged")))
        print(f"divmerge merge {shlex.quote(str(path))} {output} --method average")
    elif command in ("check", "merge") and is_config(given["description"]):
        from divmerge_book.models.mergekit_merge import merge_config, summary

        own = {"options": [], "methods": [], "budget": None, "seed": 0}
        own |= {"device": "cpu", "precision": "float32"}
        if any(given.get(name, value) != value for name, value in own.items()):
            raise ValueError(
                "mergekit's file says how to merge; the command takes --overwrite only"
            )
        print(summary(given["description"]))
        if command == "merge":
            place = given["description"], given["output"]
            print(f"merged model in {merge_config(*place, overwrite=given['overwrite'])}")
    else:
        from divmerge_book.user_models import check, locate, merge_described, read

        given["methods"] = given["methods"] or ["divmerge/layer"]
        given["options"] = options_in(given["options"])
        if command == "check":
            place = {name: given[name] for name in ("device", "precision", "options")}
            print(check(read(locate(given["description"])), given["methods"], **place).summary())
        for folder in merge_described(**given) if command == "merge" else ():
            print(f"merged model in {folder}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 for a refused request, 1 for a failure, 0 otherwise."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = ["grid", *arguments]
    try:
        return execute_command(**vars(command_line().parse_args(arguments)))
    except import_module("papermill.exceptions").PapermillExecutionError as error:
        print(f"\ncell {error.cell_index} failed:\n{error.source}\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command resumes from what is finished", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
