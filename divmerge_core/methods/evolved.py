"""Methods that search with a score on labelled validation rows."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from divmerge_core.coefficients import Coefficients
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.methods import METHODS
from divmerge_core.methods.cma import CmaEs
from divmerge_core.methods.paths import Path, Paths, Pool, Population
from divmerge_core.problem import Merged, MergeProblem, Predictor

Score = Callable[[Merged], float]  # higher is better


def checked(score: Score | None, method: str) -> Score:
    """The score, which must be given and stay finite."""
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
    returns="predictor",
    search=({}, {"size_base": 0.9}),
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
    progress: bool = True,
) -> Predictor:
    """Evolve a path per task: for every group of parameters, whose delta to take, and how much.

    The form without training of mu2Net (arXiv 2205.12755): a gene is the base, or a quarter, half,
    three quarters or all of one expert's delta. Tasks come in their order. Each starts at its own
    expert, which stands for the training that clones get there; `steps` generations of `children`
    mutate parents, the best and least used first, and a child is kept unless it scores below its
    parent on this task. Then the best path is locked: later tasks may copy it and never change it,
    so a finished task's answers stay the same to the last bit. All tensors of a group, of whatever
    shape, move together. A child differs in one gene at least, as an equal one would tell nothing.

    score: of one model per task; while a task evolves, earlier ones answer by their locked paths
    and later ones by the base, so a mean over tasks ranks this task's paths. It is called
    T (1 + steps children) times; so many choices soon overfit a small validation split.
    size_base: the score times size_base to the share of N that the path takes, where a gene that k
    tasks use counts 1/k; 1 (published) ignores size, 0.9 prefers shared genes. It is in (0, 1].

    The result knows an input's task: compare it with the experts, not with one merged model.
    Not symmetric: what later tasks can copy depends on the order. Raises ValueError for options out
    of range, an unknown grouping, a missing score, a score that is not finite, and a negative one
    where size counts.
    """
    score = checked(score, "layer_evolution")
    at_least_one("layer_evolution", steps=steps, children=children)
    if not 0 < size_base <= 1:
        raise ValueError(f"size_base must be in (0, 1], got {size_base}; 1 ignores size")
    pool, generator = Pool.of(problem, grouping), torch.Generator().manual_seed(seed)
    flats: list[Tensor] = [problem.vectors.base.clone()] * len(problem.vectors.tasks)
    locked: list[Path] = []

    def fitness(path: Path) -> float:
        task = len(locked)
        value = score(Paths(problem, [*flats[:task], pool.model(path), *flats[task + 1 :]]))
        if value < 0 and size_base < 1:
            raise ValueError(f"size_base needs scores of 0 or more, got {value}; shift them up")
        return value * size_base ** pool.accounted(path, locked)

    for task, name in enumerate(problem.vectors.tasks):
        start = Path(((task, 1.0),) * pool.segments.num_groups)
        population = Population([(fitness(start), start)], tuple(locked))
        for _ in tqdm(range(steps), f"paths of {name}", disable=not progress, leave=False):
            for _ in range(children):
                population.breed(fitness, pool.choices, generator)
        flats[task] = pool.model(population.best())
        locked.append(population.best())
    return Paths(problem, flats)


# --- coefficients by covariance matrix adaptation -------------------------------------------------


@METHODS.register(
    "evolved_coefficients",
    source="Akiba et al. 2025",
    needs="a validation score",
    cost="inputs",
    symmetric=False,
    between=False,
    search=({}, {"init": None}),
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
    """The coefficients, one per task and group, at which CMA-ES sees the highest score.

    The search in parameter space of evolutionary merging (arXiv 2403.13187), over the coefficients
    of task arithmetic: the paper's also moves the drop rates and densities of DARE and TIES, and
    keeps its parameters in a box; these here are free, so one expert may be overshot. What comes
    out is the best merge that was scored, the start among them, and not the final mean.

    init: of every coefficient, None for 1/T. sigma: the first standard deviation, above 0. steps:
    each scores lambda = 4 + floor(3 ln n) merges, n = T G; a hundred with 5 to 12 coefficients is
    about the paper's 1000 trials. Not symmetric: each coefficient has random numbers of its own.
    Raises ValueError for options out of range, an unknown grouping, a missing score, and one that
    is not finite.
    """
    score = checked(score, "evolved_coefficients")
    at_least_one("evolved_coefficients", steps=steps)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be above 0 and finite, got {sigma}; the paper takes 1/6")
    vectors = problem.vectors
    start = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping, init=init)
    shape, segments = start.raw.shape, start.segments

    def merged(point: Float[Tensor, " n"]) -> Float[Tensor, " N"]:
        coeffs = point.view(shape).to(vectors.base)
        return grouped_merge(vectors.base, vectors.deltas, coeffs, segments)

    best = start.raw.detach().double().flatten()
    highest, search = score(merged(best)), CmaEs(best, sigma, torch.Generator().manual_seed(seed))
    for _ in tqdm(range(steps), "CMA-ES", disable=not progress, leave=False):
        points = search.ask()
        values = [score(merged(point)) for point in points]
        search.tell(torch.tensor(values, dtype=torch.float64))
        if max(values) > highest:
            highest, best = max(values), points[values.index(max(values))]
    return merged(best)


# --- which experts to trust -----------------------------------------------------------------------


def drawn(
    raw: Float[Tensor, " T"], draw: int | None, generator: torch.Generator
) -> Bool[Tensor, " T"]:
    """Which experts a policy takes: each by itself at sigmoid(w), or `draw` by softmax(w)."""
    uniform = torch.rand(len(raw), generator=generator, dtype=raw.dtype)
    if draw is None:
        taken = uniform < raw.sigmoid()
        return taken if taken.any() else raw == raw.max()
    order = (raw - (-uniform.log()).log()).argsort(descending=True)  # Gumbel: none is drawn twice
    return torch.zeros_like(raw, dtype=torch.bool).index_fill(0, order[:draw], True)


def learned_policy(
    problem: MergeProblem,
    score: Score,
    rule: Callable[[MergeProblem], Float[Tensor, " N"]],
    *,
    draw: int | None,
    steps: int,
    lr: float,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, " T"]:
    """How far each expert is trusted, learned from the scores R of merges of experts drawn by it.

    With draw=None each expert is drawn by itself, with probability sigmoid(w), at first 1/2; these
    are returned. Otherwise `draw` of them are drawn from softmax(w), without replacement, and the
    softmax is returned. Adam descends -(R - b) log P(drawn); in the second case, as published,
    log P is the sum of the drawn experts' log softmax. b is R's moving average: the first R at
    first, then moved a tenth of the way to each new one.
    """
    tasks, generator = problem.vectors.tasks, torch.Generator().manual_seed(seed)
    raw = torch.zeros(len(tasks), dtype=torch.float64, requires_grad=True)
    adam, usual = torch.optim.Adam([raw], lr=lr), None
    for _ in tqdm(range(steps), "policy", disable=not progress, leave=False):
        taken = drawn(raw.detach(), draw, generator)
        names = [task for task, chosen in zip(tasks, taken.tolist(), strict=True) if chosen]
        reward = score(rule(problem.select(names)))
        usual = reward if usual is None else usual
        signed = torch.where(taken, raw, -raw)
        likely = logsigmoid(signed) if draw is None else raw.log_softmax(0)[taken]
        adam.zero_grad()
        (-likely.sum() * (reward - usual)).backward()
        adam.step()
        usual += 0.1 * (reward - usual)
    return raw.detach().sigmoid() if draw is None else raw.detach().softmax(0)


@METHODS.register(
    "selection_policy",
    source="Hu et al. 2025",
    needs="a validation score",
    cost="inputs",
    symmetric=False,
    search=({}, {"draw": 4}),
)
def selection_policy(
    problem: MergeProblem,
    *,
    score: Score | None = None,
    rule: str = "average",
    draw: int | None = None,
    steps: int = 500,
    lr: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Merge the experts that a learned policy trusts, for pools in which some are corrupted.

    The policy of TEAPOT (arXiv 2311.14756), there over models to distil from, is learned here from
    the scores of merges of a few experts at a time (see `learned_policy`). `rule`, a data-free
    method by name, merges those and at last the trusted ones; the mean suits both, as its size does
    not depend on how many they are. Tensors of all shapes are treated as the rule treats them.

    draw: None lets every expert in or out by itself and trusts those at 1/2 or more. A number draws
    that many per step from one softmax, as published (4 of 100), at most half of the pool so that
    draws differ, and trusts those above 1/(2T). Its mass adds up to 1: corrupted experts lose it
    sooner, but a long run also drops good ones, and loses accuracy where no expert is corrupted.
    The score's scale is immaterial, as Adam divides by it. Leaving each expert out once, or the
    cosine of its task vector to their mean, finds outliers for far fewer scores: compare with them.
    Not symmetric: draws follow the experts' order.

    Raises ValueError for options out of range, a rule that is not data-free, a missing score, and
    one that is not finite.
    """
    score = checked(score, "selection_policy")
    at_least_one("selection_policy", steps=steps, **({} if draw is None else {"draw": draw}))
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be above 0 and finite, got {lr}; the paper takes 0.1")
    method, facts = METHODS[rule], METHODS.facts[rule]
    data_free = facts["needs"].startswith(("nothing", "validation labels"))
    if not data_free or "exactly" in facts or "returns" in facts:
        raise ValueError(
            f"rule must merge any number of experts into one vector, from their weights alone; "
            f"{rule!r} does not, 'average' does"
        )
    tasks = problem.vectors.tasks
    draw = draw and min(draw, max(1, len(tasks) // 2))
    trust = learned_policy(
        problem, score, method, draw=draw, steps=steps, lr=lr, seed=seed, progress=progress
    )
    enough = trust >= 0.5 if draw is None else trust > 0.5 / len(tasks)
    enough |= trust == trust.max()  # where every expert harms, the least harmful one is merged
    return method(problem.select([t for t, kept in zip(tasks, enough, strict=True) if kept]))
