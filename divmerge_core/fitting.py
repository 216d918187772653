"""The one optimisation loop behind every method that learns coefficients."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.coefficients import Coefficients
from divmerge_core.kernels.answers import TopAnswers
from divmerge_core.ledger import Entry, Ledger
from divmerge_core.live import GRADIENTS, Answers, Live, expert_logits, schedule, slope_of
from divmerge_core.minimizers import gauss_newton, lbfgs
from divmerge_core.problem import Diverged, MergeProblem, Objective
from divmerge_core.registry import Registry

OPTIMIZERS = Registry("optimizer")  # name -> function(live, course) -> number of steps
LIMIT = 100.0  # no coefficient of a fit that converges is near it
METRIC_SHARE, METRIC_LEAST = 8, 4  # batches for a product with the metric: one in 8, at least 4


@dataclass(frozen=True)
class Step:
    """Where the fit stands: seen by `watch` before each update, and once at the end.

    `flat` is the live buffer, overwritten by the next step: clone it to keep it.
    """

    number: int
    loss: float | None  # nats, summed over tasks; None at the end, where no batch was drawn
    coeffs: Float[Tensor, "T G"]
    flat: Float[Tensor, " N"]


def checked_targets(
    problem: MergeProblem, targets: Sequence[Sequence[Answers]] | None
) -> Sequence[Sequence[Answers]]:
    """The targets given, or every expert's logits on its own inputs.

    Raises ValueError where they are not one [A, V] per task and batch.
    """
    if targets is None:
        return expert_logits(problem)
    wanted = [[len(batch.weight) for batch in batches] for batches in problem.batches]
    given = [
        [len(one.log_probs if isinstance(one, TopAnswers) else one) for one in every]
        for every in targets
    ]
    if given != wanted:
        raise ValueError(
            f"targets must hold logits [A, V] for every task and batch: {wanted} rows by task and "
            f"batch, got {given}; `expert_logits(problem)` has the form"
        )
    return targets


def check_fit(epochs: int, lr: float, gradients: str) -> None:
    """Raise ValueError for values out of range."""
    if epochs < 1 or not 0 < lr < float("inf"):
        raise ValueError(
            f"epochs must be 1 or more and lr above 0 and finite, got {epochs} and {lr}"
        )
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {', '.join(GRADIENTS)}, got {gradients!r}")


@dataclass(frozen=True)
class Course:
    """How a fit goes on: its settings, and who is told about every step."""

    epochs: int
    lr: float
    seed: int
    watch: Callable[[Step], None] | None
    progress: bool
    ledger: Ledger

    def merge(self, live: Live) -> Float[Tensor, "T G"]:
        """Merge, unless what is wanted of the model is known already and nobody watches."""
        if self.ledger.replaying and self.watch is None:
            return live.coefficients()
        return live.merge()

    def observe(self, live: Live, number: int, loss: float | None, coeffs: Tensor) -> None:
        """Tell the watcher. Raises Diverged where the loss or a coefficient ran off."""
        coeffs = coeffs.detach().clone()
        if not math.isfinite(loss or 0.0) or not coeffs.abs().max() <= LIMIT:
            raise Diverged(
                f"fit_coefficients: the loss is {loss} at step {number}, the largest coefficient "
                f"{coeffs.abs().max():.3g}; lower lr (now {self.lr}) or check the experts for "
                "extreme logits"
            )
        if self.watch is not None:
            self.watch(Step(number, loss, coeffs, live.flat))


# --- how the coefficients are found ---------------------------------------------------------------


def pulled(live: Live, chosen: Sequence[int]) -> Entry:
    """The loss on the chosen batches, and its gradient in the coefficients."""
    loss = live.loss(chosen)
    loss.backward()
    return loss.item(), live.collect()


@OPTIMIZERS.register("adam", label="Adam")
def adam(live: Live, course: Course, *, anneal: bool = False) -> int:
    """A step of Adam on one batch of every task at a time; returns the number of steps.

    anneal: the step size falls evenly, to nothing after the last step.
    """
    problem, raw = live.problem, live.coefficients.parameters()
    optimizer = torch.optim.Adam(raw, lr=course.lr)
    generator = torch.Generator().manual_seed(course.seed)
    steps = schedule([len(batches) for batches in problem.batches], course.epochs, generator)
    bar = tqdm(steps, "fitting", disable=not course.progress, leave=False)
    for number, chosen in enumerate(bar):
        if anneal:
            optimizer.param_groups[0]["lr"] = course.lr * (1 - number / len(steps))
        coeffs = course.merge(live)
        loss, gradient = course.ledger.next(partial(pulled, live, chosen))
        course.observe(live, number, loss, coeffs)
        optimizer.zero_grad()
        coeffs.backward(gradient.to(coeffs))
        optimizer.step()
    return len(steps)


OPTIMIZERS.register("annealed_adam", label="Adam, annealed")(partial(adam, anneal=True))


def over_all(live: Live, course: Course, minimise: Callable[..., Tensor], **options) -> int:
    """Let a minimiser look at the loss over all inputs, `course.epochs` times at most."""
    raw, number = live.coefficients.raw, 0

    def evaluate(point: Tensor) -> tuple[float, Tensor]:
        nonlocal number
        raw.data.copy_(point)
        coeffs = course.merge(live)
        loss, gradient = course.ledger.next(lambda: (live.backward_all(), live.collect()))
        course.observe(live, number, loss, coeffs)
        number += 1
        bar.update()
        return loss, torch.autograd.grad(coeffs, raw, gradient.to(coeffs))[0]

    with tqdm(total=course.epochs, desc="fitting", disable=not course.progress, leave=False) as bar:
        raw.data.copy_(minimise(evaluate, start=raw.detach().clone(), passes=course.epochs))
    return number


@OPTIMIZERS.register("lbfgs", label="L-BFGS")
def full_lbfgs(live: Live, course: Course) -> int:
    """L-BFGS on all inputs at once, every pass over them an epoch."""
    return over_all(live, course, lbfgs)


def share_of(count: int) -> int:
    """How many of a task's batches a product with the metric looks at."""
    return min(count, max(METRIC_LEAST, -(-count // METRIC_SHARE)))


def require_divergence(objective: Objective) -> None:
    """Raise ValueError for an objective that is not 0 where the answers are equal."""
    logits = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4)
    if objective(logits, logits).abs().max() > 1e-9:
        raise ValueError(
            "gauss_newton needs a divergence, 0 where the answers are equal, which this objective "
            "is not; choose optimizer='adam' or 'lbfgs'"
        )


@OPTIMIZERS.register("gauss_newton", label="Gauss-Newton")
def full_gauss_newton(live: Live, course: Course) -> int:
    """Natural-gradient steps: gradients from all inputs, the metric from a share of them."""
    require_divergence(live.objective)
    raw, link = live.coefficients.raw, live.coefficients.link
    generator = torch.Generator().manual_seed(course.seed)
    counts = [len(batches) for batches in live.problem.batches]
    price = 2 * sum(share_of(count) for count in counts) / sum(counts)  # forward mode, backward

    def products(point: Tensor) -> Callable[[Tensor], Tensor]:
        drawn = [torch.randperm(n, generator=generator)[: share_of(n)].tolist() for n in counts]

        def product(direction: Tensor) -> Tensor:
            raw.data.copy_(point)
            coeffs, change = course.merge(live), slope_of(link, point, direction)
            _, found = course.ledger.next(lambda: (0.0, live.metric_product(change, drawn)))
            return torch.autograd.grad(coeffs, raw, found.to(coeffs))[0]

        return product

    return over_all(live, course, partial(gauss_newton, products=products, price=price))


def fit_coefficients(
    problem: MergeProblem,
    coefficients: Coefficients,
    objective: Objective,
    *,
    targets: Sequence[Sequence[Answers]] | None = None,
    optimizer: str = "adam",
    epochs: int = 4,
    lr: float = 1e-2,
    seed: int = 0,
    gradients: str = "stream",
    checkpoint: Path | str | None = None,
    watch: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Coefficients that minimise sum_t E_x objective(expert_t(x), merged(x)).

    Unweighted sum over tasks (DivMerge Eq. 4 and Algorithm 1). The experts' logits are cached and
    the merged parameters are written into one live buffer whose views are the model's leaves; no
    graph runs through the merge. `coefficients` is trained in place; returns the merged parameters.

    targets: logits per task and batch, or TopAnswers, that stand in for the experts' own; None for
    these.
    optimizer: a name in OPTIMIZERS. `adam`, the paper's, sees one batch of every task per step;
    `annealed_adam` lets its step size fall to 0. `lbfgs` and `gauss_newton` see all inputs per
    step, find their own step size, and keep the best point: give them few inputs and 20 epochs or
    more. epochs: passes over the inputs, at least 1. lr: Adam's step size, above 0. gradients:
    `stream` takes every tensor's gradient as it comes and frees it; `buffer` keeps all N for one
    pass at the end. checkpoint: a file that keeps what every pass through the model gave; a fit
    that was killed is called again with the same arguments, replays them, and ends at the same
    coefficients bit for bit. Raises ValueError for a checkpoint of another fit, unknown names,
    values outside these ranges, a task without inputs, targets that do not fit the batches and,
    with `gauss_newton`, an objective that is not 0 where the answers are equal; and Diverged where
    the loss stops being finite or a coefficient leaves [-LIMIT, LIMIT].
    """
    check_fit(epochs, lr, gradients)
    problem.require_inputs("fit_coefficients")
    find = OPTIMIZERS[optimizer]
    settings = {"optimizer": optimizer, "epochs": epochs, "lr": lr, "seed": seed}
    settings |= {"tasks": list(problem.vectors.tasks), "inputs": list(map(len, problem.batches))}
    settings |= {"link": coefficients.link.__name__, "start": coefficients.raw.tolist()}
    ledger = Ledger.open(checkpoint, settings)
    live = Live.of(problem, coefficients, objective, checked_targets(problem, targets), gradients)
    course = Course(epochs, lr, seed, watch, progress, ledger)
    steps = find(live, course)
    ledger.save()
    course.observe(live, steps, None, live.merge())
    return live.flat
