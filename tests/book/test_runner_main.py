"""The command line: strict parameters, whole outputs, and a book that repeats no finished work."""

import json
import os
import subprocess
import sys
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from divmerge_book import __main__
from divmerge_book.runner import book, execute, executors
from helpers import forbid, raising
from papermill.exceptions import PapermillExecutionError
from small_grids import in_this_process, run_cells, wait_for_the_end, write_cells

from divmerge_core import storage

TESTS = Path(__file__).parents[1]
PARAMETERS = """\
size: str = "smoke"  # smoke, default or full
tasks: list[str] = ["trec", "sms"]  # names; "#" is allowed in a string
seeds: list[int] = [0]  # one expert per task and seed
lr: float = 1e-2  # Adam's step size
epochs: int = 4  # passes over the inputs
quiet: bool = False  # hide the bars"""


@pytest.fixture
def page(tmp_path):
    cell = "print(size, tasks, seeds, lr, epochs, quiet)"
    return write_cells(tmp_path / "page.ipynb", PARAMETERS, cell)


@pytest.fixture
def no_kernel(monkeypatch):
    """Fail where a kernel would start."""
    monkeypatch.setattr(execute.papermill, "execute_notebook", forbid)


def test_parameters_have_name_type_default_and_help(page):
    found = execute.parameters(page)
    assert list(found) == ["size", "tasks", "seeds", "lr", "epochs", "quiet"]
    assert found["lr"] == execute.Parameter("lr", "float", "0.01", "Adam's step size")
    assert found["lr"].default == 0.01 and found["tasks"].default == ["trec", "sms"]
    assert found["tasks"].help == 'names; "#" is allowed in a string'


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("sede", "1", ["unknown parameter 'sede'; did you mean 'seeds'?", "lr      float"]),
        ("epochs", "4.0", ["epochs must be int"]),
        ("epochs", "true", ["epochs must be int"]),
        ("epochs", "many", ["epochs must be int"]),
        ("lr", "fast", ["lr must be float"]),
        ("lr", "nan", ["lr must be float"]),
        ("lr", "NaN", ["lr must be float"]),
        ("quiet", "1", ["quiet must be bool"]),
        ("quiet", "yes", ["quiet must be bool"]),
        ("seeds", "0,one", ["seeds must be list[int], got [0, 'one']"]),
        ("seeds", "[0, 1.5]", ["seeds must be list[int]"]),
        ("seeds", "{}", ["seeds must be list[int]"]),
        ("tasks", "[1, 2]", ["tasks must be list[str]"]),
        ("tasks", "[trec", ["tasks must be list[str]"]),
    ],
)
def test_a_wrong_name_or_type_starts_no_kernel(page, no_kernel, capsys, name, value, words):
    output = page.with_name("out.ipynb")
    assert __main__.main(["run", str(page), str(output), "-p", name, value]) == 2
    message = capsys.readouterr().err
    assert [word for word in words if word not in message] == []
    assert not output.exists()


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
        ("tasks", "core/none,book/conftest.py", ["core/none", f"{TESTS}/book/conftest.py"]),
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
    monkeypatch.chdir(TESTS)
    monkeypatch.setattr(__main__, "run", lambda notebook, output, /, **values: given.update(values))
    assert __main__.main(["run", str(page), "out.ipynb", "-p", name, typed]) == 0
    assert given == {name: value} and type(given[name]) is type(value)


def test_the_python_function_is_as_strict_as_the_command(page, no_kernel):
    with pytest.raises(ValueError, match="unknown parameter 'step'"):
        __main__.run(page, "out.ipynb", step=3)
    with pytest.raises(ValueError, match="epochs must be int, got '3'"):
        __main__.run(page, "out.ipynb", epochs="3")
    with pytest.raises(ValueError, match="a file of its own"):
        __main__.run(page, page)


def test_list_shows_the_parameters_and_runs_nothing(page, no_kernel, capsys):
    assert __main__.main(["run", str(page), "--list"]) == 0
    shown = capsys.readouterr().out
    assert '["trec", "sms"]' in shown and "Adam's step size" in shown
    assert __main__.main(["run", str(page)]) == 2
    assert __main__.main(["run", str(page.with_name("none.ipynb")), "out.ipynb"]) == 2
    assert "there is no notebook" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["lr = 0.1", "lr: complex = 1j", "lr: float = 'a'", "import os"])
def test_a_malformed_parameters_cell_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match="lr|import os"):
        execute.parameters(write_cells(tmp_path / "page.ipynb", line))


