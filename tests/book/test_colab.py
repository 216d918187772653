"""The notebooks run on a machine like Colab's, from the notebook file alone (`make test-colab`).

What is like Colab and what is not stands in colab_machine.py. Not tested: Colab's own page, a GPU,
and access to a model hub. The package is installed from this checkout's last commit.
"""

import re
from datetime import datetime

import pytest
from colab_machine import ROOT, Machine, Missing
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.colab

# What Colab lacks of our dependencies and theirs. IPython asks for jedi, and Colab leaves it out.
ADDED = {
    *("annotated-types", "cma", "divmerge-core", "gguf", "jaxtyping", "jedi", "papermill"),
    *("pydantic", "pydantic-core", "rouge-score", "typing-inspection", "wadler-lindig"),
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


def printed(cells) -> str:
    """What cells wrote to stdout."""
    outputs = [one for cell in cells for one in cell.get("outputs", [])]
    return "".join(one.text for one in outputs if one.get("name") == "stdout")


@pytest.mark.parametrize(
    ("name", "said"),
    [("00_quickstart", "steps of Adam"), ("14_glue_on_a_gpu", "suite embedded_lm: no GPU")],
)
def test_a_notebook_alone_installs_what_is_missing_and_runs(machine, name, said, capsys):
    before = machine.packages()
    book = machine.run(ROOT / "notebooks" / f"{name}.ipynb", size="smoke")
    after = machine.packages()
    assert before - after == set(), "a version that Colab came with has changed"
    assert {canonicalize_name(re.split("==| @ ", line)[0]) for line in after - before} == ADDED
    assert said in printed(book.cells)
    (setup,) = [cell for cell in book.cells if "%pip install" in cell.source]
    with capsys.disabled():
        print(f"\n{name}: its set-up cell took {seconds(setup):.0f} s (we promise a minute)")
