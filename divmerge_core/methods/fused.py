"""Logit fusion: a large model's logits shifted as fine-tuning shifted those of small models."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.divergences import kl
from divmerge_core.merging.problem import Batch, MergeProblem, Predictor
from divmerge_core.methods import METHODS

WEIGHTS = tuple(n / 10 for n in range(21))  # that logits_fusion tries for every answer: 0 to 2


@dataclass(frozen=True)
class Fusion:
    """The base of `large`, whose logits the experts of `problem` shift; weight None: searched."""

    problem: MergeProblem
    large: MergeProblem
    weight: float | None

    @property
    def nbytes(self) -> int:
        """Bytes to be stored: the large base, the small base and every small expert."""
        small = self.problem.vectors
        return self.large.vectors.base.nbytes + (1 + len(small.tasks)) * small.base.nbytes

    def logits(self, task: int, batch: Batch) -> Float[Tensor, "A V"]:
        """Three or more forward passes: the large base's, the small base's, every expert's."""
        vectors = self.problem.vectors
        large = self.large.logits(self.large.vectors.base, task, batch)
        base = self.problem.logits(vectors.base, task, batch)
        if large.shape != base.shape:
            raise ValueError(
                f"logits_fusion adds logits: the large model gives {list(large.shape)}, the small "
                f"one {list(base.shape)}; both need the same answers in the same order"
            )
        experts = torch.stack(
            [self.problem.logits(vectors.expert(name), task, batch) for name in vectors.tasks]
        )
        if self.weight is not None:
            return large + self.weight * (experts - base).sum(0)
        return steered(large, base, experts)


def steered(
    large: Float[Tensor, "A V"], base: Float[Tensor, "A V"], experts: Float[Tensor, "T A V"]
) -> Float[Tensor, "A V"]:
    """At each position, large + a (expert_t - base) with the best of all experts t and a.

    The best moves `large` as far, in both Kullback-Leibler divergences, as the experts moved the
    small base: least sum_u (KL(new, large) - KL(u, base))^2 + (KL(large, new) - KL(base, u))^2.
    """
    moved = [(kl(expert, base), kl(base, expert)) for expert in experts]  # [A] each
    least, best = large.new_full(large.shape[:1], math.inf), large
    for expert in experts:
        for weight in WEIGHTS:
            new = large + weight * (expert - base)
            there, back = kl(new, large), kl(large, new)
            miss = sum((there - far).square() + (back - near).square() for far, near in moved)
            best = torch.where((miss < least)[:, None], new, best)
            least = torch.minimum(miss, least)
    return best


@METHODS.register(
    "logits_fusion",
    source="Fan et al. 2024",
    needs="nothing, but a second, larger base to steer",
    cost="inputs",
    returns="predictor",
    optional="large",
    cite="fan2024, liu2024",
    search=({}, *({"weight": weight} for weight in (1.0, 0.5, 0.3, 1.5, 2.0))),
)
def logits_fusion(
    problem: MergeProblem, *, large: MergeProblem | None = None, weight: float | None = None
) -> Predictor:
    r"""Shift a large model's logits as fine-tuning shifted the logits of small models.

    $$
    \tilde z = z^{L} + \alpha\, \big(z_t - z_0\big), \qquad
    (t, \alpha) = \arg\min \sum_{u=1}^{T}
      \big[\mathrm{KL}(\tilde q, q^{L}) - \mathrm{KL}(p_u, q_0)\big]^2
      + \big[\mathrm{KL}(q^{L}, \tilde q) - \mathrm{KL}(q_0, p_u)\big]^2
    $$

    Idea: Fine-tuning a small model shows how predictions should change. The large model's change in
    that direction, by as much as the experts changed their own base.

    No weight changes. At every answer position, $z^L$ are the large base's logits, $z_0$ the small
    base's and $z_t$ an expert's; $\tilde q$, $q^L$, $q_0$ and $p_u$ are their softmaxes. One expert
    $t$ and one $\alpha$ out of 0, 0.1, ..., 2 are chosen there (see `steered`).

    weight: instead adds the shifts of all experts at this weight; 1 is proxy-tuning. large: the
    problem whose base is steered, with the same tasks, answers and inputs; its experts are not
    used. Without it the problem's own base is steered: with one expert $\alpha$ is then 1, and the
    answers are that expert's.

    Pitfalls: Every expert predicts on every task's inputs, so all must share each task's head, and
    a prediction takes T + 2 forward passes. The paper fuses generated tokens and leaves classifiers
    out; the rule is the same at every position.

    Peers: The authors' repository held no code, so this follows the paper's text.

    Raises ValueError for a weight that is not finite, a large problem of other tasks, and, when it
    answers, for logits of different shapes.

    Source: Fan et al. 2024, arXiv 2406.15480; proxy-tuning is Liu et al. 2024, arXiv 2401.08565.
    """
    if weight is not None and not math.isfinite(weight):
        raise ValueError(f"weight must be finite, got {weight}; 1 is proxy-tuning, None searches")
    large = problem if large is None else large
    if large.vectors.tasks != problem.vectors.tasks:
        raise ValueError(
            f"logits_fusion needs one order of tasks: large has {list(large.vectors.tasks)}, the "
            f"problem {list(problem.vectors.tasks)}; use large.select(problem.vectors.tasks)"
        )
    return Fusion(problem, large, weight)
