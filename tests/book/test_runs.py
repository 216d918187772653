"""Strict parameters, whole outputs, and a book that repeats no finished work."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import nbformat
import pytest
from divmerge_book import __main__
from divmerge_book.runner import book, execute, executors
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from small_grids import wait_for_the_end

from divmerge_core.storage import LOCK

PARAMETERS = """\
size: str = "smoke"  # smoke, default or full
tasks: list[str] = ["trec", "sms"]  # names; "#" is allowed in a string
seeds: list[int] = [0]  # one expert per task and seed
lr: float = 1e-2  # Adam's step size
epochs: int = 4  # passes over the inputs
quiet: bool = False  # hide the bars"""


def notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook with these code cells after its parameters cell."""
    first = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# A page"), first, *map(new_code_cell, cells)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def text(path: Path) -> str:
    """Everything an executed notebook shows."""
    cells = nbformat.read(path, as_version=4).cells
    outputs = [out for cell in cells if cell.cell_type == "code" for out in cell.outputs]
    return "".join(out.get("text", "") for out in outputs)


@pytest.fixture
def page(tmp_path):
    return notebook(tmp_path / "page.ipynb", "print(size, tasks, seeds, lr, epochs, quiet)")


@pytest.fixture
def no_kernel(monkeypatch):
    """Fail where a kernel would start."""

    def refuse(*_, **__):
        pytest.fail("a kernel was started for a request that must be refused")

    monkeypatch.setattr(execute.papermill, "execute_notebook", refuse)


def test_parameters_have_name_type_default_and_help(page):
    found = execute.parameters(page)
    assert list(found) == ["size", "tasks", "seeds", "lr", "epochs", "quiet"]
    assert found["lr"] == execute.Parameter("lr", "float", 0.01, "Adam's step size")
    assert found["tasks"].help == 'names; "#" is allowed in a string'


def test_an_unknown_name_is_refused_with_the_choices_and_the_nearest(page, no_kernel, capsys):
    assert (
        __main__.main(["run", str(page), str(page.with_name("out.ipynb")), "-p", "sede", "1"]) == 2
    )
    message = capsys.readouterr().err
    assert "unknown parameter 'sede'; did you mean 'seeds'?" in message
    assert "lr      float" in message and "passes over the inputs" in message
    assert not page.with_name("out.ipynb").exists()


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("epochs", "4.0", "int"),
        ("epochs", "true", "int"),
        ("epochs", "many", "int"),
        ("lr", "fast", "float"),
        ("lr", "nan", "float"),
        ("lr", "NaN", "float"),
        ("quiet", "1", "bool"),
        ("quiet", "yes", "bool"),
        ("seeds", "0,one", "int"),
        ("seeds", "[0, 1.5]", "int"),
        ("seeds", "{}", "int"),
        ("tasks", "[1, 2]", "str"),
        ("tasks", "[trec", "list[str]"),
    ],
)
def test_a_wrong_type_is_refused_before_a_kernel_starts(page, no_kernel, capsys, name, value, kind):
    assert __main__.main(["run", str(page), "out.ipynb", "-p", name, value]) == 2
    message = capsys.readouterr().err
    assert name in message and f"must be {kind}" in message


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("size", "full", "full"),
        ("size", "01", "01"),
        ("size", '"full"', "full"),
        ("tasks", "trec", ["trec"]),
        ("tasks", "trec, bbc", ["trec", "bbc"]),
        ("tasks", '["trec", "bbc"]', ["trec", "bbc"]),
        ("tasks", "['trec']", ["trec"]),
        ("tasks", "", []),
        ("seeds", "0,1,2", [0, 1, 2]),
        ("seeds", "(3, 4)", [3, 4]),
        ("lr", "1", 1.0),
        ("lr", "-1e-3", -0.001),
        ("epochs", "-2", -2),
        ("quiet", "true", True),
        ("quiet", "False", False),
    ],
)
def test_values_are_read_as_json_python_or_bare_words(page, monkeypatch, name, typed, value):
    given = {}
    monkeypatch.setattr(__main__, "run", lambda notebook, output, /, **values: given.update(values))
    assert __main__.main(["run", str(page), "out.ipynb", "-p", name, typed]) == 0
    assert given == {name: value} and type(given[name]) is type(value)


def test_the_python_function_is_as_strict_as_the_command(page, no_kernel):
    with pytest.raises(ValueError, match="unknown parameter 'step'"):
        __main__.run(page, "out.ipynb", step=3)
    with pytest.raises(ValueError, match="epochs must be int, got '3'"):
        __main__.run(page, "out.ipynb", epochs="3")


def test_list_shows_the_parameters_and_runs_nothing(page, no_kernel, capsys):
    assert __main__.main(["run", str(page), "--list"]) == 0
    shown = capsys.readouterr().out
    assert '["trec", "sms"]' in shown and "Adam's step size" in shown


@pytest.mark.parametrize("line", ["lr = 0.1", "lr: complex = 1j", "lr: float = 'a'", "import os"])
def test_a_malformed_parameters_cell_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match="lr|import os"):
        execute.parameters(notebook(tmp_path / "page.ipynb", parameters=line))


def test_a_missing_notebook_is_refused(no_kernel, tmp_path, capsys):
    assert __main__.main(["run", str(tmp_path / "none.ipynb"), "out.ipynb"]) == 2
    assert "there is no notebook" in capsys.readouterr().err


def test_the_output_may_not_be_the_notebook_itself(page, no_kernel):
    with pytest.raises(ValueError, match="a file of its own"):
        __main__.run(page, page)


def test_a_run_uses_this_python_its_folder_and_its_parameters(tmp_path):
    page = notebook(
        tmp_path / "page.ipynb",
        "import os, sys\nprint(sys.executable, os.environ['OMP_WAIT_POLICY'], os.getcwd())",
        "print(tasks, lr, type(lr).__name__)",
    )
    kernels = tmp_path / "jupyter" / "kernels" / "python3"  # a user's kernel of the same name
    kernels.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "other", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(spec))
    output = tmp_path / "new" / "out.ipynb"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "divmerge_book", "run"]
    command += [page, output, "-p", "tasks", "a,b", "-p", "lr", "1"]
    environment = {**os.environ, "JUPYTER_DATA_DIR": str(tmp_path / "jupyter")}
    environment.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert text(output) == f"{sys.executable} PASSIVE {tmp_path}\n['a', 'b'] 1.0 float\n"
    assert [path.name for path in output.parent.iterdir()] == ["out.ipynb"]


def test_a_failing_cell_is_shown_and_leaves_no_output(tmp_path, capsys):
    page = notebook(tmp_path / "page.ipynb", "wanted = 1\nassert epochs == wanted, 'too many'")
    output = tmp_path / "out.ipynb"
    output.write_text("the last good run")
    assert __main__.main(["run", str(page), str(output)]) == 1
    message = capsys.readouterr().err
    assert "assert epochs == wanted" in message and "AssertionError: too many" in message
    assert output.read_text() == "the last good run"
    assert {path.name for path in tmp_path.iterdir()} == {"page.ipynb", "out.ipynb"}


COUNT = """\
import os, time
from pathlib import Path
log = Path('../log')
_ = log.open('a').write(f'{os.getpid()} {os.environ.get("OMP_NUM_THREADS")}\\n')
print('chapter', size)"""

# Waits until the other chapter has begun, which needs both to run at once.
TOGETHER = "while log.read_text().count('\\n') < 2:\n    time.sleep(0.05)"


def write_book(root: Path, **chapters: tuple[str, ...]) -> Path:
    """A repository with these chapters, each of which notes in `log` that it was executed."""
    (root / "book" / "results").mkdir(parents=True, exist_ok=True)
    home, toc = "# Home\n", "format: jb-book\nroot: index\nchapters:\n"
    for name, cells in chapters.items():
        notebook(root / "notebooks" / f"{name}.ipynb", COUNT, *cells)
        home += f"\n[A page](notebooks/{name}.ipynb)\n"
        toc += f"  - file: notebooks/{name}\n"
    (root / "book" / "index.md").write_text(home)
    (root / "book" / "_toc.yml").write_text(toc)
    config = 'title: Small\nexecute: {execute_notebooks: "off"}\nonly_build_toc_files: true\n'
    (root / "book" / "_config.yml").write_text(config)
    return root


@pytest.fixture
def small_book(tmp_path):
    """A book of one chapter."""
    return write_book(tmp_path, one=())


@pytest.fixture
def no_pages(monkeypatch):
    """Leave out the HTML."""
    monkeypatch.setattr(book, "write_pages", lambda folder, source: source)
    monkeypatch.setattr("divmerge_book.figures.landing", lambda results: None)


class Here:
    """An executor that runs a chapter at once, in this process, and notes its name."""

    names: ClassVar[list[str]] = []

    def __init__(self, **_):
        self.names.clear()

    def submit(self, one: book.Chapter) -> Future:
        self.names.append(one.name)
        future = Future()
        future.set_result(book.chapter(**asdict(one)))
        return future

    def close(self) -> None:
        pass


def executions(root: Path) -> list[tuple[int, str]]:
    """The kernel's process and its number of threads, for every execution of a chapter."""
    log = root / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(pid), threads) for pid, threads in map(str.split, lines)]


