"""Models that are merged for every input, and the routers that choose the weights."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divmerge_core.kernels.delta_storage import dense
from divmerge_core.merging.coefficients import GROUPINGS
from divmerge_core.merging.layer_inputs import linear_layers
from divmerge_core.merging.linalg import matrices, truncated
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.methods.forward import hooked, module_output, over_tokens, rows

ATTENTION = re.compile("attn|attention", re.IGNORECASE)


class Router(nn.Module):
    """r(h): from a hidden state to one weight per expert, by `layers` matrices with ReLU between.

    Without a matrix it is the constant `start`. Matrices start at N(0, 0.01^2), biases at 0 and
    the last one at `start`, so that an untrained router returns about `start` for every expert.
    """

    def __init__(
        self,
        width: int,
        num_tasks: int,
        *,
        layers: int,
        start: float,
        generator: torch.Generator,
        like: Tensor,
    ):
        super().__init__()
        sizes = [width] * layers + [num_tasks]
        drawn = [
            0.01 * torch.randn(out, into, generator=generator) for into, out in pairwise(sizes)
        ]
        biases = [like.new_zeros(width) for _ in drawn[1:]] + [like.new_full((num_tasks,), start)]
        self.matrices = nn.ParameterList(matrix.to(like) for matrix in drawn)
        self.biases = nn.ParameterList(biases)

    def forward(self, hidden: Float[Tensor, "*A d"]) -> Float[Tensor, "*A T"]:
        if not len(self.matrices):
            return self.biases[0].expand(*hidden.shape[:-1], -1)
        for number, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            hidden = nn.functional.linear(hidden.relu() if number else hidden, matrix, bias)
        return hidden

    @property
    def nbytes(self) -> int:
        """Bytes of matrices and biases."""
        return sum(parameter.nbytes for parameter in self.parameters())


@dataclass(frozen=True)
class Mixture:
    """A merged model whose MLPs are merged separately for every input.

    flat holds the base's MLPs and task arithmetic elsewhere. mlps: the linear layers of each block
    by name, the first of them the first to run. deltas: of each such layer's weight [T, M, K] and
    bias [T, M] (None without one). routers: one per block.
    """

    problem: MergeProblem
    flat: Float[Tensor, " N"]
    mlps: Mapping[str, list[str]]
    deltas: Mapping[str, tuple[Tensor, Tensor | None]]
    routers: Mapping[str, Router]

    @property
    def nbytes(self) -> int:
        """Bytes to be stored: the model, every expert's deltas of the MLPs, and the routers."""
        parts = [part for pair in self.deltas.values() for part in pair if part is not None]
        return sum(part.nbytes for part in (self.flat, *parts, *self.routers.values()))

    def logits(self, task: int, batch: Batch) -> Float[Tensor, "A V"]:
        """Every input with weights of its own, whatever else is in its batch."""
        return self.answers(task, batch)

    def answers(self, task: int, batch: Batch, *, reduce: bool = False) -> Float[Tensor, "A V"]:
        """Logits; reduce: one set of weights for all inputs, the mean over the batch."""
        weights: dict[str, Tensor] = {}

        def route(block: str, name: str) -> Callable:
            def add(layer: nn.Module, given: tuple, kwargs: dict, output: Tensor) -> Tensor:
                if name == self.mlps[block][0]:
                    chosen = over_tokens(self.routers[block](given[0]), batch)  # [B, T]
                    weights[block] = chosen.mean(0, keepdim=True) if reduce else chosen
                return output + self.experts_share(name, given[0], weights[block])

            return add

        layers = linear_layers(self.problem)
        parts = self.mlps.items()
        with hooked({layers[n]: route(block, n) for block, names in parts for n in names}):
            return self.problem.logits(self.flat, task, batch)

    def experts_share(self, name: str, x: Tensor, weights: Float[Tensor, "B T"]) -> Tensor:
        """sum_t w_t (D_t x + d_t): what the experts' deltas add to a layer's output.

        A layer is linear in its weights, so this is the layer of merged weights, exactly.
        """
        matrix, bias = self.deltas[name]
        biases = [None] * len(matrix) if bias is None else bias
        shape = (-1,) + (1,) * (x.ndim - 1)
        return sum(
            weight.view(shape) * nn.functional.linear(x, *delta)
            for weight, *delta in zip(weights.T, matrix, biases, strict=True)
        )


