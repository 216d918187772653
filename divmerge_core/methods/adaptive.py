"""Methods that learn from unlabelled inputs without asking the experts."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from divmerge_core.divergences import entropy
from divmerge_core.methods import METHODS
from divmerge_core.methods.divmerge import learn
from divmerge_core.problem import MergeProblem, Step


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
    seed: int = 0,
    watch: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    """Minimise the merged model's entropy over the coefficients (arXiv 2310.02575, Eq. 5).

    The entropy is taken per example and then averaged; dropout is off. Defaults for step size and
    initial value are the authors'; inputs and epochs are those of DivMerge, so that both see the
    same data for the same number of steps.
    """
    return learn(
        problem,
        lambda expert, merged: entropy(merged),
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
