"""The two pages that a reader can play with: the table of methods and the plane of coefficients.

Both are made of stored results. `_static/interactive.js` brings them to life; without JavaScript
the table is whole, and a figure stands in the plane's place.
"""

import json
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.colors import to_hex

from divmerge_book.evaluation import stored_tables
from divmerge_book.evaluation.report import Report, caption
from divmerge_book.figures import baselines, landscapes, largest, title
from divmerge_book.figures.styles import style
from divmerge_book.runner.method_pages import slug
from divmerge_core.methods import parse

METHODS = "baselines/embedded_bert_tiny.json"
PLANES = "interference/planes.json"
COLUMNS = {  # of a summary -> heading, digits, factor, whether less is better
    "value": ("ANP, %", 1, 100, False),
    "kept": ("kept margin, %", 1, 100, False),
    "worst": ("worst task, %", 1, 100, False),
    "seconds": ("merge, s", 2, 1, True),
    "peak_bytes": ("peak, MB", 0, 1e-6, True),
    "stored": ("stored, models", 2, 1, True),
    "inputs": ("inputs", 0, 1, True),
}
METHODS_PAGE = """\
(table-of-methods)=
# All methods in one table

{count} methods merged the experts of {tasks} tasks, with the same search for each. A click on the
head of a column sorts the table; the fields above it leave methods out. *Data* is what the merge
itself reads; the options of every method were chosen on labelled validation rows. The
[chapter](../notebooks/06_baselines.ipynb) has the intervals, and each name leads to the method's
page.

```{{raw}} html
{table}
```

*Stored run: {caption}. File: `book/results/{file}`.*
"""
PLANE_PAGE = """\
(plane-of-coefficients)=
# The plane of two coefficients

A merge of two experts is a point in a plane,
$\\theta_0 + \\lambda_1 \\tau_1 + \\lambda_2 \\tau_2$. Every square is a merged model that was
scored on test rows. Drag the point, or use the two sliders, and read the objective of DivMerge,
both accuracies and what each method chose. The
[chapter on interference](../notebooks/18_interference_in_answers.ipynb) explains the plane.

```{{figure}} ../results/plane.svg
:name: fig-plane-static
:figclass: static
:alt: Two coloured planes over the coefficients of {tasks}; four methods' ends are marked.
The objective (left) and ANP (right) over the coefficients of {tasks}, and where four methods end.
Stars: the experts; cross: the base.
```

```{{raw}} html
<div class="plane"><script type="application/json">{data}</script></div>
```

*{caption} File: `book/results/{file}`.*
"""


def number(value: float | int, digits: int, factor: float | int) -> str:
    """A cell with a number to show and to sort by; empty where there is none."""
    if pd.isna(value):
        return '<td data-value=""></td>'
    return f'<td data-value="{value:.6g}">{factor * value:.{digits}f}</td>'


def methods_table(table: pd.DataFrame) -> str:
    """A summary of all methods (see `baselines.summary`) as an HTML table in its own order."""
    heads = [f"<th{' data-low' if low else ''}>{name}</th>" for name, _, _, low in COLUMNS.values()]
    lines = ['<div class="scroll" tabindex="0" role="region" aria-label="Table of methods">']
    lines += ['<table class="methods"><thead><tr><th>method</th><th>data</th>', *heads]
    lines += ["</tr></thead><tbody>"]
    for name, row in table[table.block != baselines.REFERENCE].iterrows():
        models = 1 if baselines.is_single_model(name) else "more"
        facts = f'data-data="{row.block}" data-seconds="{row.seconds:.6g}" data-models="{models}"'
        page = f"../methods/{slug(parse(name)[0])}.html"
        lines.append(f'<tr {facts}><th scope="row"><a href="{page}">{escape(title(name))}</a></th>')
        lines.append(f"<td>{row.block}</td>")
        lines += [number(row[column], *how[1:3]) for column, how in COLUMNS.items()]
        lines.append("</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def methods_page(results: Path) -> str:
    """The page with the table of all methods on the largest merge of the stored comparison."""
    report = Report.load(results / METHODS)
    subset = largest(report.rows).subset.iloc[0]
    table = baselines.summary(report, subset)
    facts = {"count": (table.block != baselines.REFERENCE).sum(), "tasks": subset.count("+") + 1}
    facts |= {"caption": caption(report), "file": METHODS}
    return METHODS_PAGE.format(table=methods_table(table), **facts)


def measures(row: pd.Series) -> list[float]:
    """Objective in nats, ANP and kept margin and both accuracies in %, of a row of a plane."""
    both = zip(row.accuracies, row.experts, row.majorities, strict=True)
    kept = [(value - floor) / (expert - floor) for value, expert, floor in both]
    return [row.js, 100 * row.anp, 50 * sum(kept), *(100 * value for value in row.accuracies)]


def plane_data(grid: pd.DataFrame, marks: pd.DataFrame) -> dict:
    """One pair's plane for its page: measures `[l1][l2]` by name; methods with their paths."""
    tasks = grid.pair.iloc[0].split("+")
    names = ["objective, nats", "ANP, %", "kept margin, %", *(f"accuracy, {t}, %" for t in tasks)]
    grid, axis = grid.sort_values(["l1", "l2"]), sorted(set(grid.l1))
    values = pd.DataFrame([measures(row) for _, row in grid.iterrows()], columns=names).round(4)
    methods = []
    for name in landscapes.MARKS:
        steps, look = marks[marks.method == name].sort_values("step"), style(name)
        look = {"colour": to_hex(look["color"]), "marker": look["marker"], "title": title(name)}
        path = steps[["l1", "l2"]].values.tolist()
        methods.append({**look, "path": path, "values": measures(steps.iloc[-1])})
    return {
        "tasks": tasks,
        "axis": axis,
        "measures": {n: values[n].to_numpy().reshape(len(axis), -1).tolist() for n in names},
        "digits": {name: 4 if "nats" in name else 1 for name in names},
        "lower": names[:1],
        "methods": methods,
    }


def plane_page(results: Path) -> str:
    """The page with the stored planes; draws its figure, `plane.svg`, into the results."""
    tables, facts = stored_tables.load(results / PLANES)
    grid, marks = tables["grid"], tables["marks"]
    pairs = list(dict.fromkeys(grid.pair))
    first, ends = grid[grid.pair == pairs[0]], marks[marks.pair == pairs[0]]
    fig, axes = plt.subplots(1, 2, figsize=(7.5, 4), layout="constrained")
    for ax, column in zip(axes, ("js", "anp"), strict=True):
        landscapes.end_points(landscapes.plane(ax, first, column), ends)
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=4, loc="outside lower center")
    fig.savefig(results / "plane.svg")
    plt.close(fig)
    every = {p: plane_data(grid[grid.pair == p], marks[marks.pair == p]) for p in pairs}
    data, tasks = json.dumps(every).replace("<", r"\u003c"), pairs[0].replace("+", " and ")
    origin = stored_tables.ResultTable(tables, facts, "the stored run").caption
    return PLANE_PAGE.format(data=data, tasks=tasks, caption=origin, file=PLANES)


def write(source: Path) -> None:
    """Write both pages into a book's source; raises FileNotFoundError without stored results."""
    folder = source / "interactive"
    folder.mkdir()
    (folder / "methods.md").write_text(methods_page(source / "results"), "utf-8")
    (folder / "plane.md").write_text(plane_page(source / "results"), "utf-8")
