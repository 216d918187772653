"""Essential subspace merging: ESM, and ESM++ with a low-rank residual per expert."""

import re

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.layer_inputs import linear_layers
from divmerge_core.merging.problem import MergeProblem
from divmerge_core.methods import METHODS, essential
from divmerge_core.methods.spectral import orthogonalised

SCALINGS = tuple(
    {"scale": scale, "scaling": scaling}
    for scaling in ("all", "layer")
    for scale in (2.0, 1.0, 4.0)
)


@METHODS.register(
    "esm",
    source="Li et al. 2026",
    cite="li2026",
    needs="unlabelled inputs, and validation labels for the scale",
    cost="inputs",
    between=False,
    search=SCALINGS,
)
@torch.no_grad()
def esm(
    problem: MergeProblem,
    *,
    scale: float = 2.0,
    scaling: str = "all",
    power: float = 2.0,
    inputs: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, " N"]:
    r"""Join the experts' essential subspaces: the outputs that their changes move most.

    $$
    W = W_0 + \lambda\, \beta \operatorname{level}\big([P_1 \cdots P_T]\big)
    \operatorname{level}\begin{pmatrix} A_1 \\ \vdots \\ A_T \end{pmatrix}, \qquad
    A_t = P_t^\top D_t
    $$

    Idea: The effect of a change of weights is how it moves outputs on the task's own inputs. Each
    task keeps the few directions that carry this shift, and all are made orthogonal.

    For a linear layer [M, K], $P_t$ holds the M/T output directions along which $D_t$ moves the
    outputs most, each weighted by its energy to the power 0.15, as is its row of $A_t$; level sets
    all non-zero singular values to their mean. Other matrices (embeddings) are merged as by TSV-M;
    biases and other tensors take the mean delta; both without `scale`. `scaling`: `all` polarises
    tasks, input dimensions and layers ($\beta$), each by (norm / mean norm) to the `power`, 2 in
    the paper, as in the authors' vision code; `layer` polarises layers alone, as in their RoBERTa
    code. `scale` is $\lambda$: at `all` 2 alpha, with alpha searched in [0, 2] on validation
    labels, at `layer` searched in [0, 5]. `inputs`: per task, in drawn batches; 32 published.

    Pitfalls: The result has equal singular values, so one expert alone does not come back. Few
    layers of a kind make power 2 fragile: try 0 or 1. With fewer tokens than M/T, directions that
    no input excites are left out, of all means too.

    Peers: The paper's formula has no level, and so no magnitude but alpha; this is the authors'
    code. Their code fills a basis of too few tokens with unit vectors that are not orthogonal to
    the rest; the vision code merges the attention's output projection as by TSV-M, and the RoBERTa
    code applies alpha to every tensor, shrinks the embeddings' change and leaves biases out.

    Raises ValueError for options out of range, tasks without inputs and problems without a module.

    Source: Li et al. 2026 (arXiv 2602.20208) and its code.
    """
    essential.check_essential("esm", problem, scale, scaling, power, inputs)
    layout = problem.vectors.layout
    deltas = [layout.unflatten(row) for row in dense(problem.vectors.deltas)]
    few = essential.subsampled(problem, inputs, seed)
    merged = essential.essential_matrices(few, deltas, scaling, power, progress)
    flat = problem.vectors.base.clone()
    for name, leaf in layout.unflatten(flat).items():
        every = torch.stack([delta[name] for delta in deltas])
        if name in merged:
            leaf += scale * merged[name]
        else:
            leaf += orthogonalised(every) if leaf.ndim == 2 else every.mean(dim=0)
    return flat


@METHODS.register(
    "esm_pp",
    source="Li et al. 2026",
    cite="li2026,li2026essential",
    needs="unlabelled inputs, and validation labels for the scale",
    cost="inputs",
    returns="predictor",
    search=SCALINGS,
)
@torch.no_grad()
def esm_pp(
    problem: MergeProblem,
    *,
    rank: int = 32,
    layers: str = "",
    scale: float = 2.0,
    scaling: str = "all",
    power: float = 2.0,
    inputs: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> essential.RoutedModel:
    r"""ESM plus, layer by layer, a low-rank residual of the expert with the most similar inputs.

    $$
    y = W_{\mathrm{ESM}}\, x + B_{t^*} A_{t^*} x, \qquad
    t^* = \operatorname*{arg\,max}_{t} \cos(\bar x, m_t), \qquad
    B_t A_t \approx W_t - W_{\mathrm{ESM}}
    $$

    Idea: On an expert's own inputs, the difference of expert and merge has low rank. Each layer
    stores this residual for every task, and each input uses that of the most similar task.

    $B_t$ holds the `rank` output directions that the residual of expert and ESM moves most on the
    expert's inputs, $m_t$ is the task's mean layer input, and $\bar x$ the mean over an input's own
    tokens, padding left out. Every layer chooses for itself; the task number is not looked at.
    Biases and embeddings stay ESM's. `rank`: 32 in the paper. `layers`: a regular expression for
    the weights that get such a way; the empty one takes all linear layers. Others are `esm`'s.

    Pitfalls: It returns a predictor, which stores rank (M + K) more numbers per layer and task.
    Tasks of similar texts have similar means, and then inputs go to a wrong expert.

    Peers: The authors' vision code takes the attention's input projections and the first map of
    each MLP alone. Their RoBERTa code takes all layers, but adds whole deltas of rank M/T to the
    base, and lets a whole batch vote for one expert.

    Raises ValueError as `esm` does, for a rank below 1, and where `layers` matches none.

    Source: Li et al. 2026 (arXiv 2602.20208 and 2606.19164) and their code.
    """
    essential.check_essential("esm_pp", problem, scale, scaling, power, inputs)
    names = [name for name in linear_layers(problem) if re.search(layers, name)]
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}; the paper uses 32")
    if not names:
        known = ", ".join(linear_layers(problem)) or "the nn.Linear layers: the model has none"
        raise ValueError(f"layers={layers!r} matches none of {known}; '' takes all")
    same = {"scaling": scaling, "power": power, "inputs": inputs, "seed": seed}
    flat = esm(problem, scale=scale, progress=progress, **same)
    few = essential.subsampled(problem, inputs, seed)
    return essential.RoutedModel(problem, flat, essential.residual_detours(few, flat, names, rank))
