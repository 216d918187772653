"""A mixture of merged models: each new expert joins one of them or starts another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.checks import check_choice
from divmerge_core.methods.continual import check_share, join, linear_places, untouched

POSTERIORS = ("log", "published")


@dataclass(frozen=True)
class Clusters:
    """Several merged models: each task uses the one that its expert joined."""

    problem: MergeProblem = field(repr=False)
    models: tuple[Float[Tensor, " N"], ...] = field(repr=False)
    numbers: tuple[int, ...]  # of every task's model in `models`

    @property
    def nbytes(self) -> int:
        """Bytes to be stored: all merged models."""
        return sum(model.nbytes for model in self.models)

    def logits(self, task: int, batch: Batch) -> Float[Tensor, "A V"]:
        """Logits of the task's own merged model."""
        return self.problem.logits(self.models[self.numbers[task]], task, batch)


@torch.no_grad()
def residuals(
    problem: MergeProblem, task: int, delta: Float[Tensor, " N"], offsets: Sequence[Tensor]
) -> list[Float[Tensor, " n"]]:
    """How far candidate models (base plus offset) answer from a task's expert, per probe.

    The Euclidean distance of logits, each row centred as softmax does not see its mean, in units of
    the root mean square distance between expert and base over the probes. Raises ValueError where
    logits are not finite.
    """

    def answers(offset: Tensor) -> list[Tensor]:
        flat = problem.vectors.base + offset
        rows = [problem.logits(flat, task, batch) for batch in problem.batches[task]]
        return [logits - logits.mean(dim=-1, keepdim=True) for logits in rows]

    expert = answers(delta)

    def distance(offset: Tensor) -> Tensor:
        pairs = zip(answers(offset), expert, strict=True)
        return torch.cat([(candidate - own).norm(dim=-1) for candidate, own in pairs])

    size = torch.cat([rows.norm(dim=-1) for rows in expert]).square().mean().sqrt()
    change = distance(torch.zeros_like(delta)).square().mean().sqrt()
    found = [distance(offset) for offset in offsets]
    if not torch.isfinite(torch.cat([change[None], size[None], *found])).all():
        raise ValueError(
            f"logits on the inputs of {problem.vectors.tasks[task]!r} are not finite, of the base, "
            "its expert or a merge with it; check the expert and its inputs"
        )
    limits = torch.finfo(size.dtype)
    floor = size * limits.eps + limits.tiny  # a change below rounding is none
    return [rows / change.clamp(min=floor) for rows in found]


def crp_prior(counts: Sequence[int], zeta: float) -> list[float]:
    """Prior probabilities of joining each group, by its size, and of a new one, by zeta."""
    if not counts or zeta == math.inf:
        return [0.0] * len(counts) + [1.0]
    return [size / (sum(counts) + zeta) for size in (*counts, zeta)]


def posterior_score(
    errors: Sequence[Tensor], counts: Sequence[int], *, zeta: float, sigma: float, posterior: str
) -> Float[Tensor, " L"]:
    """A posterior score of each group, the last one new, of which only the order matters.

    With errors e of the probes and N the density of a Gaussian of width sigma, `log` is the log of
    the prior plus mean log N(e), up to a constant. `published` is exp(mean log N(e)) + c prior,
    where e counts as at most 3 sigma and c falls from 0.2 to 0.1 over the first ten experts.
    """
    prior = torch.tensor(crp_prior(counts, zeta), dtype=torch.float64)
    squares = [(error.double().cpu() / sigma).square() for error in errors]
    if posterior == "log":  # the bound keeps likelihoods finite, so that a chance of 0 excludes
        return prior.log() - torch.stack([s.mean().clamp(max=1e30) / 2 for s in squares])
    fit = torch.stack([-s.clamp(max=9).mean() / 2 for s in squares]).exp()
    return fit / (sigma * math.sqrt(2 * math.pi)) + max(0.1, 0.2 - sum(counts) / 90) * prior


