"""Sentences about outcomes, made of the tables they speak of: a function per claim of a chapter.

Every function takes measured tables and returns Markdown. `source` names the run: `the stored run`
or `this run`. Which words a sentence has depends on the numbers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import pandas as pd

from divmerge_book.evaluation.stored_tables import ResultTable
from divmerge_book.figures import title

SCORES = {"anp": "ANP", "kept_margin": "kept margin"}


def listed(words: Iterable[str], none: str = "none") -> str:
    """`a`, `a and b`, `a, b and c`; `none` for no word."""
    *most, last = list(words) or [none]
    return f"{', '.join(most)} and {last}" if most else last


def count(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number} {noun}" + "s" * (number != 1)


def span(values: Iterable[float], digits: int = 1, sign: bool = False) -> str:
    """`low to high`, or the one number where both are printed alike."""
    found = list(values)
    ends = [f"{value:{'+' if sign else ''}.{digits}f}" for value in (min(found), max(found))]
    return " to ".join(dict.fromkeys(ends))


def each(
    values: pd.Series, form: str = "{:.1f}", name: Callable | Mapping = title, end: str = "; "
) -> str:
    """`Average 2.0; TIES 1.0`: the names in the index, each with its value."""
    name = name.__getitem__ if isinstance(name, Mapping) else name
    return end.join(f"{name(key)} {form.format(value)}" for key, value in values.items())


def split(words: Sequence[str] | pd.Index, holds: Iterable[bool], none: str = "none") -> list[str]:
    """The words of which something holds, listed, and the others."""
    pairs = list(zip(words, holds, strict=True))
    sides = ([word for word, one in pairs if bool(one) == side] for side in (True, False))
    return [listed(side, none) for side in sides]


def scores(table: pd.DataFrame) -> dict[str, str]:
    """Those of SCORES that a table has: column -> words."""
    return {column: words for column, words in SCORES.items() if column in table}


def missing(table: pd.DataFrame, source: str) -> str:
    """What to say where a table has ANP and no kept margin; else nothing."""
    if "kept_margin" in table:
        return ""
    return f" {source[0].upper()}{source[1:]} has no accuracies by task, so no kept margin."


def with_origin(run: ResultTable, *paragraphs: str) -> str:
    """Paragraphs, and under them where the numbers of the run come from."""
    return "\n\n".join([*paragraphs, f"*{run.caption}*"])


def table_of(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list; an entry may have paragraphs and lists of its own."""
    return "\n".join(f"- {line}".replace("\n", "\n  ") for line in lines)
