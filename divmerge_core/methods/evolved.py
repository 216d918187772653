"""Methods that search with a score on labelled validation rows."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.problem import Merged, MergeProblem, Predictor
from divmerge_core.methods import METHODS
from divmerge_core.methods.checks import require_positive
from divmerge_core.methods.paths import BASE, Path, Paths, Pool, Population

Score = Callable[[Merged], float]  # higher is better


def finite_score(score: Score | None, method: str) -> Score:
    """The score, checked to be given and finite."""
    if score is None:
        raise ValueError(
            f"{method} needs a validation score: give score=, a function of what was merged whose "
            "value is higher where it is better"
        )

    def finite(merged: Merged) -> float:
        value = float(score(merged))
        if not math.isfinite(value):
            raise ValueError(f"{method}: score gave {value}; it must give finite numbers")
        return value

    return finite


def at_least_one(method: str, **counts: int) -> None:
    """Raise ValueError where one of these options is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{method}: {name} must be 1 or more, got {count}")


# --- one path through base and experts per task ---------------------------------------------------
@METHODS.register(
    "layer_evolution",
    source="Gesmundo and Dean 2022",
    needs="a validation score",
    cost="inputs",
    symmetric=False,
    calls=lambda num_tasks: 4 * num_tasks,  # children
    returns="predictor",
    cite="gesmundo2022",
    search=({}, *({"size_base": base} for base in (0.9, 0.8, 0.95, 0.99, 0.5))),
)
def layer_evolution(
    problem: MergeProblem,
    *,
    score: Score | None = None,
    grouping: str = "block",
    steps: int = 32,
    children: int = 4,
    size_base: float = 1.0,
    seed: int = 0,
    on_score: Callable[[float], None] | None = None,
    progress: bool = True,
) -> Predictor:
    r"""Evolve a path per task: for every group of parameters, whose delta to take, and how much.

    $$
    \theta^{(t)}_n = \theta_{0,n} + a_{g(n)}\, \tau_{e_{g(n)},\, n}, \qquad
    \max_{e,\, a}\; \mathrm{score}_t\; b^{\,s(e, a)}, \qquad
    a_g \in \{0, \tfrac14, \tfrac12, \tfrac34, 1\}
    $$

    Idea: The best model of a task may combine another expert's attention with its own MLPs.
    Mutation and selection find such combinations from a score alone; finished tasks never change.

    Tasks come in their order. Each starts at its own expert, in place of the source's training of
    clones; `steps` generations of `children` mutate parents, the best and least used first, and a
    child is kept unless it scores below its parent on this task. Then the best path is locked:
    later tasks may copy it and never change it, so a finished task's answers stay the same to the
    last bit. All tensors of a group, of whatever shape, move together. A child is never its parent.

    score: of one model per task; while a task evolves, earlier ones answer by their locked paths
    and later ones by the base, so a mean over tasks ranks this task's paths. It is called T (1 +
    `steps` times `children`) times; 32 and 4 are published. size_base: the b above, in (0, 1]; $s$
    is the share of N that the path takes, where a gene that k tasks use counts 1/k. 1 (published)
    ignores size, 0.9 prefers shared genes. on_score: called after every score with the task's best.

    Pitfalls: So many choices overfit a small validation split. The result needs each input's task:
    compare it with the experts, not with one merged model. Where groups do not interact, a greedy
    search finds more with fewer scores. What later tasks can copy depends on the order.

    Peers: The authors' mu2Net trains the components that a child clones, and evolves
    hyperparameters too; neither is done here.

    Raises ValueError for options out of range, an unknown grouping, a missing score, a score that
    is not finite, and a negative one where size counts.

    Source: Gesmundo and Dean 2022, arXiv 2205.12755.
    """
    score = finite_score(score, "layer_evolution")
    at_least_one("layer_evolution", steps=steps, children=children)
    if not 0 < size_base <= 1:
        raise ValueError(f"size_base must be in (0, 1], got {size_base}; 1 ignores size")
    pool, generator = Pool.of(problem, grouping), torch.Generator().manual_seed(seed)
    still = Path((BASE,) * pool.segments.num_groups)
    flats: list[Tensor] = [problem.vectors.base.clone()] * len(problem.vectors.tasks)
    locked: list[Path] = []

    def answering(path: Path, flat: Float[Tensor, " N"]) -> Paths:
        """Earlier tasks by their locked paths, this one by `path`, later ones by the base."""
        task = len(locked)
        paths = (*locked, path, *(still for _ in flats[task + 1 :]))
        return Paths(problem, [*flats[:task], flat, *flats[task + 1 :]], paths, pool.segments)

    def fitness(path: Path) -> float:
        value = score(answering(path, pool.model(path)))
        if value < 0 and size_base < 1:
            raise ValueError(f"size_base needs scores of 0 or more, got {value}; shift them up")
        return value * size_base ** pool.accounted(path, locked)

    for task, name in enumerate(problem.vectors.tasks):
        start = Path(((task, 1.0),) * pool.segments.num_groups)
        population = Population([(fitness(start), start)], tuple(locked))
        if on_score is not None:
            on_score(population.highest())
        for _ in tqdm(range(steps), f"paths of {name}", disable=not progress, leave=False):
            for _ in range(children):
                population.breed(fitness, pool.choices, generator)
                if on_score is not None:
                    on_score(population.highest())
        flats[task] = pool.model(population.best())
        locked.append(population.best())
    return Paths(problem, flats, tuple(locked), pool.segments)


