"""Findings on the settings of a fit, its inputs and its optimisers."""

from collections.abc import Sequence

import pandas as pd

from divmerge_book.figures import protocol as draw
from divmerge_book.findings import listed
from divmerge_book.studies.input_shifts import INPUT_SHIFTS
from divmerge_book.studies.predictions import SCORES, WORDS, of_score, significant

HEADINGS = {
    **{"grouping": "coefficients per", "coefficients": "coefficients", "reading": "read"},
    **{"inputs": "inputs", "anp": "ANP, %", "kept_margin": "kept margin, %"},
    **{"below": "below majority", "counted": "of tasks"},
}


def in_words(table: pd.DataFrame) -> pd.DataFrame:
    """A table of settings with readable columns, scores and paired differences in %."""
    found = pd.DataFrame(
        {
            words: 100 * table[name] if "%" in words else table[name]
            for name, words in HEADINGS.items()
            if name in table and (name != "coefficients" or "reading" not in table)
        }
    )
    for score in (score for score in WORDS if score in table):
        own = of_score(table, score)
        found[f"{WORDS[score]}, difference in points"] = [
            "" if pd.isna(row.difference) else gap(row) for row in own.itertuples()
        ]
    return found


def gap(row, sign: int = 1) -> str:
    """`+1.0 [+0.5, +1.5]`: a paired difference, or minus it, with its interval, in points."""
    low, high = sorted((100 * sign * row.from_low, 100 * sign * row.from_high))
    return f"{100 * sign * row.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def settings(changed: pd.DataFrame, kinds: Sequence[str], source: str) -> str:
    """How many changed settings differ significantly, and the extreme ones. kinds: scores."""
    total, lines = (changed.setting != "default").sum(), []
    for score in kinds:
        found = [
            f"{draw.SETTINGS[r.setting]} {r.value}, per {r.grouping}: {gap(r)}"
            for r in significant(of_score(changed, score)).sort_values("difference").itertuples()
        ]
        ends = "; ".join(dict.fromkeys([*found[:1], *found[-1:]]))
        ends = ends and f"; the lowest and the highest, in points: {ends}"
        lines.append(
            f"In {source} {len(found)} of {total} changes differ significantly from the default in "
            f"{WORDS[score]} (Holm's correction){ends}."
        )
    return " ".join(lines)


def start(table: pd.DataFrame, kinds: Sequence[str], source: str) -> str:
    """What a start at 0.5 changes. table: the ablation of the larger merge."""
    rows = {score: of_score(table.query("setting == 'init'"), score) for score in kinds}
    said = [
        f"{gap(row)} points of {WORDS[score]} per {row.grouping}"
        for score, some in rows.items()
        for row in some.itertuples()
    ]
    return (
        f"A start at 0.5 instead of 1/T changes the merge of {table.tasks.iloc[0]} tasks, in "
        f"{source}, by {listed(said)}."
    )


def readings(kinds_of: pd.DataFrame, read: pd.DataFrame, kinds: Sequence[str], source: str) -> str:
    """The best level of coefficients, and what the smaller data set size changes."""
    rows, total = kinds_of.set_index("grouping"), read.query("reading == 'in total'")
    lines = []
    for score in kinds:
        own = of_score(rows, score)
        best, first, shown = own.score.idxmax(), own.index[0], (100 * own.score).round(1)
        names = listed([f"per {name}" for name in shown.index[shown == shown[best]]])
        beside = "" if best == first else f", {gap(own.loc[best])} points from one per {first}"
        said = [
            f"{gap(r)} (coefficients per {r.grouping})" for r in of_score(total, score).itertuples()
        ]
        lines.append(
            f"In {source} coefficients {names} have the highest {WORDS[score]}, "
            f"{shown[best]:.1f} %{beside}. The data set size in total, not for each "
            f"task, changes the {WORDS[score]} by {listed(said)} points."
        )
    return " ".join(lines)


def needed(table: pd.DataFrame, kinds: Sequence[str], source: str) -> str:
    """What the most inputs gain over none, and how many gain nine tenths of it."""
    most, said = table.inputs.max(), []
    for score in kinds:
        for grouping, rows in of_score(table, score).groupby("grouping"):
            rows = rows.sort_values("inputs").set_index("inputs")
            gains, none = 100 * (rows.score - rows.score[0]), rows.loc[0]
            enough = gains.index[gains >= 0.9 * gains[most]].min()
            text = f"{gap(none, -1)} points of {WORDS[score]} with coefficients per {grouping}"
            sure = none.from_high < 0  # the reference is the most inputs
            said.append(f"{text} ({enough} give nine tenths of it)" if sure else text)
    return f"In {source}, a fit from the average on {most} inputs a task brings {listed(said)}."


def shifted(wrong: pd.DataFrame, kinds: Sequence[str], source: str) -> str:
    """Which fully shifted inputs cost most, beside no fit at all."""
    lines = []
    for score in kinds:
        for grouping, own in of_score(wrong.query("share == 1"), score).groupby("grouping"):
            own = own.set_index("kind")
            worst = own.difference.drop("none").idxmin()
            lines.append(
                f"*{INPUT_SHIFTS.facts[worst]['label']}* per {grouping} ({gap(own.loc[worst])} "
                f"points of {WORDS[score]}; no fit at all {gap(own.loc['none'])})"
            )
    text = f"In {source}, with all inputs replaced, the lowest score, as a difference from right"
    return f"{text} inputs, is that of {listed(lines)}."


def bound(sides: pd.DataFrame, source: str) -> str:
    """How close the objective's change comes to the bound of Proposition 3."""
    ratio = sides.apart / sides.bound
    worst = sides.loc[ratio.idxmax()]
    return (
        f"In {source} the largest ratio of the objective's change to the bound is "
        f"{ratio.max():.2f} (*{INPUT_SHIFTS.facts[worst.kind]['label']}*, {worst.model}), the "
        f"median {ratio.median():.3f}."
    )


def optimisers(ends: pd.DataFrame, source: str) -> str:
    """How often every optimiser reaches Adam's loss, and in how many passes."""
    lines = []
    for name in ends.optimizer.unique()[1:]:
        rows = ends[ends.optimizer == name]
        met, label = rows[rows.passes.notna()], draw.OPTIMISER_LABELS[name]
        line = f"{label} reaches Adam's loss in {len(met)} of {len(rows)} cases"
        lines.append(f"{line}, after at most {met.passes.max():.0f} passes" if len(met) else line)
    return f"In {source} {'; '.join(lines)}."


def unseen(fine: pd.DataFrame) -> str:
    """Losses on a fit's inputs and on others, and scores from Adam's. fine: one merge's fits."""
    lines = []
    for row in fine.itertuples():
        line = f"{draw.OPTIMISER_LABELS[row.optimizer]}: {row.reached:.3f} on its inputs, "
        line += f"{row.unseen:.3f} on others"
        for score in (score for score in WORDS if score in fine):
            middle, low, high = (100 * getattr(row, name) for name in SCORES[score][3:6])
            line += f", {WORDS[score]} {middle:+.1f} [{low:+.1f}, {high:+.1f}] points from Adam's"
        lines.append(line)
    first = fine.iloc[0]
    return f"Loss with {first.tasks} tasks, per {first.grouping}: {'; '.join(lines)}."
