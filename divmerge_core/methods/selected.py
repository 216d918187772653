"""Which experts to trust: a policy learned from the scores of merges of a few of them."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.checks import require_positive
from divmerge_core.methods.evolved import Score, at_least_one, finite_score


def sample_masks(
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
        taken = sample_masks(raw.detach(), draw, generator)
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
    calls=lambda num_tasks: 1,
    cite="hu2025",
    search=(
        {},
        {"draw": 4},
        {"draw": 2},
        {"lr": 0.03},
        {"rule": "task_arithmetic"},
        {"draw": 4, "lr": 0.03},
    ),
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
    on_trust: Callable[[Tensor], None] | None = None,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""Merge the experts that a learned policy selects, for pools in which some are corrupted.

    $$
    w \leftarrow w + \eta\, (R - b)\, \nabla_w \log \pi_w(S), \qquad
    R = \mathrm{score}\big(\mathrm{merge}(S)\big), \qquad
    \theta = \mathrm{merge}\big\{\, t : \pi_w(t) \text{ is large} \,\big\}
    $$

    Idea: Merges that contain a corrupted expert score worse than average. A policy gradient raises
    the probability of experts in well scored merges, and so finds those to leave out.

    $S$ are the experts drawn in a step, $b$ is the moving average of the scores $R$, and Adam takes
    the step (see `learned_policy`).

    rule: a data-free method by name, which merges those drawn and at last the trusted ones, all
    tensors as it does; the mean suits both, as its size does not depend on how many they are.
    draw: None lets every expert in or out by itself and trusts those at 1/2 or more. A number draws
    that many per step from one softmax, at most half of the pool so that draws differ, and trusts
    those above 1/(2T); 4 of 100 are published. `steps` and `lr`: of Adam, `lr` published as 0.1.
    score: of one merged vector; its scale is immaterial, as Adam divides by it. on_trust: called
    once, at the end, with how far each expert is trusted, [T].

    Pitfalls: Leaving each expert out once finds outliers for far fewer scores, and the cosine of a
    task vector to their mean for none while most experts are sound: compare with both. A softmax
    sums to 1: the weight of corrupted experts falls sooner, but a long run also drops good ones,
    and loses accuracy where no expert is corrupted. Draws follow the experts' order, so it matters.

    Peers: The policy is that of the authors' code, there over classifiers whose knowledge is
    distilled into a meta-learner; the merge, the experts drawn singly and the thresholds are ours.

    Raises ValueError for options out of range, a rule that is not data-free, a missing score, and
    one that is not finite.

    Source: Hu et al. 2025, arXiv 2311.14756.
    """
    score = finite_score(score, "selection_policy")
    at_least_one("selection_policy", steps=steps, **({} if draw is None else {"draw": draw}))
    require_positive(lr=lr)
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
    if on_trust is not None:
        on_trust(trust.clone())
    enough = trust >= 0.5 if draw is None else trust > 0.5 / len(tasks)
    enough |= trust == trust.max()  # where every expert harms, the least harmful one is merged
    return method(problem.select([t for t, kept in zip(tasks, enough, strict=True) if kept]))
