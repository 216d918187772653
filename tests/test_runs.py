"""Strict parameters, whole outputs, and a book that repeats no finished work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

from divmerge_core import notebooks, runs

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

    monkeypatch.setattr(notebooks.papermill, "execute_notebook", refuse)


def test_parameters_have_name_type_default_and_help(page):
    found = notebooks.parameters(page)
    assert list(found) == ["size", "tasks", "seeds", "lr", "epochs", "quiet"]
    assert found["lr"] == notebooks.Parameter("lr", "float", 0.01, "Adam's step size")
    assert found["tasks"].help == 'names; "#" is allowed in a string'


def test_an_unknown_name_is_refused_with_the_choices_and_the_nearest(page, no_kernel, capsys):
    assert runs.main(["run", str(page), str(page.with_name("out.ipynb")), "-p", "sede", "1"]) == 2
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
    assert runs.main(["run", str(page), "out.ipynb", "-p", name, value]) == 2
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
    monkeypatch.setattr(runs, "run", lambda notebook, output, /, **values: given.update(values))
    assert runs.main(["run", str(page), "out.ipynb", "-p", name, typed]) == 0
    assert given == {name: value} and type(given[name]) is type(value)


def test_the_python_function_is_as_strict_as_the_command(page, no_kernel):
    with pytest.raises(ValueError, match="unknown parameter 'step'"):
        runs.run(page, "out.ipynb", step=3)
    with pytest.raises(ValueError, match="epochs must be int, got '3'"):
        runs.run(page, "out.ipynb", epochs="3")


def test_list_shows_the_parameters_and_runs_nothing(page, no_kernel, capsys):
    assert runs.main(["run", str(page), "--list"]) == 0
    shown = capsys.readouterr().out
    assert '["trec", "sms"]' in shown and "Adam's step size" in shown


@pytest.mark.parametrize("line", ["lr = 0.1", "lr: complex = 1j", "lr: float = 'a'", "import os"])
def test_a_malformed_parameters_cell_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match="lr|import os"):
        notebooks.parameters(notebook(tmp_path / "page.ipynb", parameters=line))


def test_a_missing_notebook_is_refused(no_kernel, tmp_path, capsys):
    assert runs.main(["run", str(tmp_path / "none.ipynb"), "out.ipynb"]) == 2
    assert "there is no notebook" in capsys.readouterr().err


def test_the_output_may_not_be_the_notebook_itself(page, no_kernel):
    with pytest.raises(ValueError, match="a file of its own"):
        runs.run(page, page)


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
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "divmerge_core.runs", "run"]
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
    assert runs.main(["run", str(page), str(output)]) == 1
    message = capsys.readouterr().err
    assert "assert epochs == wanted" in message and "AssertionError: too many" in message
    assert output.read_text() == "the last good run"
    assert {path.name for path in tmp_path.iterdir()} == {"page.ipynb", "out.ipynb"}


@pytest.fixture
def small_book(tmp_path):
    """A repository with one chapter that counts how often it was executed."""
    count = "from pathlib import Path\nlog = Path('../log')\nprint('chapter', size)"
    bar = "import sys\nprint('a bar', file=sys.stderr)\n_ = log.open('a').write('x')"
    notebook(tmp_path / "notebooks" / "one.ipynb", count, bar)
    (tmp_path / "book" / "results").mkdir(parents=True)
    (tmp_path / "book" / "index.md").write_text("# Home\n\n[One](notebooks/one.ipynb)\n")
    toc = "format: jb-book\nroot: index\nchapters:\n  - file: notebooks/one\n"
    (tmp_path / "book" / "_toc.yml").write_text(toc)
    config = 'title: Small\nexecute: {execute_notebooks: "off"}\nonly_build_toc_files: true\n'
    (tmp_path / "book" / "_config.yml").write_text(config)
    return tmp_path


def executions(root: Path) -> int:
    return len((root / "log").read_text())


def test_a_wrong_size_is_refused_with_the_choices(small_book, no_kernel, capsys):
    assert runs.main(["book", "--size", "huge", "--root", str(small_book)]) == 2
    assert "smoke, default, full" in capsys.readouterr().err


def test_a_notebook_runs_again_only_when_something_it_needs_changed(small_book, monkeypatch):
    monkeypatch.setattr(runs, "_pages", lambda build, source: source)
    monkeypatch.setattr("divmerge_core.figures.landing", lambda results: None)
    source = runs.book("smoke", root=small_book)
    assert text(source / "notebooks" / "one.ipynb") == "chapter smoke\n"  # no progress bars
    runs.book("smoke", root=small_book)
    assert executions(small_book) == 1
    for number, place in enumerate((".", "study"), 2):  # a study has a folder of its own
        folder = small_book / "book" / "results" / place
        folder.mkdir(exist_ok=True)
        (folder / "new.json").write_text("{}")
        runs.book("smoke", root=small_book)
        assert executions(small_book) == number
    notebook(small_book / "notebooks" / "one.ipynb", "raise RuntimeError('broken')")
    with pytest.raises(PapermillExecutionError, match="broken"):
        runs.book("smoke", root=small_book)
    assert not list((small_book / "_build" / "executed" / "smoke").glob("*.json"))


@pytest.mark.slow
def test_the_book_is_built_and_a_broken_link_is_an_error(small_book, monkeypatch, capsys):
    monkeypatch.setattr(runs, "_stage", lambda root, name, size, folder: root / f"{name}.ipynb")
    (small_book / "_build").mkdir()
    assert runs.main(["book", "--size", "smoke", "--root", str(small_book)]) == 0
    html = small_book / "_build" / "html" / "index.html"
    assert f"file://{html}" in capsys.readouterr().out
    before = html.read_text()
    (small_book / "book" / "index.md").write_text("# Home\n\n[Two](notebooks/two.ipynb)\n")
    assert runs.main(["book", "--size", "smoke", "--root", str(small_book)]) == 1
    assert "two.ipynb" in capsys.readouterr().err
    assert html.read_text() == before
    assert sorted(path.name for path in (small_book / "_build").iterdir()) == ["html", "src"]
