"""What bases and objectives are worth, in sentences made of `studies.bases`' scored table."""

from collections.abc import Iterable, Mapping

import pandas as pd

from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.figures.bases import name_of
from divmerge_book.findings import SCORES, bullets, listed, table_of, with_origin
from divmerge_book.studies import ideas
from divmerge_book.studies.predictions import SCORES as COLUMNS

OURS = "tsv:3"
AGAINST = (  # objective, basis, what it lacks
    ("js", "raw", "the objective alone (DivMerge)"),
    ("none", OURS, "the basis alone (TSV-M of the matrices)"),
    ("entropy", OURS, "the basis with entropy (AdaMerging on it)"),
    ("js", "svd:3", "bands without orthogonalisation"),
    ("js", "tsv", "one band"),
    ("js", "tsv:2", "two bands"),
)


def gain(row: Mapping, score: str, note: str = "") -> str:
    """`+4.9 points of ANP (+3.9 to +5.9)`: what JS on OURS gains over the merge of a row."""
    gap, low, high = (round(-100 * row[name], 1) + 0 for name in COLUMNS[score][3:6])
    return f"{gap:+.1f} points of {SCORES[score]} ({high:+.1f} to {low:+.1f}{note})"


def parts(table: pd.DataFrame, source: str) -> str:
    """The paired differences of JS on `tsv:3` from merges that lack one part of it.

    table: per layer, of one number of tasks, compared against `js=tsv:3`.
    """
    found, lines = table.set_index(["objective", "basis"]), []
    ours = found.loc[("js", OURS)]
    for objective, basis, lacks in AGAINST:
        if (objective, basis) not in found.index:
            continue
        row = found.loc[(objective, basis)]
        late = "; not significant after correction"
        notes = {score: late * (not row[names[-1]] < 0.05) for score, names in COLUMNS.items()}
        said = " and ".join(gain(row, score, note) for score, note in notes.items())
        lines.append(f"over {lacks}: {said}")
    return (
        f"In {source}, T = {ours.tasks}, DivMerge+ reaches {100 * ours.anp:.1f} % ANP and "
        f"{100 * ours.kept_margin:.1f} % kept margin. It gains, with 95 % intervals of the paired "
        f"difference and Holm's correction over all merges of this chapter:\n\n{bullets(lines)}"
    )


def best(table: pd.DataFrame, source: str) -> str:
    """Which basis is highest under JS, by both scores."""
    fitted, said = table[table.objective == "js"].set_index("basis"), []
    for score, words in SCORES.items():
        first, *_, last = fitted[score].sort_values(ascending=False).index
        said.append(
            f"by {words} {name_of(first)} lead ({100 * fitted[score][first]:.1f} %) and "
            f"{name_of(last)} are last ({100 * fitted[score][last]:.1f} %)"
        )
    return f"Of {len(fitted)} bases fitted by JS in {source}, {'; '.join(said)}."


def gains(table: pd.DataFrame, scores: Iterable[str] = SCORES) -> list[str]:
    """What the basis gains over raw task vectors at every T, with intervals. table: see `parts`."""
    rows, lines = table[(table.objective == "js") & (table.basis == "raw")], []
    for row in rows.sort_values("tasks").to_dict("records"):
        lines.append(f"T = {row['tasks']}: {', '.join(gain(row, score) for score in scores)}")
    return lines


def over_tasks(table: pd.DataFrame, source: str) -> str:
    """The `gains`, a bullet each."""
    return f"Gains of the basis over raw task vectors in {source}:\n\n{bullets(gains(table))}"


def summary(table: pd.DataFrame, held: pd.DataFrame, source: str) -> list[str]:
    """What coefficients should scale, by number of tasks; what the objective adds; memory.

    table: against `js=tsv:3`. held: of components in models by T, a column per store.
    """
    layer = table[table.grouping == "layer"]
    most = layer[layer.tasks == layer.tasks.max()].set_index(["objective", "basis"]).anp * 100
    parts = {"start without a fit": ("none", OURS), "fit by entropy": ("entropy", OURS)}
    parts |= {"raw task vectors fitted by JS": ("js", "raw")}
    others = [f"{words} {most[key]:.1f} %" for words, key in parts.items() if key in most.index]
    last = held.iloc[-1]
    memory = ", ".join(f"{words} {number:.2f} N" for words, number in last.items())
    return [
        f"Coefficients of cleaned directions in place of task vectors gain, in {source}, "
        f"{'; '.join(gains(layer, ['anp']))}.",
        f"At T = {layer.tasks.max()} DivMerge+ has {most['js', OURS]:.1f} % ANP; {listed(others)}.",
        f"Numbers held beside the base at T = {held.index[-1]}, with this run's experts: {memory}.",
    ]


def fits(run: ResultTable, scores: pd.DataFrame) -> str:
    """A table of `studies.ideas`' fits, and which of them is ahead of ProDistill.

    run: its predictions, with facts `read` and `unseen`. scores: `compared` against `ideas.peer`.
    """
    nats = run["answers"].groupby("method")[["read", "unseen"]].mean()
    heads, lines, ahead = ["fit"], [], {}
    for words in SCORES.values():
        heads += [f"{words}, %", "minus ProDistill's, points"]
    for row in scores.sort_values("anp", ascending=False).to_dict("records"):
        name = {ideas.MORE: f"divmerge+, {ideas.MORE}"}.get(row["method"], row["method"])
        name = name.replace("divmerge", "DivMerge").replace("prodistill", "ProDistill")
        lines.append([name])
        for score in SCORES:
            value, _, _, gap, low, high = (100 * row[column] for column in COLUMNS[score][:6])
            own = row["method"] == ideas.peer(row["method"])
            lines[-1] += [f"{value:.1f}", "" if own else f"{gap:+.1f} [{low:+.1f}, {high:+.1f}]"]
            if low > 0:
                ahead.setdefault(score, []).append(name)
        lines[-1] += [f"{value:.4f}" for value in nats.loc[row["method"]]]
    first = [f"by {SCORES[score]}, {listed(ahead.get(score, ()), 'none')}" for score in SCORES]
    head = "Fits with a 95 % interval of the gain over ProDistill with as many inputs above 0"
    said = [f"{head}: {'; '.join(first)}."]
    for words, ours in (("", "divmerge+"), (f" with {ideas.MORE}", ideas.MORE)):
        read, unseen = nats.loc[ours] / nats.loc[ideas.peer(ours)]
        said.append(
            f"DivMerge+{words} is {read:.2f} times as far from the experts as ProDistill on the "
            f"inputs that both read, and {unseen:.2f} times on others."
        )
    heads += ["JS on inputs read, nats", "JS on validation rows, nats"]
    return with_origin(run, table_of(heads, lines), " ".join(said))
