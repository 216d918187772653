"""Where the numbers of a merged model come from: memory, or base and experts on disk, by pieces."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from divmerge_core.checkpoints.model_card import MergeRecord, group_numbers
from divmerge_core.checkpoints.safetensors_io import PIECE, Planned, Stored, StoredModel
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.kernels.segments import Segments


@dataclass(frozen=True)
class MergedTensors:
    """Merged numbers of some tensors of the base: name on disk -> piece(start, stop)."""

    base: StoredModel
    pieces: Mapping[str, Callable[[int, int], Tensor]]
    in_memory: bool = False

    @property
    def cores(self) -> tuple[str, ...]:
        """The merged tensors' names as the bare encoder has them."""
        return tuple(self.base.core(name) for name in self.pieces)


def in_memory(base: StoredModel, merged: Mapping[str, Tensor]) -> MergedTensors:
    """Merged tensors that are there already. Raises ValueError where they do not fit the base."""
    cores, pieces = base.cores, {}
    unknown = [name for name in merged if base.core(name) not in cores]
    if unknown or not merged:
        raise ValueError(
            f"merged holds {sorted(unknown)[:5] or 'nothing'}, which {base.folder} has not; give "
            "the parameters of that base by name, such as layout.unflatten(flat)"
        )
    for name, tensor in merged.items():
        place = cores[base.core(name)]
        shape = base.tensors[place].shape
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"merged {name} has shape {list(tensor.shape)}, {base.folder} has {list(shape)}"
            )
        pieces[place] = flat_piece(tensor)
    return MergedTensors(base, pieces, in_memory=True)


def flat_piece(tensor: Tensor) -> Callable[[int, int], Tensor]:
    """piece(start, stop) of a tensor in memory."""
    return lambda start, stop: tensor.detach().reshape(-1)[start:stop]


def streamed(base: StoredModel, record: MergeRecord, names: Sequence[str] | None) -> MergedTensors:
    """The merge that a record's coefficients say, computed when it is asked for.

    names: see `write`. Raises ValueError where experts, coefficients and base do not fit together.
    """
    if record.coeffs is None or set(record.experts) != set(record.tasks):
        raise ValueError(
            "a merge that is not in memory needs record.coeffs and a folder in record.experts for "
            f"each of {', '.join(record.tasks)}; else give merged="
        )
    experts = [StoredModel.at(record.experts[task]) for task in record.tasks]
    chosen = to_merge(base, experts, record, names)
    groups = group_numbers(record, [base.core(name) for name in chosen])
    places = [expert.cores for expert in experts]
    pieces = {}
    for name, group in zip(chosen, groups, strict=True):
        theirs = [e.tensors[p[base.core(name)]] for e, p in zip(experts, places, strict=True)]
        weights = record.coeffs[:, group : group + 1].detach().cpu()
        pieces[name] = merged_piece(base.tensors[name], theirs, weights)
    return MergedTensors(base, pieces)


def to_merge(
    base: StoredModel,
    experts: Sequence[StoredModel],
    record: MergeRecord,
    names: Sequence[str] | None,
) -> list[str]:
    """Names on disk of the tensors to be merged. Raises ValueError for those that cannot be."""
    cores = base.cores
    held = [expert.cores for expert in experts]
    if names is None:
        floating = [
            core for core, name in cores.items() if base.tensors[name].dtype.is_floating_point
        ]
        names = [core for core in floating if any(core in theirs for theirs in held)]
    names = [base.core(name) for name in names]
    for task, expert, theirs in zip(record.tasks, experts, held, strict=True):
        lost = sorted(expert.encoder - set(cores))
        if lost:
            raise ValueError(
                f"{base.folder} lacks {lost[:5]}, which expert {task!r} holds; only a pooler may "
                "be absent: give a base with all its weights"
            )
        missing = [name for name in names if name not in cores or name not in theirs]
        if missing or not names:
            raise ValueError(
                f"{base.folder} and expert {task!r} do not both hold {missing[:5] or 'any tensor'};"
                " merging needs one architecture (names= says which tensors are merged)"
            )
        for name in names:
            have, wanted = expert.tensors[theirs[name]].shape, base.tensors[cores[name]].shape
            if have != wanted:
                raise ValueError(
                    f"expert {task!r}: {name} has shape {list(have)}, the base {list(wanted)}; "
                    "merging needs one architecture and vocabulary (names= says which tensors are "
                    "merged: leave heads out)"
                )
    wanted = set(names)
    return [name for core, name in cores.items() if core in wanted]


def merged_piece(
    base: Stored, experts: Sequence[Stored], weights: Float[Tensor, "T 1"]
) -> Callable[[int, int], Tensor]:
    """piece(start, stop) of theta_0 + sum_t Lambda[t] (theta_t - theta_0), in float32 or wider."""

    def piece(start: int, stop: int) -> Tensor:
        origin = base.piece(start, stop)
        origin = origin.to(torch.promote_types(origin.dtype, torch.float32))
        deltas = torch.stack([e.piece(start, stop).to(origin) - origin for e in experts])
        segments = Segments(((0, len(origin), 0),))
        return grouped_merge(origin, deltas, weights.to(origin), segments, backend="torch")

    return piece


def planned(source: MergedTensors, dtype: torch.dtype | None) -> list[Planned]:
    """Every tensor of the base, merged where the source has it and copied elsewhere."""

    def plan(name: str, tensor: Stored) -> Planned:
        wanted = dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype
        merged = source.pieces.get(name)

        def piece(start: int, stop: int) -> Shaped[Tensor, " n"]:
            if merged is None:
                return tensor.piece(start, stop).to(wanted)
            return finite(name, merged(start, stop), wanted)

        return Planned(name, wanted, tensor.shape, piece)

    return [plan(name, tensor) for name, tensor in source.base.tensors.items()]


def finite(name: str, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Merged numbers in their dtype. Raises ValueError where one is NaN, inf, or too large."""
    converted = numbers.to(dtype)
    if not torch.isfinite(converted).all():
        reason = "hold NaN or inf; nothing was written"
        if torch.isfinite(numbers).all():
            reason = f"reach {numbers.abs().max():.3g}, too large for {dtype}; take bfloat16"
        raise ValueError(f"merged numbers of {name} {reason}")
    return converted


def deviation(source: MergedTensors, said: MergedTensors) -> float:
    """Largest difference of two merges, over the first PIECE numbers of every tensor.

    Next to the largest weight among them; infinite where they merge different tensors.
    """
    if set(source.pieces) != set(said.pieces):
        return float("inf")
    gap, size = 0.0, 0.0
    for name, piece in source.pieces.items():
        count = min(PIECE, source.base.tensors[name].size)
        if count:
            ours, theirs = piece(0, count).cpu().double(), said.pieces[name](0, count).double()
            gap = max(gap, (ours - theirs).abs().max().item())
            size = max(size, theirs.abs().max().item())
    return gap / size if gap else 0.0
