"""What a fit has learned from the model so far, in a file: a killed fit replays it and goes on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from divmerge_core.storage import fresh_file

Entry = tuple[float, Tensor]  # the loss, and its gradient in the coefficients [T, G]


@dataclass
class Ledger:
    """The results of all passes through the model, in their order.

    All else in a fit (its optimiser's state, what it draws) follows from them, so replaying them
    leads back to the same place, bit for bit. path: where they are kept, None for nowhere. every:
    passes between two writes. fit: what tells one fit from another.
    """

    path: Path | None = None
    fit: Mapping = field(default_factory=dict)
    every: int = 5
    entries: list[Entry] = field(default_factory=list)
    place: int = 0

    @classmethod
    def open(cls, path: Path | str | None, fit: Mapping, every: int = 5) -> "Ledger":
        """An empty ledger, or the one kept at `path`. Raises ValueError where another fit's is."""
        if path is None or not Path(path).is_file():
            return cls(None if path is None else Path(path), fit, every)
        kept = torch.load(path, weights_only=True)
        if kept["fit"] != dict(fit):
            changed = sorted(key for key in fit if kept["fit"].get(key) != fit[key])
            raise ValueError(
                f"{path} was written by a fit with other {', '.join(changed)}; delete it or give "
                "another checkpoint"
            )
        return cls(Path(path), fit, every, list(map(tuple, kept["entries"])))

    @property
    def replaying(self) -> bool:
        """Whether the next result is known already."""
        return self.place < len(self.entries)

    def next(self, compute: Callable[[], Entry]) -> Entry:
        """The next result: from the file, or computed now."""
        if not self.replaying:
            self.entries.append(compute())
            if len(self.entries) % self.every == 0:
                self.save()
        self.place += 1
        return self.entries[self.place - 1]

    def save(self) -> None:
        """Write all results, whole or not at all."""
        if self.path is not None:
            with fresh_file(self.path) as new:
                torch.save({"fit": dict(self.fit), "entries": self.entries}, new)
