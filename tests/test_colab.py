"""The notebooks run on a machine like Colab's, from the notebook file alone (`make test-colab`).

What is like Colab and what is not stands in colab_machine.py. Not tested: Colab's own page, a GPU,
and access to a model hub. The package is installed from this checkout's last commit.
"""

import re
from datetime import datetime

import pytest
from colab_machine import LIST, ROOT, Machine, Missing
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.colab

# What Colab lacks of our dependencies and theirs. IPython asks for jedi, and Colab leaves it out.
ADDED = {
    *("cma", "divmerge-core", "jaxtyping", "jedi", "papermill", "rouge-score", "wadler-lindig"),
}


@pytest.fixture
def machine(tmp_path):
    try:
        return Machine.like_colab(tmp_path)
    except Missing as missing:
        pytest.skip(f"no machine like Colab's can be made: {missing}")


def seconds(cell) -> float:
    """From a cell's start to its end, as the kernel told them."""
    told = cell.metadata.execution
    start, end = (told[f"iopub.{what}"] for what in ("execute_input", "status.idle"))
    start, end = (datetime.fromisoformat(time.replace("Z", "+00:00")) for time in (start, end))
    return (end - start).total_seconds()


def printed(book) -> str:
    texts = [out.get("text", "") for cell in book.cells for out in cell.get("outputs", [])]
    return "".join(texts)


@pytest.mark.parametrize("name", ["00_quickstart"])
def test_a_notebook_alone_installs_what_is_missing_and_runs(machine, name, capsys):
    before = machine.packages()
    book = machine.run(ROOT / "notebooks" / f"{name}.ipynb", size="smoke")
    after = machine.packages()
    assert before - after == set(), "a version that Colab came with has changed"
    added = {canonicalize_name(re.split("==| @ ", line)[0]) for line in after - before}
    assert added == ADDED
    (setup,) = [c for c in book.cells if "%pip install" in c.source]
    with capsys.disabled():
        print(f"\n{name}: set-up {seconds(setup):.0f} s; {len(LIST.read_text().splitlines())}")
