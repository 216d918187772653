"""Measured tables, stored with their origin, and the choice between a stored one and this run's."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from divmerge_core.report import origin
from divmerge_core.storage import write_json

Tables = Mapping[str, pd.DataFrame]


def save(path: Path, tables: Tables, **facts: object) -> None:
    """Store tables of measurements with their origin, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"tables": columns(tables), "provenance": origin(**facts)})


def columns(tables: Tables) -> dict[str, dict[str, list]]:
    """Tables as JSON has them: by name, then by column, with null where a value is missing."""
    return {
        name: table.astype(object).where(table.notna(), None).to_dict("list")
        for name, table in tables.items()
    }


def load(path: Path) -> tuple[dict[str, pd.DataFrame], dict]:
    """What `save` stored: tables by name, and their origin."""
    data = json.loads(path.read_text("utf-8"))
    tables = {name: pd.DataFrame(lists) for name, lists in data["tables"].items()}
    return {name: plain(table) for name, table in tables.items()}, data["provenance"]


def plain(table: pd.DataFrame) -> pd.DataFrame:
    """The table with a type per column, and NumPy's numbers: NaN where one is missing."""
    table = table.convert_dtypes()
    kinds = {
        name: int if table[name].dtype == "Int64" and not table[name].hasnans else float
        for name in table.select_dtypes("number")
    }
    return table.astype(kinds)


@dataclass(frozen=True)
class Measured:
    """Tables by name with their origin; source: `this run` or `the stored run`."""

    tables: Tables
    facts: Mapping
    source: str

    def __getitem__(self, name: str) -> pd.DataFrame:
        return self.tables[name]

    @property
    def caption(self) -> str:
        """One line that says which run this is, and what it ran on."""
        return f"Drawn from {self.source}: {described(self.facts)}."


def drawn(
    path: Path,
    tables: Tables | Callable[[], Tables],
    *,
    live: bool = False,
    publish: bool = False,
    **facts: object,
) -> Measured:
    """What a chapter draws: the tables stored at `path`, or this run's.

    tables: this run's, or a function that measures them. It is called where they are drawn or
    stored, and at size `smoke`, whose purpose is to run all that a chapter shows. live: draw this
    run's in any case. publish: store this run's, with the facts and the origin. facts: what the
    tables were measured on; `described` reads suite, encoder, tasks, size, seeds and rows. Tables
    stored for another suite or encoder are left alone.
    """
    stored = None if live or publish or not path.is_file() else load(path)
    if stored and any(stored[1].get(name) != facts.get(name) for name in ("suite", "encoder")):
        stored = None
    if stored is None or facts.get("size") == "smoke":
        tables = tables() if callable(tables) else tables
    if stored is not None:
        return Measured(*stored, "the stored run")
    if not publish:
        return Measured(tables, origin(**facts), "this run")
    save(path, tables, **facts)
    if live:
        return Measured(tables, origin(**facts), "this run")
    return Measured(*load(path), "the stored run")


def described(facts: Mapping) -> str:
    """One line of provenance: what was measured, how much of it, where and when."""
    seeds = len(facts["seeds"])
    return (
        f"{facts['encoder']}, {facts['suite']}, {len(facts['tasks'])} tasks, {facts['size']} size, "
        f"{seeds} seed{'s' * (seeds > 1)} of experts, {facts['rows']} test rows a task, "
        f"{facts['device']}, {facts['machine']}, torch {facts['torch']}, measured {facts['date']}"
    )
