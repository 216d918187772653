"""Ways in which a fit or a fine-tuning needs less memory, one change each."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from divmerge_book.planning.workloads import DELTAS, Fit, Training

MOST_RANKS = 64


def smaller_fits(fit: Fit, fits: Callable[[Fit], bool]) -> Iterator[tuple[str, Fit]]:
    """Fits that need less, one change each; where a number shrinks, to the largest that fits."""
    for deltas in ("bfloat16", "int8"):
        if DELTAS[deltas] < DELTAS[fit.deltas] and not fit.deltas.startswith("streamed"):
            yield f"task vectors in {deltas}", replace(fit, deltas=deltas)
    if fit.deltas in ("float32", "bfloat16"):
        kind = "streamed" if fit.deltas == "float32" else "streamed_bfloat16"
        yield "task vectors streamed from pinned host memory", replace(fit, deltas=kind)
    if fit.gradients == "buffer" and fit.ranks == 1:
        yield "gradients consumed tensor by tensor", replace(fit, gradients="stream")
    if not fit.checkpointing:
        yield "gradient checkpointing", replace(fit, checkpointing=True)
    if fit.cached != "top":
        yield f"the experts' {fit.top} likeliest answers only", replace(fit, cached="top")
    if fit.rows > 1:
        chosen = fewer_rows(fit, fits)
        yield f"{chosen.rows} rows per task and step instead of {fit.rows}", chosen
    if fit.tasks > 2:
        fewer = [replace(fit, tasks=n) for n in range(fit.tasks - 1, 1, -1)]
        chosen = next(filter(fits, fewer), fewer[-1])
        yield f"{chosen.tasks} tasks instead of {fit.tasks}", chosen
    more = [replace(fit, ranks=n) for n in range(fit.ranks + 1, MOST_RANKS + 1)]
    chosen = next(filter(fits, more), None)
    if chosen:
        yield f"{chosen.ranks} devices (torchrun, FSDP2)", chosen


def smaller_trainings(
    training: Training, fits: Callable[[Training], bool]
) -> Iterator[tuple[str, Training]]:
    """Trainings that need less."""
    if not training.checkpointing:
        yield "gradient checkpointing", replace(training, checkpointing=True)
    if training.rows > 1:
        chosen = fewer_rows(training, fits)
        yield f"{chosen.rows} rows at a time, gradients added up over more steps", chosen


def fewer_rows(work: Fit | Training, fits: Callable[..., bool]) -> Fit | Training:
    """The same on the most rows that fit, or on one, with as many answer positions a row."""
    per_row = work.positions / work.rows
    smaller = [
        replace(work, rows=n, answers=max(1, round(n * per_row)))
        for n in range(work.rows - 1, 0, -1)
    ]
    return next(filter(fits, smaller), smaller[-1])


def devices(work: Fit | Training) -> int:
    """How many devices share it."""
    return work.ranks if isinstance(work, Fit) else 1


def what_is_lost(before: Fit | Training, after: Fit | Training) -> tuple[bool, bool]:
    """Whether tasks are dropped, and rows: what merges less, or more slowly, comes last."""
    tasks = isinstance(before, Fit) and before.tasks != after.tasks
    return tasks, before.rows != after.rows
