"""What is said of any experts' weights: their files' hashes, and how far they are from the base."""

import warnings
from pathlib import Path

from divmerge_core.checkpoints.save import input_files
from divmerge_core.merging.task_vectors import TaskVectors
from divmerge_core.storage import sha256

FAR = 0.5  # a task vector longer than this share of the base is no fine-tuning that we know


def warn_of_lengths(vectors: TaskVectors, base: str) -> None:
    """Warn of task vectors that are nothing, or longer than fine-tuning makes them."""
    shares = (vectors.norms() / vectors.base.double().norm()).tolist()
    for task, share in zip(vectors.tasks, shares, strict=True):
        text = f"task {task!r}: the expert is the base itself"
        if share > FAR:
            text = (
                f"task {task!r}: the task vector is {share:.2f} times as long as the base "
                f"{base!r}; is this the base that the expert was fine-tuned from?"
            )
        if share == 0 or share > FAR:
            warnings.warn(text, stacklevel=3)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights that are read, and of the folder's settings and vocabulary."""
    words = (path for path in folder.iterdir() if path.suffix in {".json", ".txt", ".model"})
    return {path.name: sha256(path) for path in sorted({*input_files(folder), *words})}