def mlps(problem: MergeProblem) -> dict[str, list[str]]:
    """The linear layers outside attention of every numbered block, by block, in module order.

    Raises ValueError where there are none.
    """
    found: dict[str, list[str]] = {}
    for name in linear_layers(problem):
        block = GROUPINGS["block"](name)  # a dot in it: a numbered block
        if "." in block and not ATTENTION.search(name.removeprefix(block)):
            found.setdefault(block, []).append(name)
    if not found:
        raise ValueError(
            "wemoe found no MLP to route: it needs nn.Linear layers in numbered blocks "
            "(`encoder.layer.0. ...`) outside attention; merge this model by another method"
        )
    return found


def untrained(
    problem: MergeProblem, mlps: Mapping[str, list[str]], scale: float, layers: int, seed: int
) -> Mixture:
    """Task arithmetic outside the MLPs, and for each a router that returns `scale` throughout."""
    vectors, routed = problem.vectors, {}
    flat = vectors.merge([scale] * len(vectors.tasks))
    places = {
        name: (slice(*bounds), shape)
        for name, shape, bounds in zip(
            vectors.layout.names, vectors.layout.shapes, vectors.layout.bounds, strict=True
        )
    }
    deltas = dense(vectors.deltas)

    def take(name: str) -> Tensor | None:
        if name not in places:
            return None
        here, shape = places[name]
        flat[here] = vectors.base[here]
        return deltas[:, here].view(-1, *shape).to(flat.dtype)

    for names in mlps.values():
        for name in names:
            routed[name] = take(name), take(f"{name.removesuffix('weight')}bias")
    generator = torch.Generator().manual_seed(seed)
    routers = {
        block: Router(
            routed[names[0]][0].shape[-1],
            len(vectors.tasks),
            layers=layers,
            start=scale,
            generator=generator,
            like=flat,
        )
        for block, names in mlps.items()
    }
    return Mixture(problem, flat, mlps, routed, routers)


def kept_rank(shape: tuple[int, ...], keep: float) -> int:
    """`keep` times the full rank of a matrix of this shape, at least 1."""
    return max(1, int(keep * min(shape)))


def compressed(delta: Float[Tensor, " N"], layout: Layout, keep: float) -> Float[Tensor, " N"]:
    """Every matrix at its best approximation of rank `kept_rank`; all else as it is."""
    result = delta.clone()
    for _, here, shape in matrices(layout):
        left, values, right = truncated(delta[here].view(shape), kept_rank(shape, keep))
        result[here] = ((left * values) @ right).flatten()
    return result


AT_ONCE = 4  # merged models that Twins holds at a time


@dataclass(frozen=True)
class Twins:
    """A shared model, and a compressed rest of every expert that a router adds for every input.

    The router reads `features` less `mean`, over `spread`. keep: the share of full rank that the
    matrices of the rests have.
    """

    problem: MergeProblem
    shared: Float[Tensor, " N"]
    rests: Float[Tensor, "T N"]
    router: Router
    mean: Float[Tensor, " d"]
    spread: Float[Tensor, " d"]
    keep: float

    @property
    def nbytes(self) -> int:
        """Bytes to be stored: the shared model, the rests, and the router with what it reads.

        Matrices of the rests count as two factors of their rank, where these take less.
        """
        numbers = 0  # of one rest
        for shape in self.problem.vectors.layout.shapes:
            whole = math.prod(shape)
            factors = kept_rank(shape, self.keep) * sum(shape) if len(shape) == 2 else whole
            numbers += min(whole, factors)
        parts = (self.shared, self.router, self.mean, self.spread)
        rests = len(self.rests) * numbers * self.rests.element_size()
        return rests + sum(part.nbytes for part in parts)

    def weights(self, task: int, batch: Batch) -> Float[Tensor, "B T"]:
        """How much of each expert every input gets: at least 0, with sum 1."""
        hidden = features(self.problem, self.shared, task, batch)
        return self.router((hidden - self.mean) / self.spread).softmax(-1)

    def logits(self, task: int, batch: Batch) -> Float[Tensor, "A V"]:
        """One merged model, and one forward pass, per input."""
        weights, singles, parts = self.weights(task, batch), list(rows(batch)), []
        for start in range(0, len(singles), AT_ONCE):  # a few models per pass over the rests
            chosen = slice(start, start + AT_ONCE)
            models = torch.addmm(self.shared, weights[chosen], self.rests)
            for flat, row in zip(models, singles[chosen], strict=True):
                parts.append(self.problem.logits(flat, task, row))
        return torch.cat(parts)


def features(
    problem: MergeProblem, flat: Float[Tensor, " N"], task: int, batch: Batch
) -> Float[Tensor, "B d"]:
    """What the module returns (its last hidden state where it names one), mean over tokens."""
    return over_tokens(module_output(problem, flat, task, batch), batch).to(flat.dtype)