def kept(root: Path) -> set[str]:
    """The files and folders below the executed copies; a killed writer's lock is swept later."""
    found = (root / "_build" / "executed" / "smoke").rglob("*")
    return {path.name for path in found if not path.name.endswith(LOCK)}


def test_a_wrong_size_or_number_of_workers_is_refused(small_book, no_kernel, capsys):
    command = ["book", "--root", str(small_book)]
    assert __main__.main([*command, "--size", "huge"]) == 2
    assert "smoke, default, full" in capsys.readouterr().err
    assert __main__.main([*command, "--size", "smoke", "--workers", "0"]) == 2
    assert "workers must be a whole number of 1 or more, got 0" in capsys.readouterr().err
    assert (
        __main__.main([*command, "--size", "full", "--workers", "2"]) == 2
    )  # it publishes seconds
    assert "workers must be 1 at size full, got 2" in capsys.readouterr().err


@pytest.mark.parametrize(("cores", "gigabytes", "fit"), [(8, 64, 8), (8, 20, 2), (1, 4, 1)])
def test_as_many_notebooks_run_as_cores_and_memory_allow(monkeypatch, cores, gigabytes, fit):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gigabytes * 2**18}
    monkeypatch.setattr("os.sysconf", pages.get)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert book.at_once("default") == fit
    assert book.at_once("default", 3) == 3
    assert book.at_once("full") == 1


