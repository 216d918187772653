"""AdaMerging: coefficients that minimise the entropy of predictions on unlabelled inputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divmerge_core.divergences import entropy
from divmerge_core.merging.fit import Step
from divmerge_core.merging.problem import MergeProblem, Pairs
from divmerge_core.methods import METHODS
from divmerge_core.methods.divmerge import learn, with_defaults

SEARCH = (
    {},
    {"lr": 1e-2},
    {"lr": 3e-2},
    {"lr": 1e-2, "init": None},
    {"lr": 3e-2, "init": None},
    {"init": None},
)


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
    groupings=("task", "layer"),
    cite="yang2024",
    search=SEARCH,
)
def adamerging(
    problem: MergeProblem,
    *,
    basis: str = "raw",
    grouping: str = "layer",
    link: str = "identity",
    init: float | None = 0.3,
    inputs: int | None = None,
    optimizer: str = "adam",
    epochs: int = 4,
    lr: float = 1e-3,
    mean_logit: bool = False,
    dropout: bool = False,
    seed: int = 0,
    callback: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""Learn the coefficients that minimise the entropy of the merged model's predictions.

    $$
    \min_{\Lambda} \sum_{t=1}^{T} \mathbb{E}_{x \sim X_t}\, H\big(q_\Lambda(\cdot \mid x)\big),
    \qquad \theta(\Lambda)_n = \theta_{0,n} + \sum_{t=1}^{T} \lambda_{t,g(n)}\, \tau_{t,n}
    $$

    Idea: The error is unknown without labels, but accurate models are mostly confident. So the
    entropy $H$ of the predictions is minimised instead. The experts' predictions are not used.

    There is one coefficient per task and tensor (matrices, biases, norms and embeddings alike), or
    fewer by `grouping`. The entropy is taken per example and then averaged; dropout is off. Each
    step of Adam sees one batch of every task.

    `basis` as in `divmerge`. lr: published as 0.001. init: published as 0.3; None for 1/T. link:
    the paper has none; `clamp` cuts coefficients to [0, 1] as the authors' code does, `sigmoid` and
    `softmax` bound them smoothly. inputs: per task, None for DivMerge's 200, or 400 by layer.
    optimizer: published as `adam`; `lbfgs` as in `divmerge`. epochs: passes over the inputs, also
    DivMerge's, so that both methods see the same data as often. `mean_logit` and `dropout`
    reproduce public code, see below. callback: called with every step.

    Pitfalls: Predicting a single class also minimises entropy, most easily with few tasks or
    classes. A coefficient moves by about `lr` a step, so a short fit at the published one stays
    near task arithmetic. The published fits adapt on the very inputs that are scored later.

    Peers: The authors' code clamps coefficients to [0, 1] (`link="clamp"`) and takes two batches
    per task and step; FusionBench's configurations do neither, nor do the defaults here.
    FusionBench's versions for GPT-2 and Flan-T5 take the entropy of the batch's mean logits, which
    rewards one confident answer for all inputs: `mean_logit=True`. All its versions leave dropout
    on where the network has any: `dropout=True`. With neither, its layer-wise loop takes our steps.

    Raises ValueError for unknown names, values out of range, a task without inputs, a fit that
    diverges, and for dropout where the problem knows no module.

    Source: Yang et al. 2024, arXiv 2310.02575, Eq. 5.
    """
    problem.require_inputs("adamerging")
    noisy = with_dropout(problem, seed) if dropout else problem
    of_rows = entropy_of_mean_logit if mean_logit else entropy
    return learn(
        noisy,
        lambda expert, merged: of_rows(merged),
        basis=basis,
        grouping=grouping,
        link=link,
        init=init,
        inputs=inputs,
        optimizer=optimizer,
        epochs=epochs,
        lr=lr,
        seed=seed,
        callback=callback,
        progress=progress,
    )


@METHODS.register(
    "adamerging++",
    source="Yang et al. 2024",
    needs="unlabelled inputs",
    cost="gradients",
    cite="yang2024",
    search=SEARCH,
)
@with_defaults(adamerging, basis="ties:0.2")
def adamerging_plus_plus(problem: MergeProblem, **options: object) -> Float[Tensor, " N"]:
    r"""Run AdaMerging on task vectors without the entries that TIES drops.

    $$
    \hat\tau_{t,n} = k_{t,n}\, \mathbf{1}\Big[k_{t,n} \sum_{u=1}^{T} k_{u,n} > 0\Big], \qquad
    k_{t,n} = \tau_{t,n}\,
      \mathbf{1}\big[\, |\tau_{t,n}| \text{ is among the largest of } \tau_t \,\big]
    $$

    Idea: Small entries are mostly noise, and entries of the minority's sign cancel what other
    experts learned. Both are removed before the coefficients are fitted.

    Each task vector keeps its largest share of entries over the whole model, published as 0.2
    (`basis="ties:0.2"`), and of these the ones whose sign is that of their sum over tasks. They are
    not summed: every task keeps its own coefficients. All options are those of `adamerging`.

    Pitfalls: Those of `adamerging`. Signs are elected before any coefficient is known, so a task
    whose coefficient ends near 0 still votes.

    Peers: The authors' code, and FusionBench after it, cuts the share times N down to a whole
    number and keeps one entry more, where this rounds. Where the sum is exactly 0 it elects the
    sign that most coordinates have, where this keeps nothing.

    Raises ValueError unless the share is in (0, 1], and what `adamerging` raises.

    Source: Yang et al. 2024, arXiv 2310.02575.
    """
    problem.require_inputs("adamerging++")
    return adamerging(problem, **options)
