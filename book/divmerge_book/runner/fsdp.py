"""FSDP2: a fit in which every rank reads and stores only its shard of base and task vectors.

FSDP2 shards every tensor along its first axis, so a rank's shard is a contiguous range of its
entries. The shards of all tensors, concatenated, are the rank's flat vector: the merge and its
gradient work on it as on a whole model's. A block's merged weights are gathered while it computes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from divmerge_book.runner.process_group import ProcessGroup
from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.merged_model import accumulate_with_hooks
from divmerge_core.merging.problem import Batch, Forward, MergeProblem
from divmerge_core.merging.task_vectors import STORAGES, Layout, TaskVectors

PRECISIONS = {
    "float32": MixedPrecisionPolicy(),
    "bfloat16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


# --- sources of weights ---------------------------------------------------------------------------
@dataclass(frozen=True)
class WeightSource:
    """Weights of a model in memory or on disk: piece(name, start, stop) of a flattened tensor.

    prefix: what a module's names have in front of the names here, or nothing.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    piece: Callable[[str, int, int], Shaped[Tensor, " n"]] = field(repr=False)
    prefix: str = ""


def from_folder(folder: str | Path, prefix: str | None = None) -> WeightSource:
    """Weights of a model on disk in the hub's layout, read on demand; prefix: as in StoredModel."""
    stored = StoredModel.at(Path(folder), prefix)
    tensors = {core: stored.tensors[name] for core, name in stored.cores.items()}

    def piece(key: str, start: int, stop: int) -> Tensor:
        return tensors[key].mapped()[start:stop].clone()

    shapes = {core: tensor.shape for core, tensor in tensors.items()}
    return WeightSource(str(folder), shapes, piece, stored.prefix)


