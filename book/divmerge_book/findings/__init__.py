"""Sentences about outcomes, made of the tables they speak of: a function per claim of a chapter.

Every function takes measured tables and returns Markdown. `source` names the run: `the stored run`
or `this run`. Where the numbers turn, the sentence turns with them.
"""

from collections.abc import Iterable, Sequence

import pandas as pd


def listed(words: Sequence[str], none: str = "none") -> str:
    """`a`, `a and b`, `a, b and c`; `none` for no word."""
    if len(words) < 2:
        return words[0] if words else none
    return f"{', '.join(words[:-1])} and {words[-1]}"


def span(values: Iterable[float], digits: int = 1, sign: bool = False) -> str:
    """`low to high`, or the one number where both are printed alike."""
    found = list(values)
    ends = [f"{value:{'+' if sign else ''}.{digits}f}" for value in (min(found), max(found))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


SCORES = {"anp": "ANP", "kept_margin": "kept margin"}


def scores(table: pd.DataFrame) -> dict[str, str]:
    """Those of SCORES that a table has: column -> words."""
    return {column: words for column, words in SCORES.items() if column in table}


def missing(table: pd.DataFrame, source: str) -> str:
    """What to say where a table has ANP and no kept margin; else nothing."""
    if "kept_margin" in table:
        return ""
    return f" {source[0].upper()}{source[1:]} holds no accuracies by task, so no kept margin."


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
