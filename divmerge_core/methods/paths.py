"""Paths: a choice of base or expert for every group of parameters, and how such choices evolve."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.problem import Batch, MergeProblem

AMOUNTS = (0.25, 0.5, 0.75, 1.0)  # of an expert's delta that a gene may put into its group
RATES = tuple(n / 50 for n in range(5, 16))  # of mutation: 0.1, 0.12, ..., 0.3
RATE = RATES[5]  # 0.2

Gene = tuple[int, float]  # an expert's number, and how much of its delta
BASE: Gene = (0, 0.0)


@dataclass(frozen=True)
class Path:
    """One gene per group of parameters, and how often a gene changes in its children."""

    genes: tuple[Gene, ...]
    rate: float = RATE


@dataclass(frozen=True)
class Paths:
    """One model per task, in the order of the problem's tasks: it needs to know an input's task.

    flats: of every task, the parameters that its path says, over the groups of `segments`.
    """

    problem: MergeProblem
    flats: Sequence[Float[Tensor, " N"]]
    paths: Sequence[Path]
    segments: Segments

    @property
    def nbytes(self) -> int:
        """Bytes to be stored: a group's parameters once for every gene that some task has there."""
        genes = zip(*(path.genes for path in self.paths), strict=True)
        kinds = [len(set(group)) for group in genes]  # [G]
        numbers = sum((stop - start) * kinds[group] for start, stop, group in self.segments.rows)
        return numbers * self.flats[0].element_size()

    def logits(self, task: int, batch: Batch) -> Float[Tensor, "A V"]:
        return self.problem.logits(self.flats[task], task, batch)


@dataclass(frozen=True)
class Pool:
    """What paths are made of: every expert's delta in every group of a grouping."""

    problem: MergeProblem
    segments: Segments
    choices: tuple[Gene, ...]

    @classmethod
    def of(cls, problem: MergeProblem, grouping: str) -> "Pool":
        """The base and every expert of a problem, at every one of AMOUNTS."""
        vectors = problem.vectors
        segments = Segments.of(vectors.layout.bounds, groups_of(vectors.layout, grouping)[1])
        experts = [(t, amount) for t in range(len(vectors.tasks)) for amount in AMOUNTS]
        return cls(problem, segments, (BASE, *experts))

    def model(self, path: Path) -> Float[Tensor, " N"]:
        """The parameters that a path's genes say."""
        vectors = self.problem.vectors
        coeffs = vectors.base.new_zeros(len(vectors.tasks), len(path.genes))
        for group, (expert, amount) in enumerate(path.genes):
            coeffs[expert, group] = amount
        return grouped_merge(vectors.base, vectors.deltas, coeffs, self.segments)

    def accounted(self, path: Path, others: Sequence[Path]) -> float:
        """Share of N that a path takes, each group divided by how many tasks use its very gene."""
        users = [1 + sum(o.genes[g] == gene for o in others) for g, gene in enumerate(path.genes)]
        rows = self.segments.rows
        return sum((stop - start) / users[g] for start, stop, g in rows) / self.segments.size


def random_index(count: int, generator: torch.Generator) -> int:
    """A number from 0 to count - 1."""
    return int(torch.randint(count, (1,), generator=generator))


def happens(probability: float, generator: torch.Generator) -> bool:
    """True with this probability."""
    return torch.rand(1, generator=generator).item() < probability


def mutant(parent: Path, choices: Sequence[Gene], generator: torch.Generator) -> Path:
    """A child that differs in one gene or more; its rate moves to a neighbour now and then."""
    genes, rate = list(parent.genes), parent.rate
    if happens(rate, generator):
        place = RATES.index(rate) + (1 if happens(0.5, generator) else -1)
        rate = RATES[min(max(place, 0), len(RATES) - 1)]
    changed = [g for g in range(len(genes)) if happens(parent.rate, generator)]
    for group in changed or [random_index(len(genes), generator)]:
        others = [gene for gene in choices if gene != genes[group]]
        genes[group] = others[random_index(len(others), generator)]
    return Path(tuple(genes), rate)


@dataclass
class Population:
    """A task's own paths with their scores, other tasks' best paths, and every path's children."""

    own: list[tuple[float, Path]]
    seeds: Sequence[Path]
    children: dict[Path, int] = field(default_factory=dict)

    def parent(self, generator: torch.Generator) -> Path:
        """Best first, each path is taken with probability 1/2 to its number of children so far.

        Own paths come first, then the seeds in random order; if none is taken, any is drawn.
        """
        order = torch.randperm(len(self.seeds), generator=generator).tolist()
        ranked = [path for _, path in sorted(self.own, key=lambda pair: -pair[0])]
        ranked += [self.seeds[n] for n in order]
        for path in ranked:
            if happens(0.5 ** self.children.get(path, 0), generator):
                return path
        return ranked[random_index(len(ranked), generator)]

    def breed(
        self, fitness: Callable[[Path], float], choices: Sequence[Gene], generator: torch.Generator
    ) -> None:
        """One child, kept unless it scores below its parent; a seed has no score on this task."""
        parent = self.parent(generator)
        self.children[parent] = self.children.get(parent, 0) + 1
        child = mutant(parent, choices, generator)
        value = fitness(child)
        if all(value >= before for before, path in self.own if path == parent):
            self.own.append((value, child))

    def highest(self) -> float:
        """The best score so far."""
        return max(value for value, _ in self.own)

    def best(self) -> Path:
        """The path of the highest score, the first found where several have it."""
        return max(self.own, key=lambda pair: pair[0])[1]
