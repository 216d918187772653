"""FSDP2: a fit in which every rank reads and stores only its shard of base and task vectors.

FSDP2 cuts every tensor along its first axis, so a rank's share of it is one stretch of its numbers.
The shares of all tensors, end to end, are the rank's own flat vector: base, task vectors, the merge
and its gradient work on that vector as they do on a whole model's, and no rank ever holds all of
the [T, N] numbers. Only while a block computes is its merged weight gathered from all ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from divmerge_core.checkpoints.safetensors_io import StoredModel
from divmerge_core.kernels.merge import add_inner
from divmerge_core.kernels.segments import Segments
from divmerge_core.merging.problem import Batch, Forward, MergeProblem
from divmerge_core.merging.process_group import ProcessGroup
from divmerge_core.merging.task_vectors import STORAGES, Layout, TaskVectors

PRECISIONS = {
    "float32": MixedPrecisionPolicy(),
    "bfloat16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}


# --- where numbers come from ----------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A model's numbers, wherever they lie: piece(name, start, stop) of a tensor laid in a row.

    prefix: what a module's names have in front of the names here, or nothing.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    piece: Callable[[str, int, int], Shaped[Tensor, " n"]] = field(repr=False)
    prefix: str = ""


def from_state(name: str, state: Mapping[str, Tensor]) -> Source:
    """Numbers of a state dict in memory."""

    def piece(key: str, start: int, stop: int) -> Tensor:
        return state[key].detach().reshape(-1)[start:stop]

    return Source(name, {key: tuple(tensor.shape) for key, tensor in state.items()}, piece)


def from_folder(folder: str | Path, prefix: str | None = None) -> Source:
    """Weights of a model on disk in the hub's layout, read on demand; prefix: as in StoredModel."""
    stored = StoredModel.at(Path(folder), prefix)
    tensors = {core: stored.tensors[name] for core, name in stored.cores.items()}

    def piece(key: str, start: int, stop: int) -> Tensor:
        return tensors[key].piece(start, stop)

    shapes = {core: tensor.shape for core, tensor in tensors.items()}
    return Source(str(folder), shapes, piece, stored.prefix)


def require_shapes(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the source has every tensor of a model, in its shape."""
    for name, shape in shapes.items():
        found = source.shapes.get(name.removeprefix(source.prefix))
        if found != shape:
            raise ValueError(
                f"{source.name}: {name} has shape {found or 'unknown'}, the model has {shape}; "
                "merging needs base and experts of one architecture and vocabulary"
            )


# --- a model cut into shares ----------------------------------------------------------------------


def blocks(module: nn.Module) -> list[nn.Module]:
    """What is gathered at a time: the entries of the outermost lists of modules."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def own_stretch(shape: Sequence[int], rank: int, world: int) -> tuple[int, int]:
    """(start, stop) of a rank's numbers in a tensor laid in a row, as FSDP2 cuts its first axis."""
    rows, width = shape[0], prod(shape[1:])
    step = -(-rows // world)
    return min(rank * step, rows) * width, min((rank + 1) * step, rows) * width


@dataclass(frozen=True)
class Shards:
    """One rank's share of a model, and the model itself, cut for good.

    layout: names, and the shapes of one's own shares. shapes: of the whole tensors.
    """

    group: ProcessGroup
    module: nn.Module
    shapes: Mapping[str, tuple[int, ...]]
    layout: Layout
    hooks: list = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, module: nn.Module, group: ProcessGroup, *, precision: str = "float32") -> "Shards":
        """Cut a model over the ranks, each on its device; it may come without weights.

        precision: of the gathered weights and of products; shares and gradients are in float32.
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

    def read(self, source: Source) -> dict[str, Tensor]:
        """One's own share of every tensor; nothing else of the source is read."""
        state = {}
        for name, local in zip(self.layout.names, self.layout.shapes, strict=True):
            start, stop = own_stretch(self.shapes[name], self.group.rank, self.group.world)
            numbers = source.piece(name.removeprefix(source.prefix), start, stop)
            state[name] = numbers.to(self.group.device).reshape(local)
        return state

    def vectors(
        self, base: Source, experts: Mapping[str, Source], *, storage: str = "float32"
    ) -> TaskVectors:
        """One's own columns of base and task vectors, read one expert at a time.

        storage: as in TaskVectors.from_states. Raises ValueError where a source does not fit the
        model, before any is read, and where a share is not finite.
        """
        store, layout = STORAGES[storage], self.layout
        if not experts:
            raise ValueError("no experts given; merging needs one or more")
        for source in (base, *experts.values()):
            require_shapes(source, self.shapes)

        def own(source: Source) -> Float[Tensor, " N"]:
            state = self.read(source)
            layout.check(state, source.name)
            return layout.flatten(state)

        flat = own(base)
        rows = (own(source).sub_(flat) for source in experts.values())
        return TaskVectors(layout, tuple(experts), flat, store(rows, len(experts)))

    @torch.no_grad()
    def fill(self, parameters: Mapping[str, Tensor]) -> None:
        """Write one's own shares into the model."""
        own = [parameter.to_local() for parameter in self.module.parameters()]
        torch._foreach_copy_(own, [parameters[name].detach() for name in self.layout.names])

    # --- what a fit asks for ----------------------------------------------------------------------

    def gather(self, vectors: TaskVectors, segments: Segments) -> Callable[[], Tensor]:
        """Take each share's gradient when it is ready; `collect` gives dL/dLambda of all ranks."""
        while self.hooks:
            self.hooks.pop().remove()  # of a fit before this one
        result = vectors.base.new_zeros(len(vectors.tasks), segments.num_groups)

        def consume(start: int, stop: int) -> Callable[[Tensor], None]:
            rows = segments.within(start, stop)

            def hook(parameter: Tensor) -> None:
                grad = parameter.grad.to_local().flatten()
                add_inner(result, grad, vectors.deltas, rows, start)
                parameter.grad = None

            return hook

        for parameter, bounds in zip(self.module.parameters(), self.layout.bounds, strict=True):
            if bounds[0] < bounds[1]:
                hook = consume(*bounds)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(hook))

        def collect() -> Float[Tensor, "T G"]:
            gathered = self.group.total(result.clone())
            result.zero_()
            return gathered

        return collect

    def total(self, loss: float) -> float:
        """The loss of all ranks."""
        return self.group.total(
            torch.tensor(loss, device=self.group.device, dtype=torch.float64)
        ).item()


# --- a problem on several devices -----------------------------------------------------------------


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
