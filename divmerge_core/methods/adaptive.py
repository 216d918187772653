"""Methods that learn from unlabelled inputs without asking the experts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divmerge_core.divergences import entropy
from divmerge_core.linalg import elected
from divmerge_core.methods import METHODS
from divmerge_core.methods.divmerge import learn
from divmerge_core.problem import MergeProblem, Pairs, Step


def entropy_of_mean_logit(merged: Float[Tensor, "A V"]) -> Float[Tensor, " A"]:
    """One entropy for the whole batch, of its mean logits: repeated for each of the A rows."""
    return entropy(merged.mean(dim=0, keepdim=True)).expand(len(merged))


@contextmanager
def training(module: nn.Module) -> Iterator[None]:
    """Training mode for a while; every part goes back to the mode that it had."""
    before = {part: part.training for part in module.modules()}
    module.train()
    try:
        yield
    finally:
        for part, mode in before.items():
            part.training = mode


def with_dropout(problem: MergeProblem, seed: int) -> MergeProblem:
    """The problem with dropout on in `forward`, which draws from the seed and from nothing else.

    Raises ValueError where the problem knows no module to switch.
    """
    module, device = problem.module, problem.vectors.base.device
    if module is None:
        raise ValueError("dropout=True needs the network to switch: give MergeProblem its `module`")
    generator = torch.Generator().manual_seed(seed)

    def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
        drawn = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng([device] if device.type == "cuda" else []), training(module):
            torch.manual_seed(drawn)
            return problem.forward(parameters, pairs)

    return replace(problem, forward=forward)


@METHODS.register(
    "adamerging",
    source="Yang et al. 2024",
    needs="unlabelled inputs",
    cost="gradients",
    symmetric=True,
    search=({}, {"lr": 1e-2, "init": None}),
)
def adamerging(
    problem: MergeProblem,
    *,
    grouping: str = "layer",
    link: str = "identity",
    init: float | None = 0.3,
    inputs: int | None = None,
    epochs: int = 4,
    lr: float = 1e-3,
    mean_logit: bool = False,
    dropout: bool = False,
    seed: int = 0,
    watch: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Minimise the merged model's entropy over the coefficients (arXiv 2310.02575, Eq. 5).

    One coefficient per task and tensor, be it weight, bias or embedding, or coarser ones (see
    GROUPINGS). The entropy is taken per example and then averaged; dropout is off. Defaults for
    step size and initial value are the authors'; inputs and epochs are those of DivMerge, so that
    both see the same data for the same number of steps.

    Public code differs. The authors' clamps coefficients to [0, 1]; FusionBench's configurations do
    not, nor is it done here. FusionBench's versions for GPT-2 and Flan-T5 take the entropy of the
    batch's mean logits, which rewards one confident answer for all inputs: `mean_logit`. All its
    versions leave dropout on during the fit where the network has any: `dropout`. Both options are
    there to show what that changes. Entropy may fall by answering one class always, most of all
    with few tasks or answers.

    Raises ValueError for unknown names, values out of range, a task without inputs, a loss that
    stops being finite, and for dropout where the problem knows no module.
    """
    problem.require_inputs("adamerging")
    noisy = with_dropout(problem, seed) if dropout else problem
    of_rows = entropy_of_mean_logit if mean_logit else entropy
    return learn(
        noisy,
        lambda expert, merged: of_rows(merged),
        grouping=grouping,
        link=link,
        init=init,
        inputs=inputs,
        epochs=epochs,
        lr=lr,
        seed=seed,
        watch=watch,
        progress=progress,
    )


@METHODS.register(
    "adamerging++",
    source="Yang et al. 2024",
    needs="unlabelled inputs",
    cost="gradients",
    symmetric=True,
    search=({}, {"lr": 1e-2, "init": None}),
)
def adamerging_plus_plus(
    problem: MergeProblem,
    *,
    keep: float = 0.2,
    grouping: str = "layer",
    link: str = "identity",
    init: float | None = 0.3,
    inputs: int | None = None,
    epochs: int = 4,
    lr: float = 1e-3,
    mean_logit: bool = False,
    dropout: bool = False,
    seed: int = 0,
    watch: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """AdaMerging of task vectors without what TIES would drop (arXiv 2310.02575).

    Each task vector keeps its largest `keep` share of entries over the whole model, and of these
    the ones whose sign is that of their sum over tasks. They are not summed: every task keeps its
    coefficients, and the fit is that of `adamerging`, with the same options.

    FusionBench, after the authors' code, cuts keep times N down to a whole number and keeps one
    entry more, where we round; and where the sum is exactly 0 it elects the sign of the majority of
    coordinates, where we keep nothing. Raises ValueError unless keep is in (0, 1], and what
    `adamerging` raises.
    """
    problem.require_inputs("adamerging++")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}; 0.2 keeps the largest fifth")
    vectors = problem.vectors.map(lambda deltas: elected(deltas, keep))
    return adamerging(
        replace(problem, vectors=vectors),
        grouping=grouping,
        link=link,
        init=init,
        inputs=inputs,
        epochs=epochs,
        lr=lr,
        mean_logit=mean_logit,
        dropout=dropout,
        seed=seed,
        watch=watch,
        progress=progress,
    )
