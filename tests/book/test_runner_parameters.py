"""A notebook checks its own parameters where it runs: plain papermill, JupyterLab, Colab."""

import pytest
from click.testing import CliRunner
from divmerge_book.runner.parameters import check_parameters
from papermill.cli import papermill
from small_grids import write_cells
from test_runner_main import PARAMETERS
from test_structure import CHECK


def kernel(*cells: str) -> dict:
    """A namespace as IPython keeps it: these cells have run, and the last one is running."""
    found = {"In": [""]}
    for cell in cells:
        found["In"].append(cell)
        exec(cell, found)
    return {**found, "In": [*found["In"], CHECK]}


def injected(line: str) -> str:
    return f"# Parameters\n{line}\n"


def test_what_is_set_is_returned_and_what_is_empty_is_left_to_the_size():
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
        ("seeds = [0, 1.5]", "seeds must be list[int], got [0, 1.5]"),
        ("tasks = None", "tasks must be list[str], got None"),
        ("seeds = [0, 1, 0]", "parameter seeds has a value twice: [0, 1, 0]"),
        ("epochs = '4'", "epochs must be int, got '4'"),
        ("epochs = True", "epochs must be int, got True"),
        ("lr = float('nan')", "lr must be float, got nan"),
        ("lr = float('inf')", "lr must be float, got inf"),
        ("size = 1", "size must be str, got 1; papermill reads text with -r size TEXT"),
        ("size = 'medium'", "unknown size 'medium'; choose one of: smoke, default, full"),
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
@pytest.mark.slow
def test_plain_papermill_stops_before_the_work(tmp_path):
    """So no model is replaced because `-p overwrite false` is text to papermill."""
    cells = CHECK, "open('trace', 'w').close()"
    page = write_cells(tmp_path / "page.ipynb", PARAMETERS, *cells)
    command = [str(page), str(tmp_path / "out.ipynb"), "--cwd", str(tmp_path)]
    done = CliRunner().invoke(papermill, [*command, "-p", "lr", "1", "-p", "quiet", "false"])
    said = "quiet must be bool, got 'false'; papermill reads -p quiet True and"
    assert said in str(done.exception)
    assert not (tmp_path / "trace").exists()
