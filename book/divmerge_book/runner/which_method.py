"""Which method to use: the best of the stored table by data, storage and number of tasks."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from divmerge_book.evaluation.report import Report, caption
from divmerge_book.figures import baselines, score_intervals, title
from divmerge_book.findings import contests
from divmerge_book.runner import method_pages
from divmerge_book.runner.method_pages import NOTEBOOK, slug, table
from divmerge_core.methods import parse

TABLE = "baselines/embedded_bert_tiny.json"
GLUE = "bases/glue_minilm.json"  # fewer methods, DivMerge+ among them; no costs
DATA = {  # what is at hand -> the data that a method may look at
    "nothing but weights": 1,
    "unlabelled inputs": 2,
    "labelled validation rows": 3,
}
STORED = {  # what may be stored -> the most, in sizes of one model; None: half of the experts
    "one model": 1.0,
    "one model and small additions": 1.5,
    "half of the experts": None,
}
COLUMNS = ["value", "low", "high", "kept", "kept_low", "kept_high"]
HEADS = ("data at hand", "may be stored", "method", "ANP, %", "kept margin, %", "s", "MB")


@cache
def summaries(results: Path) -> tuple[Report, dict[int, list[pd.DataFrame]]]:
    """The stored Report of all methods and, by number of tasks, two of its `baselines.summary`.

    The first has the options that the search found on validation rows, the second the published.
    """
    report = Report.load(results / TABLE)
    subsets = {one.count("+") + 1: one for one in report.rows.subset.unique()}
    found = {
        count: [baselines.summary(report, subset, published=own) for own in (False, True)]
        for count, subset in subsets.items()
    }
    return report, {n: [e[e.block != baselines.REFERENCE] for e in two] for n, two in found.items()}


def best(
    rows: pd.DataFrame, published: pd.DataFrame, count: int
) -> dict[str, tuple[str, str, pd.Series]]:
    """The method of the highest ANP for every choice of data and storage, T = count.

    It looks at no more than the data, and stores no more than may be stored. Without labelled rows
    its options are the published ones. Returns method -> the first data and storage that it is best
    for, and its row.
    """
    found = {}
    for data, number in DATA.items():
        every = rows if number == len(DATA) else published
        for stored, most in STORED.items():
            some = every[every.block.isin(baselines.BLOCKS[1 : 1 + number])]
            some = some[some.stored <= max(1.0, most or count / 2) + 1e-3]
            spec = some.value.idxmax()
            found.setdefault(spec, (data, stored, some.loc[spec]))
    return found


def link(spec: str) -> str:
    """A method's title as a link to its page."""
    return f"[{title(spec)}](#method-{slug(parse(spec)[0])})"


def row_of(data: str, stored: str, spec: str, row: pd.Series) -> tuple[str, ...]:
    """A row of the decision table, with scores in % and their 95 % intervals."""
    value, low, high, kept, kept_low, kept_high = 100 * row[COLUMNS].astype(float)
    return (
        *(data, stored, link(spec), f"{value:.1f} [{low:.1f}, {high:.1f}]"),
        *(f"{kept:.1f} [{kept_low:.1f}, {kept_high:.1f}]", f"{row.seconds:.1f}"),
        f"{row.peak_bytes / 1e6:.0f}",
    )


def command(spec: str) -> str:
    """One command that runs a method: on one's own models where it gives one model."""
    if baselines.is_single_model(spec):
        return f".venv/bin/divmerge merge my_models.yaml merged/ --method {spec}"
    return f".venv/bin/python -m divmerge_book run \\\n  {NOTEBOOK} out.ipynb -p methods {spec}"


def decision(
    two: Sequence[pd.DataFrame], count: int, heads: Sequence[str], widths: str
) -> tuple[list[str], str]:
    """The methods that `best` names, each once, and their table with these columns."""
    chosen = best(*two, count)
    lines = [row_of(*what, spec, row)[: len(heads)] for spec, (*what, row) in chosen.items()]
    return list(chosen), table([heads, *lines], heads="header-rows", widths=widths)


def tables(results: Path) -> str:
    """The decision tables, one for each stored number of tasks, and a command for each method."""
    (report, found), glue = summaries(results), Report.load(results / GLUE)
    machine = f"{report.provenance['machine']}, in `{TABLE}`"
    parts, named = [f"*{caption(report)}, {machine}.*\n"], {}
    for count, two in found.items():
        specs, text = decision(two, count, HEADS, "17 17 18 19 19 5 5")
        named |= dict.fromkeys(specs)
        parts += [f"## The best by ANP at T = {count}\n", text]
    (subset,) = glue.rows.subset.unique()
    rows = score_intervals(glue, subset).set_index("method").drop(["expert", "base"])
    rows = baselines.single_models(rows)
    rows = rows.assign(block=rows.index.map(baselines.block), stored=1.0, seconds=0.0, peak_bytes=0)
    specs, text = decision([rows] * 2, subset.count("+") + 1, HEADS[:5], "18 18 24 20 20")
    named |= dict.fromkeys(specs)
    note = f"in `{GLUE}`; without costs, options by labelled validation rows"
    parts += [f"## The best on GLUE\n\n*{caption(glue)}, {note}.*\n", text]
    parts.append(contests.standing(glue, "the stored run"))
    parts += ["\n## Commands\n\n```bash", *map(command, named), "```\n"]
    return "\n".join(parts)


def standings(results: Path) -> Mapping[str, Sequence[str]]:
    """By method: a line on each of its groupings, with its ranks and cost at the largest T."""
    report, found = summaries(results)
    count, (rows, _) = max(found.items())
    ranks = {column: rows[column].rank(ascending=False).astype(int) for column in ("value", "kept")}
    lines: dict[str, list[str]] = {}
    for spec, row in rows.iterrows():
        lines.setdefault(parse(spec)[0], []).append(
            f"{title(spec)}, tuned: {100 * row.value:.1f} % ANP (number {ranks['value'][spec]} of "
            f"{len(rows)}; with published options {100 * row.published:.1f} %), "
            f"{100 * row.kept:.1f} % kept margin (number {ranks['kept'][spec]}); "
            f"{row.seconds:.1f} s and {row.peak_bytes / 1e6:.0f} MB for a merge of T = {count}; "
            f"{row.stored:.2f} models stored; `book/results/{TABLE}`"
        )
    return lines


def write(source: Path) -> None:
    """Write the pages of methods and `results/which_method.md` into a copy of the book's source.

    Without the stored table they say nothing of ranks and costs.
    """
    results, text, measured = source / "results", "No table is stored yet.\n", {}
    if (results / TABLE).is_file():
        text, measured = tables(results), standings(results)
    (results / "which_method.md").write_text(text, "utf-8")
    method_pages.write(source / "methods", measured)
