"""Representation surgery: a low-rank correction of the merged model's output for each task."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from divmerge_core.merging.fit import LIMIT
from divmerge_core.merging.layer_inputs import require_module
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.methods import METHODS
from divmerge_core.methods.checks import check_finite, check_size, require_positive
from divmerge_core.methods.divmerge import limit
from divmerge_core.methods.forward import hooked, module_output, over_tokens


def representation(output: object, batch: Batch) -> Float[Tensor, "B D"]:
    """One vector per input: the module's output, or the mean of its last layer's tokens.

    Padding is left out. Raises ValueError for other outputs, and for a language model, whose
    answers have a vector per token.
    """
    hidden = getattr(output, "last_hidden_state", output)
    if not isinstance(hidden, Tensor) or hidden.ndim not in (2, 3) or batch.answer is not None:
        raise ValueError(
            "surgery corrects one vector per input: the problem's module must put out [B, D], or "
            f"have a last_hidden_state [B, S, D]; got {type(output).__name__}"
            + (" of a language model" if batch.answer is not None else "")
        )
    return over_tokens(hidden, batch)


@dataclass(frozen=True)
class Correction:
    """What is subtracted from a task's merged representations z: up relu(down z)."""

    down: Float[Tensor, "r D"]
    up: Float[Tensor, "D r"]

    def __call__(self, z: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        return torch.relu(z.to(self.down) @ self.down.T) @ self.up.T


@dataclass(frozen=True)
class Corrected:
    """A merged model with a correction per task: a Predictor."""

    problem: MergeProblem
    flat: Float[Tensor, " N"]
    corrections: tuple[Correction, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to be stored: the merged parameters and every task's correction."""
        return self.flat.nbytes + sum(c.down.nbytes + c.up.nbytes for c in self.corrections)

    def logits(self, task: int, batch: Batch) -> Float[Tensor, "A V"]:
        """The merged model's logits after the task's correction of its representation.

        The mean over tokens moves by what every token moves by: so they all take the same.
        """

        def correct(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
            hidden = getattr(output, "last_hidden_state", output)
            off = self.corrections[task](representation(output, batch))
            moved = hidden - (off if hidden.ndim == 2 else off[:, None])
            return moved if hidden is output else replace(output, last_hidden_state=moved)

        with hooked({self.problem.module: correct}):
            return self.problem.logits(self.flat, task, batch)


@torch.no_grad()
def representations(
    problem: MergeProblem, flat: Float[Tensor, " N"], task: int
) -> Float[Tensor, "n D"]:
    """Representations of all the task's inputs in a model with parameters `flat`.

    Raises ValueError where the problem's module does not run, or puts out something else.
    """
    batches = problem.batches[task]
    found = [representation(module_output(problem, flat, task, b), b).to(flat) for b in batches]
    return torch.cat(found)


def fit_correction(
    merged: Float[Tensor, "n D"],
    expert: Float[Tensor, "n D"],
    *,
    rank: int,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: bool,
) -> Correction:
    """The correction that brings merged representations nearest to the expert's, in mean L1."""
    generator = torch.Generator().manual_seed(seed)
    size, width = merged.shape
    drawn = torch.rand(rank, width, generator=generator, dtype=torch.float64)
    down = ((2 * drawn - 1) / width**0.5).to(merged).requires_grad_()
    up = merged.new_zeros(width, rank).requires_grad_()
    adam = torch.optim.Adam([down, up], lr=lr)
    order = torch.randperm(size, generator=generator)
    bound = LIMIT * float(merged.abs().mean() + expert.abs().mean())
    for number in tqdm(range(steps), "correcting", disable=not progress, leave=False):
        if len(order) == 0:
            order = torch.randperm(size, generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        loss = (merged[rows] - Correction(down, up)(merged[rows]) - expert[rows]).abs().mean()
        check_finite("surgery", loss, number, lr)
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            taken = Correction(down, up)(merged[rows]).abs().mean()
        check_size("surgery", "a correction's mean entry", taken, bound, number, lr)
    return Correction(down.detach(), up.detach())


@METHODS.register(
    "surgery",
    source="Yang et al. 2024, Representation Surgery",
    needs="unlabelled inputs",
    cost="inputs",
    returns="predictor",
    cite="yang2024surgery",
    search=(
        {},
        {"merge": "adamerging/layer"},
        {"merge": "average"},
        {"rank": 64},
        {"lr": 1e-2},
        {"merge": "adamerging/layer", "lr": 1e-2},
    ),
)
def surgery(
    problem: MergeProblem,
    *,
    merge: str = "task_arithmetic",
    rank: int = 16,
    inputs: int | None = None,
    steps: int = 1000,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> Corrected:
    r"""Correct a merged model's representation of each task's inputs without changing its weights.

    $$
    z' = z - U_t\, \mathrm{relu}(V_t\, z), \qquad
    \min_{U_t, V_t}\; \mathbb{E}_{x \sim X_t} \big\lVert z'(x) - z_t(x) \big\rVert_1
    $$

    Idea: Merging shifts the encoder's outputs away from those that a task's head was trained on. A
    small map per task removes this shift.

    The representation z is what the problem's module puts out for an input, before the task's head:
    the mean over tokens where it puts out tokens, as the packaged heads read it. $V_t$ (`down`,
    [rank, D]) and $U_t$ (`up`, [D, rank]) are fitted by Adam to the expert's own representation
    $z_t$; `up` starts at 0, so that the first step starts at the merge. No merged weight changes.

    merge: a method that gives one vector, such as `adamerging/layer`, with its default options.
    rank: of $U_t V_t$, published as 16. `steps`, `batch_size` and `lr`: published as 1000, 16 and
    0.001 (the authors' 500 iterations take two batches each). inputs: per task, None for DivMerge's
    200, where the paper takes the test set.

    Pitfalls: Answering needs the task, so compare it with methods that need it too. A low-rank
    correction cannot recover information that the merged encoder has lost. A language model has no
    one vector per input and is refused.

    Peers: FusionBench takes the same steps with the same loss. It draws every task's `down` anew,
    where here all tasks start from one draw, so that their order is immaterial.

    Raises ValueError for a method that returns a predictor or asks for a score, values out of
    range, a task without inputs and a module that does not fit; Diverged for a loss that stops
    being finite and a correction 100 times as large as what it corrects.

    Source: Yang et al. 2024, arXiv 2402.02705.
    """
    from divmerge_core.methods import options_of, parse  # there only after every method's module

    name, grouping = parse(merge)
    facts = METHODS.facts[name]
    if facts.get("returns") == "predictor" or facts["needs"] == "a validation score":
        raise ValueError(
            f"merge must be a method that gives one vector and asks for no score, got {merge!r}; "
            "task_arithmetic or adamerging/layer do"
        )
    require_positive(rank=rank, steps=steps, batch_size=batch_size, lr=lr)
    problem.require_inputs("surgery")
    require_module(problem, "surgery")
    seen = limit(problem, inputs, "task")
    tasks = enumerate(problem.vectors.tasks)
    experts = [representations(seen, problem.vectors.expert(task), n) for n, task in tasks]
    common = {"seed": seed, "progress": progress}
    options = {key: value for key, value in common.items() if key in options_of(name)}
    flat = METHODS[name](problem, **grouping, **options)
    fit = {"rank": rank, "steps": steps, "batch_size": batch_size, "lr": lr, **common}
    corrections = [
        fit_correction(representations(seen, flat, number), expert, **fit)
        for number, expert in enumerate(experts)
    ]
    return Corrected(problem, flat, tuple(corrections))