def check_mixture(zeta: float, sigma: float, start: float, posterior: str) -> None:
    """Raise ValueError for options of the mixture that are out of range or unknown."""
    if not zeta >= 0 or not 0 < sigma < math.inf or not 0 <= start < 1:
        raise ValueError(
            "zeta must be 0 or more (inf too), sigma above 0 and finite, start in [0, 1), got "
            f"{zeta}, {sigma} and {start}; the defaults are 2.0, 0.25 and 0.5"
        )
    check_choice("posterior", posterior, POSTERIORS)


@METHODS.register(
    "dp_mixture",
    source="Wang et al. 2022, carried over from reinforcement learning",
    needs="unlabelled inputs",
    cost="inputs",
    symmetric=False,
    returns="predictor",
    cite="wang2022",
    search=(
        {},
        {"zeta": 0.5},
        {"start": 0.3},
        {"start": 0.7},
        {"sigma": 0.5},
        {"zeta": 0.5, "start": 0.3},
    ),
)
def dp_mixture(
    problem: MergeProblem,
    *,
    zeta: float = 2.0,
    sigma: float = 0.25,
    start: float = 0.5,
    posterior: str = "log",
    share: float = 0.5,
    progress: bool = True,
) -> Clusters:
    r"""Cluster experts online, with one merged model per cluster: each joins the best fitting one.

    $$
    \arg\max_{l}\; \log n_l
      + \frac{1}{|X_t|} \sum_{x \in X_t} \log \mathcal{N}\big(e_l(x);\, 0, \sigma^2\big),
    \qquad n_{\text{new}} = \zeta
    $$

    Idea: Compatible experts share a model, and an expert that fits no model starts another. The
    number of models is not given: a Chinese restaurant process prior weighs it against the fit.

    Experts come in the order of the problem's tasks. Each joins every group's model on trial, by
    OPCM with `share`; $n_l$ is the size of group $l$, and $e_l(x)$ how far the joined model answers
    from the expert, in units of the change from base to expert (see `residuals`). A new group is
    judged by base plus `start` times the task vector, as the expert itself would always win: so an
    expert joins where about that share of its change survives. A task's number finds its model.

    zeta: 0 gives `opcm`, `inf` every expert alone; the authors take 2. sigma: the authors' 0.25.
    start: in [0, 1), our choice. posterior: `log` as above, or `published` for the authors' form.

    Pitfalls: The loss of a group's earlier members is ignored and assignments are final, so order
    may matter. More models need more storage, so compare at equal storage. It costs one merge and
    one pass over the task's inputs for every expert and group.

    Peers: The source groups reinforcement learning tasks by one-step errors of critics and starts
    groups from a robust model; the answers compared here, OPCM and `start` are this package's
    choices. The authors' code multiplies softmaxes of likelihoods and of a tenth of the prior,
    which makes the prior nearly flat: with `published` the limits of `zeta` do not hold.

    Raises ValueError for values out of range, a task without inputs, and infinite logits or NaN.

    Source: Wang et al. 2022, arXiv 2205.10787.
    """
    check_share(share)
    check_mixture(zeta, sigma, start, posterior)
    problem.require_inputs("dp_mixture")
    places, groups, numbers = linear_places(problem), [], []
    deltas = dense(problem.vectors.deltas)
    for task, delta in enumerate(tqdm(deltas, "joining", disable=not progress, leave=False)):
        trials = [join(one, delta, places, share, True) for one in (*groups, untouched(problem))]
        errors = residuals(problem, task, delta, [*(t.offset for t in trials[:-1]), start * delta])
        counts = [len(group.lengths) for group in groups]
        found = posterior_score(errors, counts, zeta=zeta, sigma=sigma, posterior=posterior)
        chosen = int(found.argmax())
        groups[chosen : chosen + 1] = [trials[chosen]]  # appends where it is new
        numbers.append(chosen)
    models = tuple(problem.vectors.base + group.offset for group in groups)
    return Clusters(problem, models, tuple(numbers))
