"""Implementations of the merge and of the divergence: this package, plain PyTorch, and peers.

Peers are optional packages; each is called as its own documentation calls it.
"""

import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from divmerge_core.kernels.divergence import divergence_and_gradient
from divmerge_core.kernels.merge import grouped_inner, grouped_merge
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.coefficients import groups_of
from divmerge_core.merging.task_vectors import Layout, TaskVectors
from divmerge_core.registry import Registry

# name -> function(Case) -> (forward, backward or None)
IMPLEMENTATIONS = Registry("implementation")
# name -> function(expert, merged logits) -> a call that gives the gradient in the merged logits
DIVERGENCE_IMPLEMENTATIONS = Registry("divergence implementation")
Part = Callable[[], object]
Built = tuple[Tensor, Callable[[], Mapping[str, Tensor]]]  # coefficients, and a merge by them


@dataclass(frozen=True)
class Case:
    """A model to merge, one coefficient per task and tensor, and a gradient to carry back."""

    vectors: TaskVectors
    coeffs: Tensor  # [T, G]
    segments: Segments
    grad: Tensor  # [N]

    @classmethod
    def random(
        cls, layout: Layout, num_tasks: int, *, dtype: torch.dtype = torch.float32, device="cpu"
    ) -> "Case":
        """Task vectors of this dtype and everything else in float32, drawn at random."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        deltas = torch.stack([normal(layout.size).to(dtype) for _ in range(num_tasks)])
        tasks = tuple(f"task{n}" for n in range(num_tasks))
        return cls.of(TaskVectors(layout, tasks, normal(layout.size), deltas))

    @classmethod
    def of(cls, vectors: TaskVectors) -> "Case":
        """These task vectors, with coefficients and a gradient drawn at random."""
        generator = torch.Generator(vectors.base.device).manual_seed(1)
        like = {"generator": generator, "device": vectors.base.device}
        segments = Segments.of(vectors.layout.bounds, groups_of(vectors.layout, "layer")[1])
        coeffs = torch.randn(len(vectors.tasks), segments.num_groups, **like)
        return cls(vectors, coeffs, segments, torch.randn(vectors.layout.size, **like))


def stack_of_layers(num_parameters: int, num_layers: int = 6) -> Layout:
    """The tensors of a transformer's layers, with a width that gives about this many parameters."""
    width = max(8, round((num_parameters / (12 * num_layers)) ** 0.5))
    square, shapes = ("query", "key", "value", "output"), {}
    for layer in range(num_layers):
        shapes |= {f"{layer}.{name}.weight": (width, width) for name in square}
        shapes |= {f"{layer}.up.weight": (4 * width, width)}
        shapes |= {f"{layer}.down.weight": (width, 4 * width)}
        shapes |= {f"{layer}.{name}.bias": (width,) for name in (*square, "down", "norm")}
    return Layout(tuple(shapes), tuple(shapes.values()))


@IMPLEMENTATIONS.register("ours", label="divmerge_core")
def ours(case: Case) -> tuple[Part, Part]:
    """This package, on the backend that `auto` takes."""
    vectors = case.vectors
    rest = {"out": torch.empty_like(vectors.base), "validate": False}
    return (
        lambda: grouped_merge(vectors.base, vectors.deltas, case.coeffs, case.segments, **rest),
        lambda: grouped_inner(case.grad, vectors.deltas, case.segments),
    )


def dictionary_merge(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], coeffs: Tensor
) -> dict[str, Tensor]:
    """The merge tensor by tensor, task by task, inside autograd: the usual way."""
    merged = {}
    for group, (name, tensor) in enumerate(base.items()):
        for row, expert in zip(coeffs, experts, strict=True):
            tensor = tensor + row[group] * expert[name]
        merged[name] = tensor
    return merged


def usual(vectors: TaskVectors, coeffs: Tensor, merge: Callable = dictionary_merge) -> Built:
    """The usual merge of these task vectors."""
    leaf = coeffs.clone().requires_grad_()
    base, *experts = map(vectors.layout.unflatten, (vectors.base, *vectors.deltas))
    return leaf, lambda: merge(base, experts, leaf)


def layer_wise_model(vectors: TaskVectors, coeffs: Tensor) -> Built:
    """FusionBench's LayerWiseMergedModel, its coefficients unclamped."""
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel

    models = []
    for flat in (vectors.base, *map(vectors.expert, vectors.tasks)):
        models.append(nn.Module())
        for name, tensor in vectors.layout.unflatten(flat).items():
            parameter = nn.Parameter(tensor.clone())
            models[-1].register_parameter(name.replace(".", "_"), parameter)
    model = LayerWiseMergedModel(coeffs.clone(), models[0], models[1:], clamp_weights=False)
    names = vectors.layout.names
    return model.merge_weight, lambda: dict(zip(names, model.merge_weights().values(), strict=True))


