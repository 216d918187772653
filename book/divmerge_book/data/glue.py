"""GLUE: rows from the hub's nyu-mll/glue, or from a folder in the same layout."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import datasets
import huggingface_hub
from huggingface_hub.constants import HF_HUB_CACHE

from divmerge_book.data.splits import Splits, split_rows

HUB, REVISION = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"


class quiet:
    """No progress bars from `datasets` while a few thousand rows are read or written."""

    def __enter__(self):
        datasets.disable_progress_bars()

    def __exit__(self, *error):
        datasets.enable_progress_bars()


def glue_folder() -> Path | None:
    """The folder named by DIVMERGE_GLUE_DIR: one sub-folder of parquet files per task."""
    chosen = os.environ.get("DIVMERGE_GLUE_DIR")
    return Path(chosen).expanduser() if chosen else None


def glue_rows(name: str) -> Mapping[str, datasets.Dataset]:
    folder = glue_folder()
    try:
        with quiet():
            if folder is not None:
                return datasets.load_dataset(str(folder / name))
            return datasets.load_dataset(HUB, name, revision=REVISION)
    except Exception as error:  # the libraries below raise many kinds, none of them a user's
        where = folder / name if folder is not None else "the hub's nyu-mll/glue"
        raise ValueError(
            f"cannot read GLUE task {name!r} from {where}: {error}. Set DIVMERGE_GLUE_DIR to a "
            f"folder with {name}/train-*.parquet and {name}/validation-*.parquet in the hub's "
            "layout, or run where huggingface.co can be reached"
        ) from error


def glue_splits(name: str, answers: Sequence[str], columns: Sequence[str]) -> Splits:
    """GLUE's labelled rows in our splits.

    Test comes from its validation split, of MNLI's two the matched one (from a labelled test split
    where there is no validation), the rest from train; all from the one split where there is no
    other.
    """
    found = {
        split: [
            (row[columns[0]], row[columns[1]] if len(columns) > 1 else None, answers[row["label"]])
            for row in rows
            if row["label"] >= 0
        ]
        for split, rows in glue_rows(name).items()
    }
    held = ("validation", "validation_matched", "test")  # MNLI's validation comes in two halves
    held_out = next((found[split] for split in held if found.get(split)), [])
    if found.get("train"):
        return split_rows(found["train"], held_out)
    return split_rows(held_out)


def glue_digest(name: str) -> str:
    """A digest of the folder's files, or the hub's name for them with its revision."""
    folder = glue_folder()
    return f"hub:{HUB}@{REVISION}" if folder is None else files_digest(folder / name)


@cache
def hub_revision(name: str) -> str | None:
    """The commit of a hub data set: its latest, or where the hub is out of reach the one last read.

    None where neither is known: then nothing can be read either.
    """
    try:
        return huggingface_hub.dataset_info(name).sha
    except Exception:  # the libraries below raise many kinds, none of them a user's
        folder = f"datasets--{name.replace('/', '--')}"
        last = Path(HF_HUB_CACHE, folder, "refs", "main")
        return last.read_text("utf-8").strip() if last.is_file() else None


@cache
def files_digest(folder: Path) -> str:
    """A digest of a folder's parquet files, read once in a process."""
    files = sorted(folder.glob("*.parquet"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
