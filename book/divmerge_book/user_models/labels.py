"""Names of a classifier's outputs: what a configuration says, a description and the rows."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from torch import nn

from divmerge_book.user_models.adapters import plain_name, shapes_in, weights_of
from divmerge_book.user_models.description import TaskFiles

LIFT = 0.1  # accuracy that other numbers of labels must win to be worth a remark


def unnamed(names: Sequence[str]) -> bool:
    """Whether these are numbers only: `LABEL_0`, `LABEL_1`, ..., or `0`, `1`, ..."""
    return all(name.lower() in (f"label_{n}", str(n)) for n, name in enumerate(names))


def names_in(named: Mapping, where: str, numbers: Mapping | None = None) -> tuple[str, ...]:
    """The outputs' names in id2label. Raises ValueError unless they are numbered 0, 1, ...

    numbers: label2id, which may have other names, but for the same ones no other numbers.
    """
    if sorted(named) != list(range(len(named))):
        raise ValueError(
            f"{where} numbers the outputs {sorted(named)}; they are 0 to {len(named) - 1}, so "
            "correct it by hand"
        )
    own = tuple(str(named[number]).strip() for number in range(len(named)))
    if {*own} == {*(numbers or ())} and any(numbers[name] != n for n, name in enumerate(own)):
        raise ValueError(
            f"{where} is {named} and label2id {numbers}; correct the one that is wrong by hand"
        )
    return own


def resolve_labels(task: TaskFiles, own: Sequence[str], where: str) -> tuple[str, ...]:
    """The labels of a task: its description's, or the expert's own, or else 0, 1, ...

    where: what gives the expert's own, for errors. Raises ValueError for two outputs of one name or
    without one, and where description and expert disagree.
    """
    own = tuple(own)
    numbers, useless = unnamed(own), "" in own or len(set(own)) < len(own)
    if task.labels is None:
        if useless:
            raise ValueError(
                f"task {task.name!r}: the expert's outputs are named {list(own)} ({where}), and "
                "labels are distinct and not empty; give labels in the description, in the order "
                "of the outputs"
            )
        return tuple(map(str, range(len(own)))) if numbers else own
    if len(task.labels) != len(own) or not (numbers or useless or own == task.labels):
        order = " in another order" if sorted(own) == sorted(task.labels) else ""
        raise ValueError(
            f"task {task.name!r}: labels {list(task.labels)}, but the expert's head has "
            f"{len(own)} outputs{order}: {list(own)} ({where}); give the labels in the order of "
            "the outputs"
        )
    return task.labels


def spellings(value: object) -> list[str]:
    """How a label in a file may be meant: as it is written, and 1.0 or True as 1."""
    words = [] if value is None else [str(value).strip()]
    if isinstance(value, bool | np.bool_):
        words.append(str(int(value)))
    return words + [word[:-2] for word in words if re.fullmatch(r"\d+\.0", word)]


def numbers_of(
    values: pd.Series, labels: Sequence[str], file: Path, names: Sequence[str] | None
) -> tuple[list[int], list[str]]:
    """The number of the output that every label means, -1 for none of them; and remarks.

    A label is a name of an output, or where names are words its number. names: of the numbers in
    the file, where it has them.
    """
    known, words = {label: number for number, label in enumerate(labels)}, not unnamed(labels)
    if names is not None and words:
        values = values.replace(dict(enumerate(names)))
    digits = words and not any(label.isdecimal() for label in labels)
    numbers = {str(number): number for number in range(len(labels))} if digits else {}
    meant = [spellings(value) for value in values]
    by_name = [next((known[w] for w in every if w in known), -1) for every in meant]
    by_number = [next((numbers[w] for w in every if w in numbers), -1) for every in meant]
    found = [one if one >= 0 else other for one, other in zip(by_name, by_number, strict=True)]
    counted = found != by_name or (names is not None and not words)
    if not counted or -1 in found:
        return found, []
    shown = names if names is not None and not words else labels
    order = ", ".join(f"{number} = {label}" for number, label in enumerate(shown))
    return found, [
        f"{file}: labels are numbers and are read as numbers of the expert's outputs ({order}); "
        "words would say it for certain"
    ]


def order_note(
    task: str, predicted: Sequence[int], gold: Sequence[int], labels: Sequence[str]
) -> str | None:
    """A remark where an expert would be right far more often if labels had another order."""
    size = len(labels)
    counts = np.zeros((size, size))
    np.add.at(counts, (np.asarray(gold), np.asarray(predicted)), 1)
    mine, outputs = linear_sum_assignment(counts, maximize=True)
    total, best = len(gold), counts[mine, outputs].sum() / len(gold)
    floor = max(np.trace(counts), counts.sum(1).max()) / total  # as it is, or a constant answer
    if best - floor <= max(LIFT, 2 / total**0.5):
        return None
    order = ", ".join(labels[row] for row in np.argsort(outputs))
    return (
        f"task {task!r}: the expert is right on {np.trace(counts) / total:.2f} of the rows and "
        f"would be on {best:.2f} if its outputs were {order}; are the labels, or the numbers in "
        "the rows, in another order than its outputs?"
    )


def num_labels(folder: Path, model: nn.Module, marker: int) -> int:
    """How many labels an adapter's own head has: where `model` was built with `marker` labels."""
    path = weights_of(folder)
    found = {plain_name(key): shape for key, shape in shapes_in(path).items()}
    for name, tensor in model.named_parameters():
        if tensor.shape[0] == marker and name in found:
            return found[name][0]
    raise ValueError(
        f"{path} holds no classification head; train the adapter with task_type "
        "SEQ_CLS, or name the head in modules_to_save"
    )
