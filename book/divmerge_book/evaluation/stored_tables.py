"""Result tables stored with their provenance; a chapter draws the stored one or measures."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from divmerge_book.evaluation.provenance import origin
from divmerge_book.evaluation.report import Report, caption
from divmerge_book.evaluation.sizes import departures
from divmerge_core.storage import write_json

Tables = Mapping[str, pd.DataFrame]
SIZES = ("smoke", "default", "full")  # in this order
PLACE = {  # facts that say where a run was made, and not of what
    *("date", "machine", "python", "torch", "transformers", "datasets"),
    *("threads", "gigaflops", "absent", "peers"),
}
WORDS = {  # facts whose names say little, as captions call them
    **{"others": "unmerged tasks", "rates": "step sizes", "pool": "inputs of a fit"},
    **{"adam": "steps of Adam", "merge_rows": "inputs", "layer_rows": "rows for layers"},
}


def save(path: Path, tables: Tables, **facts: object) -> None:
    """Store tables of measurements with their provenance, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"tables": columns(tables), "provenance": origin(**facts)})


def columns(tables: Tables) -> dict[str, dict[str, list]]:
    """Tables as JSON: by name, then by column, with null for missing values."""
    return {
        name: table.astype(object).where(table.notna(), None).to_dict("list")
        for name, table in tables.items()
    }


def load(path: Path) -> tuple[dict[str, pd.DataFrame], dict]:
    """Stored tables by name, and their provenance."""
    data = json.loads(path.read_text("utf-8"))
    tables = {name: pd.DataFrame(lists) for name, lists in data["tables"].items()}
    return {name: typed(table) for name, table in tables.items()}, data["provenance"]


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with one type per column, and NaN for missing numbers."""
    table = table.convert_dtypes()
    kinds = {
        name: int if table[name].dtype == "Int64" and not table[name].hasnans else float
        for name in table.select_dtypes("number")
    }
    return table.astype(kinds)


@dataclass(frozen=True)
class ResultTable:
    """Tables by name with their provenance; source: `this run` or `the stored run`.

    note: the facts in which the two runs differ.
    """

    tables: Tables
    facts: Mapping
    source: str
    note: str = ""

    def __getitem__(self, name: str) -> pd.DataFrame:
        return self.tables[name]

    @property
    def caption(self) -> str:
        """One line: which run this is, its provenance, and what differs."""
        return self.said(described(self.facts))

    def said(self, description: str) -> str:
        """The caption, with a description of one's own."""
        return f"Drawn from {self.source}: {description}{self.note}."


def stored_or_measure(
    path: Path,
    tables: Tables | Callable[[], Tables],
    *,
    asked: Collection[str] | None = None,
    live: bool = False,
    publish: bool = False,
    **facts: object,
) -> ResultTable:
    """What a chapter draws: the tables stored at `path`, or this run's.

    The stored tables are drawn where their size is at least this run's and every other fact in
    `asked` (names of the facts that the reader set; None: all) is equal: see `agreement`. tables:
    this run's, or a function that measures them, called where they are drawn or stored, and at size
    `smoke`, which runs all code of a chapter. live: draw this run's in any case. publish: store
    this run's, with the facts. facts: what is measured on what; `described` reads suite, encoder,
    tasks, size, seeds and rows.
    """
    made = origin(**facts)
    stored = load(path) if path.is_file() and not publish else None
    agrees, note = agreement(stored and stored[1], {name: made[name] for name in facts}, asked)
    place = named(path)
    keep = agrees and not live
    if not keep or facts.get("size") == "smoke":
        tables = tables() if callable(tables) else tables
    if keep:
        return ResultTable(*stored, "the stored run", place + note)
    if publish:
        save(path, tables, **facts)
        if not live:
            return ResultTable(*load(path), "the stored run", place)
    return ResultTable(tables, made, "this run", "" if agrees else note)


def stored_or_report(
    path: Path,
    report: Report,
    *,
    asked: Collection[str] | None = None,
    publish: bool = False,
    **facts: object,
) -> tuple[Report, str]:
    """The Report stored at `path` or this run's, by the rule of `stored_or_measure`; its caption.

    facts: of this run, beside its provenance and what its rows say: tasks of the largest merge,
    `counts` of tasks of the smaller ones, methods. `publish` stores them in the provenance.
    """
    report = Report(report.rows, report.fits, {**report.provenance, **facts})
    if publish:
        report.save(path)
    stored = Report.load(path) if path.is_file() else None
    kept, made = (one and {**merged(one), **one.provenance} for one in (stored, report))
    agrees, note = agreement(kept, made, asked)
    drawn, note = (stored, named(path) + note) if agrees else (report, note)
    return drawn, f"Drawn from {'the stored' if agrees else 'this'} run: {caption(drawn)}{note}."


def named(path: Path) -> str:
    """What a caption says of the file: its folder and name."""
    return f", in `{'/'.join(path.parts[-2:])}`"


def merged(report: Report) -> dict:
    """What a Report's rows say: tasks of the largest merge, counts of the others, methods."""
    subsets = sorted((name.split("+") for name in report.rows.subset.unique()), key=len)
    specs = [spec.partition(":")[0] for spec in report.rows.method.unique()]
    methods = [spec for spec in dict.fromkeys(specs) if spec not in ("expert", "base")]
    return {"tasks": subsets[-1], "counts": [len(s) for s in subsets[:-1]], "methods": methods}


def agreement(
    stored: Mapping | None, made: Mapping, asked: Collection[str] | None = None
) -> tuple[bool, str]:
    """Whether a stored run has this one's facts, and how a caption says in what they differ.

    The facts asked for (None: all made) count. One that either side lacks differs. A stored size
    may be larger than the one asked for.
    """
    if stored is None:
        return False, ""
    made = json.loads(json.dumps(dict(made)))  # as JSON gives it back
    names = sorted((set(made) - PLACE if asked is None else set(asked)) - {"size"})
    both = made.keys() & stored.keys()
    wrong = [name for name in names if name not in both or made[name] != stored[name]]
    rank = {size: number for number, size in enumerate(SIZES)}
    if rank.get(stored.get("size"), -1) < rank.get(made.get("size"), -1):
        wrong.insert(0, "size")
    if wrong:
        return False, f"; the stored run has other {', '.join(WORDS.get(n, n) for n in wrong)}"
    rest = [name for name in both - PLACE - {"recipe"} if made[name] != stored[name]]
    rest.sort(key=lambda n: (n != "size", n))
    words = [f"{WORDS.get(n, n).replace('_', ' ')} {in_words(made[n])}" for n in rest]
    return True, f"; the parameters here give {', '.join(words)}" if words else ""


def in_words(value: object) -> str:
    """A fact's value in a few words."""
    if isinstance(value, dict):
        return " ".join(f"{name} {one}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none" if len(value) <= 4 else f"({len(value)} values)"
    return str(value)


def described(facts: Mapping) -> str:
    """One line of provenance: what was measured, how much of it, where and when."""
    seeds = len(facts["seeds"])
    rows = f"{facts['rows']} test rows a task, " if facts["rows"] else ""  # 0: weights alone
    return (
        f"{facts['encoder']}, {facts['suite']}, {len(facts['tasks'])} tasks, {facts['size']} size, "
        f"{seeds} seed{'s' * (seeds > 1)} of experts, {rows}{facts['device']}, {facts['machine']}, "
        f"torch {facts['torch']}, measured {facts['date']}{departures(facts)}"
    )
