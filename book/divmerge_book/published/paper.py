"""Numbers printed by others, as DataFrames.

`paper.json` has those of the DivMerge paper (version 3 of the preprint, arXiv 2509.02108),
`fusionbench.json` those of FusionBench's GPT-2 experts.
"""

import json
from functools import cache
from importlib.resources import files

import pandas as pd

# The paper's names of methods -> the methods here. The paper does not define its layers (LL); here
# a layer is a tensor.
METHODS_HERE = {
    "Model averaging": "average",
    "Multi-SLERP": "multi_slerp",
    "TIES": "ties",
    "TL AdaMerging": "adamerging/task",
    "LL AdaMerging": "adamerging/layer",
    "TL KL": "divmerge/task",
    "LL KL": "divmerge/layer",
    "TL JS": "divmerge/task",
    "LL JS": "divmerge/layer",
}
WORKS = ("paper", "fusionbench")


@cache
def printed(work: str = "paper") -> dict:
    """Everything in the data file of one of WORKS: `source`, `note`, and `parts` by name."""
    if work not in WORKS:
        raise ValueError(f"no numbers of {work!r} are kept here; choose one of {', '.join(WORKS)}")
    return json.loads(files("divmerge_book.published").joinpath(f"{work}.json").read_text("utf-8"))


def citation(work: str = "paper") -> str:
    """Where the numbers come from, in one line for a caption."""
    return printed(work)["source"]


def part(name: str, work: str = "paper") -> dict:
    """A table or figure as it stands in the file. Raises ValueError, naming what is kept."""
    kept = printed(work)["parts"]
    if name not in kept:
        raise ValueError(f"the {work}'s {name!r} is not kept here; choose one of {', '.join(kept)}")
    return kept[name]


def frame(name: str, work: str = "paper") -> pd.DataFrame:
    """A part's numbers under its printed rows and columns.

    Its `attrs` hold what the numbers are (`holds`), their `unit` and the work (`source`).
    """
    found = part(name, work)
    index = pd.Index(found["rows"], name=found["index"]) if found["rows"] else None
    result = pd.DataFrame(found["values"], index, found["columns"])
    result.attrs = {"holds": found["holds"], "unit": found["unit"], "source": citation(work)}
    return result


def table(number: int) -> pd.DataFrame:
    """A table of the paper: 2 to 7, or 9. Raises ValueError for another number.

    2: printed correlations, task by divergence. 3: ANP of pairs, % with margins, by method. 4:
    margins of generation, points, method by T. 5: accuracy %, expert by task. 6, 7: ANP %, T by
    method, without the printed averages (`averages`). 9: hyperparameters.
    """
    return frame(f"table {number}")


def figure(number: int, panel: str) -> pd.DataFrame:
    """A figure that prints its numbers: 5 (`kl`, `js`) or 6 (`glue`). Raises ValueError for others.

    5: divergence in nats of the experts j (columns) from the expert i (rows) on task i's inputs.
    6: cosine of the task vectors.
    """
    return frame(f"figure {number} {panel}")


def averages(number: int) -> pd.Series:
    """The averages printed below Tables 2, 6 and 7. Raises ValueError for a table without them."""
    found = part(f"table {number}")
    if "average" not in found:
        held = ", ".join(name for name, one in printed()["parts"].items() if "average" in one)
        raise ValueError(f"table {number} prints no averages; these do: {held}")
    return pd.Series(found["average"], found["columns"], name="average")
