"""Results of a grid's runs in one Report, or one set of tables, per file that the runs wrote.

A parameter that the grid varies becomes a column of tables and of scores. In a Report it becomes
part of a method's name, `divmerge/task [divergence=kl]`, or of the suite's name where the experts
differ too; what a Report's own columns hold (seeds, tasks, methods) is not repeated.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd

from divmerge_book.evaluation import stored_tables
from divmerge_book.evaluation.metrics import scores
from divmerge_book.evaluation.report import Report
from divmerge_core.storage import fresh_file, write_json

SHOWN = ("suite", "tasks", "pair", "methods", "seeds")  # a Report has columns for these
REFERENCES = ("expert", "base")
KEY = ["suite", "subset", "method", "seed", "task"]


@dataclass(frozen=True)
class Finished:
    """A finished run: the folder it is kept in, its record, and its values of what varies."""

    folder: Path
    record: Mapping
    values: Mapping

    def files(self) -> Iterator[str]:
        """The JSON files that it wrote, below `results/`."""
        results = self.folder / "results"
        for path in sorted(results.rglob("*.json")):
            yield path.relative_to(results).as_posix()

    def read(self, name: str) -> dict:
        return json.loads((self.folder / "results" / name).read_text("utf-8"))


def collect(runs: Sequence[Finished], output: Path, **facts: object) -> list[Path]:
    """Write one file below `output` for every name that a run wrote a Report or tables under.

    facts: what to add to the provenance. Beside a Report stand its scores as CSV, with a column for
    every parameter that varies.
    """
    written = []
    for name in dict.fromkeys(name for run in runs for name in run.files()):
        found = [(run, run.read(name)) for run in runs if name in set(run.files())]
        target = output / name
        if all({"rows", "fits"} <= set(data) for _, data in found):
            parts = [
                (run, Report(pd.DataFrame(data["rows"]), data["fits"], data["provenance"]))
                for run, data in found
            ]
            concatenated(parts, facts).save(target)
            with fresh_file(target.with_suffix(".csv")) as new:
                tidy(parts).to_csv(new, index=False)
            written.append(target.with_suffix(".csv"))
        elif all({"tables", "provenance"} <= set(data) for _, data in found):
            write_json(target, tables_of(found, facts))
        else:
            continue  # something of the notebook's own: it stays in the run's folder
        written.append(target)
    return written


def concatenated(parts: Sequence[tuple[Finished, Report]], facts: Mapping) -> Report:
    """One Report of many: rows labelled by what varies, fits, and where every part comes from."""
    varying = [name for name in parts[0][0].values if name not in SHOWN]
    for names, column in product((varying, list(parts[0][0].values)), ("method", "suite")):
        frames, fits = [], []
        for run, report in parts:
            label = label_of({name: run.values[name] for name in names})
            rows = report.rows.copy()
            rows[column] = [named(row, column, label) for row in rows.to_dict("records")]
            frames.append(rows)
            fits += [
                {**fit, column: named(fit, column, label), "parameters": dict(run.values)}
                for fit in report.fits
            ]
        rows = pd.concat(frames, ignore_index=True)
        rows = rows[~rows.astype(str).duplicated()].reset_index(drop=True)
        if not rows.duplicated(KEY).any():
            break
    origin = provenance([(run, report.provenance) for run, report in parts], facts)
    return Report(rows, fits, origin)


def named(row: Mapping, column: str, label: str) -> str:
    """The method's or the suite's name with the label; experts and base are every run's own."""
    name = row.get(column, "")
    if not label or (column == "method" and name in REFERENCES):
        return name
    return f"{name} [{label}]"


def label_of(values: Mapping) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in values.items())


def shown(value: object) -> object:
    """A parameter's value as it stands in a cell of a table."""
    return "+".join(map(str, value)) if isinstance(value, list) else value


def tidy(parts: Sequence[tuple[Finished, Report]]) -> pd.DataFrame:
    """Every run's scores, with its parameters as columns."""
    frames = []
    for run, report in parts:
        whole = "expert" in set(report.rows.method)  # ratios need the experts
        found = report.metrics() if whole else scores(report.rows)
        frames.append(beside(found, run))
    return pd.concat(frames, ignore_index=True)


def beside(table: pd.DataFrame, run: Finished) -> pd.DataFrame:
    """A run's table behind its parameters; `(grid)` where the table has that column itself."""
    given = {
        f"{name} (grid)" if name in table.columns else name: shown(value)
        for name, value in run.values.items()
    }
    first = pd.DataFrame(given, index=table.index)
    return pd.concat([first, table], axis=1)


def tables_of(found: Sequence[tuple[Finished, dict]], facts: Mapping) -> dict:
    """Tables of many runs, one below the other under the same name."""
    frames: dict[str, list[pd.DataFrame]] = {}
    for run, data in found:
        for name, columns in data["tables"].items():
            frames.setdefault(name, []).append(
                beside(stored_tables.typed(pd.DataFrame(columns)), run)
            )
    whole = {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()}
    origin = provenance([(run, data["provenance"]) for run, data in found], facts)
    return {"tables": stored_tables.columns(whole), "provenance": origin}


def provenance(parts: Sequence[tuple[Finished, Mapping]], facts: Mapping) -> dict:
    """What all runs share, what they differ in put side by side, and each run's own origin."""
    cells = [{**run.record, "provenance": dict(origin)} for run, origin in parts]
    return {**merged([origin for _, origin in parts]), **facts, "cells": cells}


def merged(values: Sequence[object]) -> object:
    """One value for many: the shared one, lists united, records field by field, or `a or b`."""
    if all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, Mapping) for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: merged([v[name] for v in values if name in v]) for name in names}
    if all(isinstance(value, list) for value in values):
        every = {json.dumps(item): item for value in values for item in value}
        return list(every.values())
    return " or ".join(dict.fromkeys(map(str, values)))
