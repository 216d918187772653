"""A notebook checks its own parameters where it runs: plain papermill, JupyterLab, Colab."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from divmerge_book.runner.parameters import check_parameters
from papermill.cli import papermill
from test_runs import PARAMETERS, notebook, text
from test_structure import CHECK

ROOT = Path(__file__).resolve().parents[2]


def kernel(*cells: str) -> dict:
    """A namespace as IPython keeps it: these cells have run, and the last one is running."""
    found = {"In": [""]}
    for cell in cells:
        found["In"].append(cell)
        exec(cell, found)
    return {**found, "In": [*found["In"], CHECK]}


def injected(line: str) -> str:
    return f"# Parameters\n{line}\n"


def test_what_is_set_is_told_and_what_is_empty_is_left_to_the_size():
    unset = 'seeds: list[int] = []\nlr: float = 0.0\nencoder: str = ""\nlive: bool = True'
    assert check_parameters(kernel(f'size: str = "smoke"\n{unset}')) == frozenset()
    cells = 'size: str = "smoke"\ntasks: list[str] = ["a"]\n' + unset, injected("seeds = [0]")
    assert check_parameters(kernel(*cells)) == {"tasks", "seeds"}


def test_an_int_given_for_a_float_becomes_one():
    found = kernel(PARAMETERS, injected("lr = 1"))
    assert "lr" in check_parameters(found)
    assert found["lr"] == 1.0 and type(found["lr"]) is float


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("quiet = 'false'", "quiet must be bool, got 'false'; papermill reads -p quiet True and"),
        ("tasks = 'trec,sms'", "tasks must be list[str], got 'trec,sms'; papermill reads a list"),
        ("seeds = '0'", "seeds must be list[int], got '0'"),
        ("seeds = [0, 1.5]", "seeds must be int, got 1.5"),
        ("tasks = None", "tasks must be list[str], got None"),
        ("epochs = '4'", "epochs must be int, got '4'"),
        ("epochs = True", "epochs must be int, got True"),
        ("lr = float('nan')", "lr must be float, got nan"),
        ("lr = float('inf')", "lr must be float, got inf"),
        ("size = 1", "size must be str, got 1; papermill reads text with -r size TEXT"),
        ("size = 'medium'", "size must be one of smoke, default, full, got 'medium'"),
        ("sede = [1]", "unknown parameter 'sede'; did you mean 'seeds'?; it has size, tasks"),
        ("a_b = 1", "unknown parameter 'a_b'; it has size, tasks, seeds, lr, epochs, quiet"),
    ],
)
def test_what_papermill_would_take_is_refused(line, words):
    assert words in refused(PARAMETERS, injected(line))


@pytest.mark.parametrize("line", ["quiet: bool = 'false'", "lr: float = float('nan')"])
def test_a_reader_who_edits_the_cell_itself_is_told_too(line):
    name, kind = line.partition(" = ")[0].split(": ")
    kept = [one for one in PARAMETERS.splitlines() if not one.startswith(f"{name}:")]
    assert f"{name} must be {kind}" in refused("\n".join([*kept, line]))


def refused(*cells: str) -> str:
    """What the check says where it stops."""
    with pytest.raises(ValueError) as error:
        check_parameters(kernel(*cells))
    return str(error.value)


def test_the_last_run_of_the_parameters_counts():
    """In JupyterLab cells run again and in any order, and some do not parse."""
    mended = injected("quiet = 'no'"), "def broken(", PARAMETERS, "x = 1"
    found = kernel(PARAMETERS)
    for cell in mended:
        found["In"].append(cell)
    assert check_parameters(found) == {"tasks", "seeds", "lr", "epochs"}
    found["In"].append("quiet: bool = 1")
    found["quiet"] = 1
    with pytest.raises(ValueError, match="quiet must be bool"):
        check_parameters(found)


@pytest.mark.parametrize("cells", [(), ("x = 1", "def broken(")])
def test_a_notebook_whose_parameters_did_not_run_says_so(cells):
    with pytest.raises(ValueError, match="run the notebook's first code cell"):
        check_parameters({"In": ["", *cells, CHECK]})


def test_a_line_without_a_type_is_refused():
    with pytest.raises(ValueError, match="`epochs = 4` is not `name: type = default"):
        check_parameters(kernel("size: str = 'smoke'\nepochs = 4"))


# --- with papermill itself ------------------------------------------------------------------------


def plain_papermill(page: Path, *arguments: str) -> str:
    """What the command `papermill page out` fails with; empty where it succeeds."""
    output = page.with_name("out.ipynb")
    command = [str(page), str(output), "--cwd", str(page.parent), *arguments]
    done = CliRunner().invoke(papermill, command)
    return "" if done.exception is None else str(done.exception)


@pytest.mark.slow
def test_plain_papermill_runs_what_is_right_and_stops_at_what_is_not(tmp_path):
    work = "print(size, tasks, seeds, lr, epochs, quiet, sorted(given))\nopen('trace', 'w').close()"
    page = notebook(tmp_path / "page.ipynb", CHECK, work)
    failed = plain_papermill(page, "-p", "epoch", "3")
    assert "unknown parameter 'epoch'; did you mean 'epochs'?" in failed
    assert not page.with_name("trace").exists()
    right = ("-p", "quiet", "True", "-y", "tasks: [sms]", "-p", "lr", "1", "-r", "size", "smoke")
    assert plain_papermill(page, *right) == ""
    shown = text(page.with_name("out.ipynb"))
    assert "smoke ['sms'] [0] 1.0 4 True ['epochs', 'lr', 'quiet', 'seeds', 'tasks']" in shown


@pytest.mark.slow
def test_a_false_that_is_text_replaces_no_model(tmp_path):
    chapter = Path(shutil.copy(ROOT / "notebooks" / "13_your_own_models.ipynb", tmp_path))
    kept = tmp_path / "merged" / "config.json"
    kept.parent.mkdir()
    kept.write_text("a model")
    given = ("-p", "size", "smoke", "-p", "output", str(kept.parent), "-p", "overwrite", "false")
    failed = plain_papermill(chapter, *given)
    assert "overwrite must be bool, got 'false'; papermill reads -p overwrite True and" in failed
    assert kept.read_text() == "a model" and len(list(kept.parent.iterdir())) == 1
