"""One quantity in every stored result that holds it: DivMerge with all eight tasks, BERT-tiny.

Chapters measured it in settings of their own; values are comparable where the settings are equal.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from divmerge_book.evaluation.sizes import STANDARD, setting
from divmerge_book.findings import table_of
from divmerge_book.findings.in_short import Stored
from divmerge_book.studies import scores
from divmerge_book.studies.predictions import report_of

TABLE = "baselines/embedded_bert_tiny.json"
# File and table of predictions -> the rows of DivMerge per layer and of the experts; what the rows
# fix, where the file's facts do not say it.
PREDICTIONS: Mapping[tuple[str, str], tuple[str, Mapping]] = {
    ("choice/ablation.json", "scores"): (
        "search == 'searched' and count == 8 and method in ('js/layer', 'expert')",
        {},
    ),
    ("protocol/settings.json", "start"): (
        "grouping == 'layer' and method in ('default', 'expert')",
        {"epochs": 4, "candidates": 1},  # the published values
    ),
    ("bases/ablation.json", "answers"): (
        "tasks == 8 and grouping == 'layer' and method in ('js=raw', 'expert')",
        {},
    ),
}


def values(stored: Stored) -> pd.DataFrame:
    """A row per stored file: file, anp, low, high, and the items of STANDARD.

    anp in percent with its 95 % interval; an item is missing where the file does not say it.
    """
    report, spec = stored.report(TABLE), "divmerge/layer"
    whole = max(report.rows.subset.unique(), key=len)
    options = next(f for f in report.fits if (f["subset"], f["method"]) == (whole, spec))["options"]
    found = report.sampled("embedded", whole).estimate(spec)
    rows = [row(TABLE, found, report.provenance | {"epochs": options["epochs"]})]
    for (file, name), (wanted, fixed) in PREDICTIONS.items():
        run = stored.tables(file)
        packed = run[name].query(wanted)
        label = packed.method[packed.method != "expert"].iloc[0]
        found = report_of(packed).sampled("suite", "all").estimate(label)
        rows.append(row(file, found, {**run.facts, **fixed}) | fixed)
    run = stored.tables("scaling/sample.json")
    table = scores.by_subset(scores.ratios(run["answers"], run["answers"]))
    seeds = table[(table["T"] == 8) & (table.method == spec)].anp
    place = {"file": "scaling/sample.json", "anp": 100 * seeds.mean(), "low": None, "high": None}
    return pd.DataFrame([*rows, place | setting(run.facts)])


def row(file: str, found, facts: Mapping) -> dict[str, object]:
    low, high = found.interval()
    points = {"anp": found.value, "low": low, "high": high}
    return {"file": file, **{n: 100 * float(v) for n, v in points.items()}, **setting(facts)}


def as_markdown(stored: Stored) -> str:
    """The table, the standard setting, and what differs from it in bold, where it is stored."""
    lines = []
    try:
        rows = values(stored).to_dict("records")
    except FileNotFoundError as error:  # as in the folder of a grid's run
        return f"`{Path(error.filename).name}` is not stored here, and the table needs it."
    for one in rows:
        cells = []
        for name, usual in STANDARD.items():
            cells.append("not stored" if pd.isna(one[name]) else f"{one[name]:.0f}")
            if not pd.isna(one[name]) and one[name] != usual:
                cells[-1] = f"**{cells[-1]}**"
        ends = "" if pd.isna(one["low"]) else f" ({one['low']:.1f} to {one['high']:.1f})"
        lines.append([f"`{one['file']}`", f"{one['anp']:.1f}{ends}", *cells])
    usual = ", ".join(f"{name} {value}" for name, value in STANDARD.items())
    table = table_of(["stored result", "ANP, %", *STANDARD], lines)
    return f"{table}\n\n*The standard setting: {usual}; what differs is in bold.*"