@pytest.mark.slow
def test_a_run_uses_this_python_its_folder_and_its_parameters(tmp_path):
    cell = "import os, sys\nprint(sys.executable, os.environ['OMP_WAIT_POLICY'], os.getcwd())\n"
    cells = cell + "print(os.environ['DIVMERGE_GLUE_DIR'])", "print(tasks, lr, type(lr).__name__)"
    page = write_cells(tmp_path / "page.ipynb", PARAMETERS, *cells)
    kernels = tmp_path / "jupyter" / "kernels" / "python3"  # a user's kernel of the same name
    kernels.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "other", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(spec))
    output = tmp_path / "new" / "out.ipynb"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "divmerge_book", "run"]
    command += [page, output, "-p", "tasks", "a,b", "-p", "lr", "1"]
    environment = {**os.environ, "JUPYTER_DATA_DIR": str(tmp_path / "jupyter")}
    environment["DIVMERGE_GLUE_DIR"] = "rows"  # of the shell's folder
    environment.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(output, as_version=4).cells
    text = "".join(out["text"] for cell in cells for out in cell.get("outputs", []))
    rows = Path("rows").absolute()
    assert text == f"{sys.executable} PASSIVE {tmp_path}\n{rows}\n['a', 'b'] 1.0 float\n"
    assert [path.name for path in output.parent.iterdir()] == ["out.ipynb"]


def test_a_failing_cell_is_shown_and_leaves_no_output(page, monkeypatch, capsys):
    facts = "assert epochs == 1", "AssertionError", "many", ["AssertionError: many"]
    fail = raising(PapermillExecutionError(2, 2, *facts))
    monkeypatch.setattr(execute.papermill, "execute_notebook", fail)
    output = page.with_name("out.ipynb")
    output.write_text("the last good run")
    assert __main__.main(["run", str(page), str(output)]) == 1
    message = capsys.readouterr().err
    assert "cell 2 failed:\nassert epochs == 1" in message and "AssertionError: many" in message
    assert output.read_text() == "the last good run"
    assert {path.name for path in page.parent.iterdir()} == {"page.ipynb", "out.ipynb"}


def test_merge_passes_its_options_on(monkeypatch, capsys):
    given = {}
    path = "divmerge_book.user_models.merge_described"
    monkeypatch.setattr(path, lambda **options: given.update(options) or [Path("merged")])
    assert __main__.main(["merge", "my.yaml", "merged", "--method", "ties", "--overwrite"]) == 0
    assert given["methods"] == ["ties"] and given["overwrite"] and given["description"] == "my.yaml"
    assert "merged model in merged" in capsys.readouterr().out
    assert __main__.main(["merge", "my.yaml", "merged"]) == 0
    assert given["methods"] == ["divmerge/layer"] and given["budget"] is None