def test_a_notebook_runs_again_only_when_something_it_needs_changed(
    small_book, no_pages, monkeypatch
):
    executed = []

    def execute(page, output, values, **_):
        executed.append(values)
        output.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page, output)
        if "broken" in page.cells[-1].source:
            raise RuntimeError("broken")

    monkeypatch.setattr(book, "Local", Here)
    monkeypatch.setattr(book, "execute", execute)
    book.build("smoke", root=small_book)
    book.build("smoke", root=small_book)
    assert executed == [{"size": "smoke"}]
    for number, place in enumerate((".", "study"), 2):  # a study has a folder of its own
        folder = small_book / "book" / "results" / place
        folder.mkdir(exist_ok=True)
        (folder / "new.json").write_text("{}")
        book.build("smoke", root=small_book)
        assert len(executed) == number
    notebook(small_book / "notebooks" / "one.ipynb", "broken")
    with pytest.raises(executors.RunFailed, match="broken"):
        book.build("smoke", root=small_book)
    assert not {name for name in kept(small_book) if name.endswith(".json")}


def test_side_by_side_the_largest_starts_first_and_alone_the_book_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "Local", Here)
    monkeypatch.setattr(book, "chapter", lambda **_: b"0")
    write_book(tmp_path, a=(), b=("# long" * 200,), c=("# long" * 100,))
    chapters = [book.Chapter(str(tmp_path), f"notebooks/{name}", "smoke") for name in "abc"]
    book.execute_all(chapters, 1)
    assert Here.names == [one.name for one in chapters]
    book.execute_all(chapters, 2)
    assert Here.names == [chapters[n].name for n in (1, 2, 0)]