def through_autograd(case: Case, built: Built, passes: int = 1) -> tuple[Part, Part]:
    """Forward builds a graph from coefficients to tensors; backward goes through it."""
    grads, (leaf, merge) = list(case.vectors.layout.unflatten(case.grad).values()), built
    held: list[Tensor] = []

    def forward() -> list[Tensor]:
        held[:] = merge().values()
        return held

    def backward() -> Tensor:
        over = held or forward()
        for _ in range(passes):
            (result,) = torch.autograd.grad(over, leaf, grads, retain_graph=True)
        return result

    return forward, backward


IMPLEMENTATIONS.register("dictionary", label="dictionary, autograd")(
    lambda case: through_autograd(case, usual(case.vectors, case.coeffs))
)


@IMPLEMENTATIONS.register("compiled", label="dictionary, torch.compile")
def compiled(case: Case) -> tuple[Part, Part]:
    """The usual merge as one compiled graph."""
    merge = torch.compile(dictionary_merge, dynamic=False)
    return through_autograd(case, usual(case.vectors, case.coeffs, merge))


@IMPLEMENTATIONS.register("fusion_bench", label="FusionBench", package="fusion-bench")
def fusion_bench(case: Case) -> tuple[Part, Part]:
    """LayerWiseMergedModel; backward once per task, as its AdaMerging loop does."""
    built = layer_wise_model(case.vectors, case.coeffs)
    return through_autograd(case, built, len(case.vectors.tasks))


@IMPLEMENTATIONS.register("mergekit", label="mergekit, in memory", package="mergekit")
def mergekit(case: Case) -> tuple[Part, None]:
    """Task arithmetic with a coefficient per task; it has no gradient."""
    from mergekit.merge_methods.api import merge_state_dicts

    vectors = case.vectors
    flats = (vectors.base, *map(vectors.expert, vectors.tasks))
    states = [*map(vectors.layout.unflatten, flats)]
    options = {"parameters": {"weight": case.coeffs[:, 0].tolist()}, "base": 0}
    return lambda: merge_state_dicts(states, "task_arithmetic", **options), None


def gradient_of(loss: Callable[[Tensor], Tensor], merged: Tensor) -> Tensor:
    """The gradient of a loss per row, summed over rows."""
    leaf = merged.detach().requires_grad_()
    loss(leaf).sum().backward()
    return leaf.grad


DIVERGENCE_IMPLEMENTATIONS.register("ours", label="divmerge_core, fused")(
    lambda expert, merged: lambda: divergence_and_gradient(expert, merged, "js")[1]
)


def textbook_js(expert: Tensor, merged: Tensor) -> Tensor:
    """JS of every row by its formula."""
    log_p, log_q = torch.log_softmax(expert, -1), torch.log_softmax(merged, -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1) / 2


DIVERGENCE_IMPLEMENTATIONS.register("plain", label="definition, autograd")(
    lambda expert, merged: lambda: gradient_of(partial(textbook_js, expert), merged)
)


@DIVERGENCE_IMPLEMENTATIONS.register("compiled", label="definition, torch.compile", gpu=True)
def compiled_js(expert: Tensor, merged: Tensor) -> Part:
    """The formula and its gradient as compiled graphs."""
    loss = torch.compile(textbook_js, dynamic=False)
    return lambda: gradient_of(partial(loss, expert), merged)


@DIVERGENCE_IMPLEMENTATIONS.register("liger", label="Liger", package="liger-kernel", gpu=True)
def liger_js(expert: Tensor, merged: Tensor) -> Part:
    """LigerJSD, which takes log-probabilities."""
    from liger_kernel.transformers import LigerJSD

    module = LigerJSD()

    def loss(x: Tensor) -> Tensor:
        return module(torch.log_softmax(x, -1), torch.log_softmax(expert, -1)) * len(x)

    return lambda: gradient_of(loss, merged)


def versions() -> dict[str, str]:
    """Versions of the peers that are installed, and of Triton."""
    facts, found = {**IMPLEMENTATIONS.facts, **DIVERGENCE_IMPLEMENTATIONS.facts}.values(), {}
    for package in (*(fact["package"] for fact in facts if "package" in fact), "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def measurable(
    registry: Registry, device: str, names: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Which of these implementations (of all, where none is named) can run; why others cannot."""
    found = {name: missing(registry, name, device) for name in names or registry}
    able = [name for name, reason in found.items() if not reason]
    return able, {name: reason for name, reason in found.items() if reason}


def missing(registry: Registry, name: str, device: str = "cpu") -> str | None:
    """Why an implementation of a registry cannot run on a device; None if it can."""
    package, gpu = (registry.facts[name].get(fact) for fact in ("package", "gpu"))
    try:
        importlib.metadata.version(package or "torch")
    except importlib.metadata.PackageNotFoundError:
        return f"the package {package} is not installed"
    return "its kernels need a GPU" if gpu and device == "cpu" else None