# --- processes that run side by side -------------------------------------------------------------
@pytest.mark.slow
def test_processes_share_the_cores_and_end_with_the_block():
    with executors.processes(2) as submit:
        found = {submit(os.getenv, "OMP_NUM_THREADS").result(60) for _ in range(2)}
        assert found == {str(max(1, os.cpu_count() // 2))}
        with pytest.raises(ValueError, match="invalid literal"):
            submit(int, "x").result(60)
        number = submit(os.getpid).result(60)
        waiting = submit(eval, "__import__('time').sleep(600)")
    wait_for_the_end([number])
    with suppress(CancelledError):  # or a worker that was ended had begun it
        assert waiting.exception(60)


def test_runs_at_once_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def seen(parallel, gpus):
        return [one["CUDA_VISIBLE_DEVICES"] for one in executors.environments(parallel, 1.0, gpus)]

    assert seen(2, 2) == ["0,1", "2,3"]
    assert seen(8, 0.5) == ["0", "0", "1", "1", "2", "2", "3", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert seen(2, 1) == ["4", "5"]
    with pytest.raises(ValueError, match="have room for 4"):
        executors.environments(5, None, 1)
    assert executors.environments(1, None, 0) == [{}]


# --- the book -------------------------------------------------------------------------------------
def write_book(root: Path, **chapters: str) -> Path:
    """A repository whose chapters have one cell each."""
    (root / "book" / "results").mkdir(parents=True)
    toc = "format: jb-book\nroot: index\nparts:\n- chapters:\n"
    for name, cell in chapters.items():
        write_cells(root / "notebooks" / f"{name}.ipynb", PARAMETERS, cell)
        toc += f"  - file: notebooks/{name}\n"
    (root / "book" / "_toc.yml").write_text(toc)
    return root


@pytest.fixture
def executed(monkeypatch):
    """Chapters run in this process, without a kernel; the list of their last cells' sources."""
    found = []

    def execute(page, output, values, **how):
        found.append(page.cells[-1].source)
        with storage.fresh_file(output) as new:
            run_cells(page, new, values, **how)

    monkeypatch.setattr(executors, "execute", execute)
    monkeypatch.setattr(book, "processes", in_this_process)
    monkeypatch.setattr(book, "write_pages", lambda folder, source: source)
    monkeypatch.setattr("divmerge_book.figures.landing", lambda results: None)
    monkeypatch.setattr("divmerge_book.runner.interactive_pages.write", lambda source: None)
    return found


def test_a_wrong_size_or_number_of_workers_is_refused(tmp_path, capsys):
    command = ["book", "--root", str(write_book(tmp_path, one="")), "--size"]
    for given, words in [
        (["huge"], "smoke, default, full"),
        (["smoke", "--workers", "0"], "workers must be a whole number of 1 or more, got 0"),
        (["full", "--workers", "2"], "workers must be 1 at size full, got 2"),  # publishes seconds
    ]:
        assert __main__.main([*command, *given]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(("cores", "gigabytes", "room"), [(8, 64, 8), (8, 20, 2), (1, 4, 1)])
def test_as_many_notebooks_run_as_cores_and_memory_allow(monkeypatch, cores, gigabytes, room):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gigabytes * 2**18}
    monkeypatch.setattr("os.sysconf", pages.get)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert book.workers_at("default") == room
    assert book.workers_at("default", 3) == 3
    assert book.workers_at("full") == 1


def test_a_notebook_runs_again_only_when_something_it_needs_changed(tmp_path, executed):
    root = write_book(tmp_path, one="1", two="2")
    source = book.build("smoke", root=root, workers=1)
    assert {path.name for path in (source / "notebooks").iterdir()} == {"one.ipynb", "two.ipynb"}
    book.build("smoke", root=root, workers=1)
    assert executed == ["1", "2"]
    for number, place in enumerate((".", "study"), 2):  # a study has a folder of its own
        folder = root / "book" / "results" / place
        folder.mkdir(exist_ok=True)
        (folder / "new.json").write_text("{}")
        book.build("smoke", root=root, workers=1)
        assert len(executed) == 2 * number


def test_a_failure_names_its_cell_and_leaves_nothing_half_written(tmp_path, executed, capsys):
    root = write_book(tmp_path, bad="broken = 1 / 0", good="2")
    assert __main__.main(["book", "--size", "smoke", "--root", str(root), "--workers", "1"]) == 1
    message = capsys.readouterr().err
    assert "error: notebooks/bad: cell 1 failed:\nbroken = 1 / 0\n" in message
    assert "ZeroDivisionError: division by zero" in message
    assert executed == ["broken = 1 / 0"] and list((root / "_build").rglob("*.ipynb")) == []


def test_side_by_side_the_largest_starts_first(tmp_path, executed):
    root = write_book(tmp_path, a="1", b="#" * 4000, c="#" * 2000)
    chapters = [book.Chapter(root, f"notebooks/{name}", "smoke") for name in "abc"]
    book.execute_all(chapters, 2)
    assert list(map(len, executed)) == [4000, 2000, 1]


def test_pages_that_do_not_build_leave_the_old_ones(tmp_path, monkeypatch):
    """Warnings are errors, broken links among them."""

    def build(command, **_):
        assert {"-W", "-n"} <= set(command)
        return subprocess.CompletedProcess(command, 1, "unknown document: 'two.ipynb'")

    monkeypatch.setattr(book.subprocess, "run", build)
    (tmp_path / "html").mkdir()
    with pytest.raises(RuntimeError, match="(?s)two.ipynb.*were not built"):
        book.write_pages(tmp_path, tmp_path / "src")
    assert [path.name for path in tmp_path.iterdir()] == ["html"]


@pytest.mark.parametrize("clean", [True, False])
def test_a_page_folds_the_cell_of_the_given_parameters(clean, tmp_path, monkeypatch):
    tags = ["injected-parameters"]
    cell = nbformat.v4.new_code_cell("size = 1", metadata={"tags": tags})
    page = nbformat.v4.new_notebook(cells=[cell])
    monkeypatch.setattr(execute.papermill, "execute_notebook", lambda page, *_, **how: page)
    execute.execute(page, tmp_path / "out.ipynb", {}, cwd=tmp_path, clean=clean)
    (found,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    assert found.metadata.tags == ([*tags, "hide-input"] if clean else tags)
