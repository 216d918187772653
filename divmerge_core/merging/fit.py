"""The one optimisation loop behind every method that learns coefficients."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_core.divergences.parse import Objective
from divmerge_core.kernels.expert_cache import TopKLogProbs, Undefined
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit_checkpoint import (
    Entry,
    FitCheckpoint,
    code_of,
    digest,
    package_digest,
)
from divmerge_core.merging.merged_model import (
    GRADIENTS,
    Answers,
    MergedModel,
    expert_logits,
    schedule,
)
from divmerge_core.merging.optimizers import lbfgs
from divmerge_core.merging.problem import Diverged, MergeProblem
from divmerge_core.registry import Registry

OPTIMIZERS = Registry("optimizer")  # name -> function(live, course) -> number of steps
LIMIT = 100.0  # no coefficient of a fit that converges is near it


@dataclass(frozen=True)
class Step:
    """Where the fit stands: seen by `watch` before each update, and once at the end.

    `flat` is the live buffer, overwritten by the next step: clone it to keep it.
    """

    number: int
    loss: float | None  # nats, summed over tasks; None at the end, where no batch was drawn
    coeffs: Float[Tensor, "T G"]
    flat: Float[Tensor, " N"]


def validate_targets(problem: MergeProblem, targets: Sequence[Sequence[Answers]]) -> None:
    """Raise ValueError where targets are not one [A, V] per task and batch."""
    wanted = [[len(batch.weight) for batch in batches] for batches in problem.batches]
    given = [
        [len(one.log_probs if isinstance(one, TopKLogProbs) else one) for one in every]
        for every in targets
    ]
    if given != wanted:
        raise ValueError(
            f"targets must hold logits [A, V] for every task and batch: {wanted} rows by task and "
            f"batch, got {given}; `expert_logits(problem)` has the form"
        )


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
    ledger: FitCheckpoint

    def merge(self, live: MergedModel) -> Float[Tensor, "T G"]:
        """Merge, unless what is wanted of the model is known already and nobody watches."""
        if self.ledger.replaying and self.watch is None:
            return live.coefficients()
        return live.merge()

    def observe(self, live: MergedModel, number: int, loss: float | None, coeffs: Tensor) -> None:
        """Tell the watcher."""
        if self.watch is not None:
            self.watch(Step(number, loss, coeffs.detach().clone(), live.flat))


def sound(loss: float | None, coeffs: Float[Tensor, "T G"]) -> bool:
    """Whether the loss is finite, where there is one, and all coefficients are within LIMIT."""
    return math.isfinite(loss or 0.0) and bool(coeffs.detach().abs().max() <= LIMIT)


def require_sound(number: int, loss: float | None, coeffs: Tensor, advice: str) -> None:
    """Raise Diverged, saying what to do, where the loss or a coefficient ran off."""
    if not sound(loss, coeffs):
        raise Diverged(
            f"fit_coefficients: the loss is {loss} at step {number}, the largest coefficient "
            f"{coeffs.detach().abs().max():.3g}; {advice} or check the experts for extreme logits"
        )


# --- how the coefficients are found ---------------------------------------------------------------


def pulled(live: MergedModel, chosen: Sequence[int]) -> Entry:
    """The loss on the chosen batches, and its gradient in the coefficients."""
    loss = live.loss(chosen)
    loss.backward()
    return live.total(loss.item()), live.collect()


@OPTIMIZERS.register("adam", label="Adam")
def adam(live: MergedModel, course: Course, *, anneal: bool = False) -> int:
    """A step of Adam on one batch of every task at a time; returns the number of steps.

    anneal: the step size falls evenly, to nothing after the last step.
    """
    problem, raw = live.problem, live.coefficients.parameters()
    optimizer = torch.optim.Adam(raw, lr=course.lr)
    generator = torch.Generator().manual_seed(course.seed)
    steps = schedule([len(batches) for batches in problem.batches], course.epochs, generator)
    bar = tqdm(steps, "fitting", disable=not course.progress, leave=False)
    advice = f"lower lr (now {course.lr})"
    for number, chosen in enumerate(bar):
        if anneal:
            optimizer.param_groups[0]["lr"] = course.lr * (1 - number / len(steps))
        coeffs = course.merge(live)
        try:
            loss, gradient = course.ledger.next(partial(pulled, live, chosen))
        except Undefined as error:
            if number == 0:  # the start itself is undefined: nothing has diverged
                raise
            raise Diverged(f"fit_coefficients: at step {number} {error}; or {advice}") from error
        require_sound(number, loss, coeffs, advice)
        course.observe(live, number, loss, coeffs)
        optimizer.zero_grad()
        coeffs.backward(gradient.to(coeffs))
        optimizer.step()
    require_sound(len(steps), None, live.coefficients(), advice)
    return len(steps)


OPTIMIZERS.register("annealed_adam", label="Adam, annealed")(partial(adam, anneal=True))


def pulled_by_all(live: MergedModel) -> Entry:
    """The loss on all inputs and its gradient; NaN where the merged model gives no distribution."""
    try:
        return live.backward_all(), live.collect()
    except Undefined:
        return math.nan, torch.full_like(live.collect(), math.nan)


@OPTIMIZERS.register("lbfgs", label="L-BFGS")
def full_lbfgs(live: MergedModel, course: Course) -> int:
    """L-BFGS on all inputs at once, `course.epochs` passes over them at most.

    A point where the loss is not finite or a coefficient beyond LIMIT is one that the line search
    steps back from. Raises Diverged where the start is such a point, or all but the start are.
    """
    raw, passes, kept = live.coefficients.raw, 0, 0
    nowhere = torch.full_like(raw, math.nan)

    def evaluate(point: Tensor) -> tuple[float, Tensor]:
        nonlocal passes, kept
        raw.data.copy_(point)
        coeffs, loss = live.coefficients(), math.nan
        number, passes = passes, passes + 1
        bar.update()
        if sound(None, coeffs):  # beyond LIMIT a model may have no answers to ask for
            coeffs = course.merge(live)
            loss, gradient = course.ledger.next(partial(pulled_by_all, live))
        if number == 0:
            require_sound(0, loss, coeffs, "start elsewhere (init)")
        if not (sound(loss, coeffs) and gradient.isfinite().all()):
            return math.inf, nowhere
        kept += 1
        course.observe(live, number, loss, coeffs)
        return loss, torch.autograd.grad(coeffs, raw, gradient.to(coeffs))[0]

    with tqdm(total=course.epochs, desc="fitting", disable=not course.progress, leave=False) as bar:
        raw.data.copy_(lbfgs(evaluate, start=raw.detach().clone(), passes=course.epochs))
    if kept <= 1 < passes:
        raise Diverged(
            f"fit_coefficients: none of {passes - 1} steps from the start has a finite loss and "
            f"coefficients within {LIMIT:g}; start elsewhere (init), choose optimizer='adam' with "
            "a low lr, or check the experts for extreme logits"
        )
    return passes


@torch.no_grad()
def identity(
    problem: MergeProblem,
    coefficients: Coefficients,
    objective: Objective,
    targets: Sequence[Sequence[Answers]],
    settings: Mapping[str, object],
) -> dict[str, object]:
    """All that decides a fit, by name: settings as they are, tensors and code by digests.

    `model`, the forward pass with all that is in it besides the merged parameters (heads,
    precision), is told by the base's answers to one batch of every task.
    """
    vectors = problem.vectors
    answers = [
        problem.logits(vectors.base, task, batches[0])
        for task, batches in enumerate(problem.batches)
    ]
    return {
        **settings,
        "code": digest(package_digest(), code_of(OPTIMIZERS[settings["optimizer"]])),
        "torch": str(torch.__version__),
        "device": str(vectors.base.device),
        "tasks": list(vectors.tasks),
        "layout": digest(vectors.layout),
        "base": digest(vectors.base),
        "task vectors": digest(vectors.deltas),
        "grouping": digest(coefficients.segments),
        "link": code_of(coefficients.link),
        "start": digest(coefficients.raw),
        "inputs": digest(list(problem.batches)),
        "model": digest(answers),
        "objective": code_of(objective),
        "targets": digest(list(targets)),
    }


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

    targets: logits per task and batch, or TopKLogProbs, that replace the experts' own; None for
    these.
    optimizer: a name in OPTIMIZERS. `adam`, the paper's, sees one batch of every task per step;
    `annealed_adam` lets its step size fall to 0. `lbfgs` sees all inputs per step, finds its own
    step size, and keeps the best point: give it few inputs and 20 epochs or more. epochs: passes
    over the inputs, at least 1. lr: Adam's step size, above 0. gradients: `stream` takes every
    tensor's gradient as it comes and frees it; `buffer` keeps all N for one pass at the end (a
    problem on several devices always streams). checkpoint: a file that keeps what every pass
    through the model gave; a fit that was killed is called again with the same arguments, replays
    them, and ends at the same coefficients bit for bit (see `identity` for what tells fits apart).
    Raises ValueError for a checkpoint of another fit or on several devices, unknown names, values
    outside these ranges, a task without inputs, and targets that do not fit the batches; and
    Diverged where the loss stops being finite or a coefficient leaves [-LIMIT, LIMIT], with `lbfgs`
    at the start or at every other point.
    """
    check_fit(epochs, lr, gradients)
    problem.require_inputs("fit_coefficients")
    if checkpoint is not None and problem.spread:
        raise ValueError(
            "a fit on several devices keeps no checkpoint: leave it out; ranks that were killed "
            "between two writes would go on from different steps"
        )
    find = OPTIMIZERS[optimizer]
    targets = expert_logits(problem) if targets is None else targets
    validate_targets(problem, targets)
    settings = {"optimizer": optimizer, "epochs": epochs, "lr": lr, "seed": seed}
    settings |= {"gradients": gradients}
    known = identity(problem, coefficients, objective, targets, settings) if checkpoint else {}
    ledger = FitCheckpoint.open(checkpoint, known)
    live = MergedModel.of(problem, coefficients, objective, targets, gradients)
    course = Course(epochs, lr, seed, watch, progress, ledger)
    steps = find(live, course)
    ledger.save()
    course.observe(live, steps, None, live.merge())
    return live.flat