# --- coefficients by covariance matrix adaptation -------------------------------------------------
def covariance_adaptation(start: Float[Tensor, " n"], sigma: float, seed: int) -> Any:
    """pycma's CMAEvolutionStrategy: its own constants, silent, with random numbers from the seed.

    It would seed NumPy's global generator, or draw from it, but for a given `randn` and no seed.
    """
    import cma  # here, as it imports a plotting library

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> np.ndarray:
        return torch.randn(shape, generator=generator, dtype=torch.float64).numpy()

    options = {"randn": normal, "seed": math.nan, "verbose": -9, "verb_disp": 0, "verb_log": 0}
    return cma.CMAEvolutionStrategy(start.numpy(), sigma, options)


@METHODS.register(
    "evolved_coefficients",
    source="Akiba et al. 2025",
    needs="a validation score",
    cost="inputs",
    symmetric=False,
    calls=lambda num_tasks: 4 + int(3 * math.log(num_tasks)),
    between=False,
    cite="akiba2025, hansen2016, hansen2019",
    search=(
        {},
        {"init": None},
        {"init": 0.3},
        {"sigma": 0.05},
        {"sigma": 0.4},
        {"init": None, "sigma": 0.05},
    ),
)
def evolved_coefficients(
    problem: MergeProblem,
    *,
    score: Score | None = None,
    grouping: str = "task",
    init: float | None = 0.5,
    sigma: float = 1 / 6,
    steps: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""Search the coefficients with the highest score by CMA-ES.

    $$
    \max_{\Lambda}\; \mathrm{score}\big(\theta(\Lambda)\big), \qquad
    \Lambda^{(i)} \sim \mathcal{N}\big(m, \sigma^2 C\big), \qquad
    \theta(\Lambda)_n = \theta_{0,n} + \sum_{t=1}^{T} \lambda_{t,g(n)}\, \tau_{t,n}
    $$

    Idea: Accuracy on labelled rows has no gradient, but it can be searched. CMA-ES learns from each
    step's better and worse merges where the next ones should lie, and how far apart.

    All tensors take part; there is one coefficient per task and group of `grouping`. They are free,
    so an expert may be overshot. What comes out is the best merge that was scored, the start among
    them, and not the final mean. The search is pycma's, with its own constants.

    score: of one merged vector, higher is better. init: of every coefficient, None for 1/T.
    sigma: the first standard deviation, above 0; 1/6 is published. steps: each scores
    $4 + \lfloor 3 \ln n \rfloor$ merges of n = T G coefficients; a hundred with 5 to 12
    coefficients is about the published 1000 trials.

    Pitfalls: It fits the rows that it is scored on, the more so the more coefficients there are.
    Accuracy on few rows takes few values, so many points score the same. Each coefficient has
    random numbers of its own, so the order of tasks matters.

    Peers: The source also searches the drop rates and densities of DARE and TIES, keeps its
    parameters in a box, and published no search code. mergekit's `mergekit-evolve` searches all
    numbers of a recipe by CMA-ES.

    Raises ValueError for options out of range, unknown groupings, a missing or infinite score, NaN.

    Source: Akiba et al. 2025, arXiv 2403.13187; CMA-ES is Hansen 2016, arXiv 1604.00772.
    """
    score = finite_score(score, "evolved_coefficients")
    at_least_one("evolved_coefficients", steps=steps)
    require_positive(sigma=sigma)
    vectors = problem.vectors
    start = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping, init=init)
    shape, segments = start.raw.shape, start.segments

    def merged(point: Float[Tensor, " n"]) -> Float[Tensor, " N"]:
        coeffs = point.view(shape).to(vectors.base)
        return grouped_merge(vectors.base, vectors.deltas, coeffs, segments)

    best = start.raw.detach().double().flatten()
    highest, search = score(merged(best)), covariance_adaptation(best, sigma, seed)
    for _ in tqdm(range(steps), "CMA-ES", disable=not progress, leave=False):
        points = search.ask()
        values = [score(merged(torch.from_numpy(point))) for point in points]
        search.tell(points, [-value for value in values])  # it minimises
        if max(values) > highest:
            highest, best = max(values), torch.from_numpy(points[values.index(max(values))])
    return merged(best)
