"""Results of a grid's runs in one Report, or one set of tables, per file that the runs wrote.

A parameter that the grid varies becomes a column of tables and of scores. In a Report it becomes
part of a method's name, `divmerge/task [divergence=kl]`, or of the suite's name where the experts
differ too; what a Report's own columns hold (seeds, tasks, methods) is not repeated.
"""

import json
from collections.abc import Mapping, Sequence
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

    def files(self) -> dict[str, dict]:
        """The JSON files that it wrote, by their names below `results/`."""
        results = self.folder / "results"
        paths = {p.relative_to(results).as_posix(): p for p in sorted(results.rglob("*.json"))}
        return {name: json.loads(path.read_text("utf-8")) for name, path in paths.items()}


def collect(runs: Sequence[Finished], output: Path, **facts: object) -> list[Path]:
    """Write one file below `output` for every name that a run wrote a Report or tables under.

    facts: what to add to the provenance. Beside a Report stand its scores as CSV, with a column for
    every parameter that varies. What is neither stays in the run's folder.
    """
    written, every = [], [(run, run.files()) for run in runs]
    for name in dict.fromkeys(name for _, files in every for name in files):
        found = [(run, files[name]) for run, files in every if name in files]
        target = output / name
        if all({"rows", "fits"} <= set(data) for _, data in found):
            parts = [
                (run, Report(pd.DataFrame(data["rows"]), data["fits"], data["provenance"]))
                for run, data in found
            ]
            concatenated(parts, facts).save(target)
            with fresh_file(target.with_suffix(".csv")) as new:
                tidy(parts).to_csv(new, index=False)
            written += [target.with_suffix(".csv"), target]
        elif all({"tables", "provenance"} <= set(data) for _, data in found):
            write_json(target, tables_of(found, facts))
            written.append(target)
    return written


def concatenated(parts: Sequence[tuple[Finished, Report]], facts: Mapping) -> Report:
    """One Report of many: rows labelled by what varies, fits, and where every part comes from."""
    every = list(parts[0][0].values)
    varying = [name for name in every if name not in SHOWN]
    for names, column in product((varying, every), ("method", "suite")):
        frames, fits = [], []
        for run, report in parts:
            label = ", ".join(f"{name}={shown(run.values[name])}" for name in names)

            def named(name: str, label: str = label, column: str = column) -> str:
                own = column == "method" and name in REFERENCES  # these are every run's own
                return f"{name} [{label}]" if label and not own else name

            frames.append(report.rows.assign(**{column: report.rows[column].map(named)}))
            for fit in report.fits:
                name = named(fit.get(column, ""))
                fits.append({**fit, column: name, "parameters": dict(run.values)})
        rows = pd.concat(frames, ignore_index=True)
        rows = rows[~rows.astype(str).duplicated()].reset_index(drop=True)
        if not rows.duplicated(KEY).any():
            break
    origin = provenance([(run, report.provenance) for run, report in parts], facts)
    return Report(rows, fits, origin)


def shown(value: object) -> object:
    """A parameter's value as it stands in a cell of a table."""
    return "+".join(map(str, value)) if isinstance(value, list) else value


def tidy(parts: Sequence[tuple[Finished, Report]]) -> pd.DataFrame:
    """Every run's scores, with its parameters as columns."""
    frames = []
    for run, report in parts:
        whole = "expert" in set(report.rows.method)  # ratios need the experts
        frames.append(beside(report.metrics() if whole else scores(report.rows), run))
    return pd.concat(frames, ignore_index=True)


def beside(table: pd.DataFrame, run: Finished) -> pd.DataFrame:
    """A run's table behind its parameters; `(grid)` where the table has that column itself."""
    given = {f"{n} (grid)" if n in table else n: shown(v) for n, v in run.values.items()}
    return pd.concat([pd.DataFrame(given, index=table.index), table], axis=1)


def tables_of(found: Sequence[tuple[Finished, dict]], facts: Mapping) -> dict:
    """Tables of many runs, one below the other under the same name."""
    frames: dict[str, list[pd.DataFrame]] = {}
    for run, data in found:
        for name, columns in data["tables"].items():
            table = stored_tables.typed(pd.DataFrame(columns))
            frames.setdefault(name, []).append(beside(table, run))
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