def require_shapes(source: WeightSource, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the source has every tensor of a model, in its shape."""
    for name, shape in shapes.items():
        found = source.shapes.get(name.removeprefix(source.prefix))
        if found != shape:
            raise ValueError(
                f"{source.name}: {name} has shape {found or 'unknown'}, the model has {shape}; "
                "merging needs base and experts of one architecture and vocabulary"
            )


# --- a sharded model ------------------------------------------------------------------------------
def blocks(module: nn.Module) -> list[nn.Module]:
    """The units that FSDP gathers: entries of the outermost ModuleLists."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def own_stretch(shape: Sequence[int], rank: int, world: int) -> tuple[int, int]:
    """(start, stop) of a rank's shard in the flattened tensor, as FSDP2 splits its first axis."""
    rows, width = shape[0], prod(shape[1:])
    step = -(-rows // world)
    return min(rank * step, rows) * width, min((rank + 1) * step, rows) * width


@dataclass(frozen=True)
class Shards:
    """A sharded model on one rank.

    layout: names and shapes of the rank's shards. shapes: of the whole tensors.
    """

    group: ProcessGroup
    module: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    layout: Layout
    hooks: list = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, module: nn.Module, group: ProcessGroup, *, precision: str = "float32") -> "Shards":
        """Shard a model over the group; its parameters may be on the device meta.

        precision: of the gathered weights and of products; shards and gradients are in float32.
        Raises ValueError for an unknown precision, and where a rank would have no number.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        single = [name for name, shape in shapes.items() if not shape]
        longest = max((shape[0] for shape in shapes.values() if shape), default=0)
        if single or own_stretch((longest,), group.world - 1, group.world)[0] == longest:
            raise ValueError(
                f"{group.world} ranks cannot share tensors of at most {longest} rows"
                + (f" or no axis ({', '.join(single[:3])})" if single else "; start fewer")
            )
        module.float().eval().requires_grad_()
        for part in (*blocks(module), module):
            # Gathered weights are let go after use: the next merge makes them stale.
            fully_shard(
                part, mesh=group.mesh, mp_policy=PRECISIONS[precision], reshard_after_forward=True
            )
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)  # losses of ranks add up, not their mean
                part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        module._apply(lambda t: torch.empty_like(t, device=group.device) if t.is_meta else t)
        layout = Layout.of({name: p.to_local() for name, p in module.named_parameters()})
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            start, stop = own_stretch(shapes[name], group.rank, group.world)
            assert prod(shape) == stop - start, f"FSDP2 cut {name} otherwise: {shape}"
        return cls(group, module, shapes, layout)

    def read(self, source: WeightSource) -> dict[str, Tensor]:
        """The rank's shard of every tensor; nothing else of the source is read."""
        state = {}
        for name, local in zip(self.layout.names, self.layout.shapes, strict=True):
            start, stop = own_stretch(self.shapes[name], self.group.rank, self.group.world)
            numbers = source.piece(name.removeprefix(source.prefix), start, stop)
            state[name] = numbers.to(self.group.device).reshape(local)
        return state

    def vectors(
        self, base: WeightSource, experts: Mapping[str, WeightSource], *, storage: str = "float32"
    ) -> TaskVectors:
        """The rank's columns of base and task vectors, read one expert at a time.

        storage: as in TaskVectors.from_states. Raises ValueError where a source does not fit the
        model, before any is read, and where a share is not finite.
        """
        store, layout = STORAGES[storage], self.layout
        if not experts:
            raise ValueError("no experts given; merging needs one or more")
        for source in (base, *experts.values()):
            require_shapes(source, self.shapes)

        def own(source: WeightSource) -> Float[Tensor, " N"]:
            state = self.read(source)
            layout.check(state, source.name)
            return layout.flatten(state)

        flat = own(base)
        rows = (own(source).sub_(flat) for source in experts.values())
        return TaskVectors(layout, tuple(experts), flat, store(rows, len(experts)))

    @torch.no_grad()
    def fill(self, parameters: Mapping[str, Tensor]) -> None:
        """Write the rank's shards into the model."""
        own = [parameter.to_local() for parameter in self.module.parameters()]
        torch._foreach_copy_(own, [parameters[name].detach() for name in self.layout.names])

    # --- GradientReducer --------------------------------------------------------------------------

    def gather(self, vectors: TaskVectors, segments: Segments) -> Callable[[], Tensor]:
        """Register gradient hooks on the shards; the function returned sums over all ranks."""
        while self.hooks:
            self.hooks.pop().remove()  # of an earlier fit
        parameters = dict(self.module.named_parameters())
        collect = accumulate_with_hooks(parameters, vectors, segments, self.hooks)
        return lambda: self.group.total(collect())

    def total(self, loss: float) -> float:
        """The loss of all ranks."""
        own = torch.tensor(loss, device=self.group.device, dtype=torch.float64)
        return self.group.total(own).item()


# --- a sharded problem ----------------------------------------------------------------------------
def own_rows(batch: Batch, rank: int, world: int) -> Batch:
    """A rank's rows of a batch, as many on every rank; losses of all ranks add up to the batch's.

    A row that is there only to make up the number weighs nothing.
    """
    rows = len(next(iter(batch.inputs.values())))
    share = -(-rows // world)
    wanted = range(rank * share, (rank + 1) * share)
    taken = torch.tensor([min(row, rows - 1) for row in wanted])
    marks = torch.ones(rows, 1, dtype=torch.bool) if batch.answer is None else batch.answer.cpu()
    counts = marks.sum(dim=1).tolist()
    weights = batch.weight.split(counts)
    kept = [weights[r] * (r == w) for r, w in zip(taken.tolist(), wanted, strict=True)]
    return Batch(
        {key: tensor[taken] for key, tensor in batch.inputs.items()},
        torch.cat(kept),
        None if batch.answer is None else batch.answer[taken],
    )


def sharded_problem(
    shards: Shards, vectors: TaskVectors, batches: Sequence[Sequence[Batch]], forward: Forward
) -> MergeProblem:
    """The same problem for one rank: its columns of the vectors, its rows of every batch.

    batches: the whole ones, alike on all ranks. forward: as in MergeProblem, of the module that
    was cut; it is called without parameters, as the module has its own. Fit it as any other, with
    `fit_coefficients` on every rank: the coefficients are those that one process would find. What
    it returns is one's own share of the merged model; `shards.fill` puts it into the module. A
    method's option `inputs` counts the rows of one rank.
    """
    group = shards.group

    def own(parameters: Mapping[str, Tensor], pairs: Sequence[tuple[int, Batch]]) -> list[Tensor]:
        shards.fill(parameters)
        return forward({}, pairs)

    shares = [[own_rows(batch, group.rank, group.world) for batch in every] for every in batches]
    return MergeProblem(vectors, shares, own, shards.module, shards)