@pytest.mark.slow
def test_notebooks_run_side_by_side_with_their_share_of_the_cores(tmp_path, no_pages, capsys):
    bar = "import sys\nprint('a bar', file=sys.stderr)"
    write_book(tmp_path, one=(TOGETHER,), two=(TOGETHER, bar))
    source = book.build("smoke", root=tmp_path, workers=2)
    assert {path.name for path in (source / "notebooks").iterdir()} == {"one.ipynb", "two.ipynb"}
    assert text(source / "notebooks" / "two.ipynb") == "chapter smoke\n"  # no progress bars
    share = str(max(1, os.cpu_count() // 2))
    assert [threads for _, threads in executions(tmp_path)] == [share, share]
    assert "notebooks/two: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_failure_names_its_cell_and_stops_the_others_whole(tmp_path, no_pages, capsys):
    write_book(tmp_path, bad=(TOGETHER, "broken = 1 / 0"), good=(TOGETHER, "time.sleep(600)"))
    command = ["book", "--size", "smoke", "--root", str(tmp_path), "--workers", "2"]
    assert __main__.main(command) == 1
    message = capsys.readouterr().err
    assert re.search(r"error: notebooks/bad: cell \d failed:\nbroken = 1 / 0\n", message)
    assert "ZeroDivisionError: division by zero" in message
    assert kept(tmp_path) == {"notebooks"}
    wait_for_the_end(pid for pid, _ in executions(tmp_path))


@pytest.mark.slow
def test_an_interrupted_book_leaves_no_kernel_and_nothing_half_written(
    tmp_path, no_pages, monkeypatch, capsys
):
    write_book(tmp_path, one=("time.sleep(600)",), two=("time.sleep(600)",))

    def interrupt():
        while len(executions(tmp_path)) < 2:
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist's workers ignore it
    thread = threading.Thread(target=interrupt, daemon=True)
    try:
        thread.start()
        command = ["book", "--size", "smoke", "--root", str(tmp_path), "--workers", "2"]
        assert __main__.main(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the same command goes on" in capsys.readouterr().err
    assert kept(tmp_path) == {"notebooks"} and len(executions(tmp_path)) == 2
    wait_for_the_end(pid for pid, _ in executions(tmp_path))


@pytest.mark.slow
def test_the_book_is_built_and_a_broken_link_is_an_error(small_book, monkeypatch, capsys):
    monkeypatch.setattr(book, "execute_all", lambda chapters, workers: None)
    monkeypatch.setattr(book.Chapter, "output", book.Chapter.notebook)
    (small_book / "_build").mkdir()
    assert __main__.main(["book", "--size", "smoke", "--root", str(small_book)]) == 0
    html = small_book / "_build" / "html" / "index.html"
    assert f"file://{html}" in capsys.readouterr().out
    before = html.read_text()
    (small_book / "book" / "index.md").write_text("# Home\n\n[Two](notebooks/two.ipynb)\n")
    assert __main__.main(["book", "--size", "smoke", "--root", str(small_book)]) == 1
    assert "two.ipynb" in capsys.readouterr().err
    assert html.read_text() == before
    assert sorted(path.name for path in (small_book / "_build").iterdir()) == ["html", "src"]
