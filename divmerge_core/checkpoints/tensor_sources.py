"""Where the numbers of a merged model come from: memory, or base and experts on disk."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from divmerge_core.checkpoints.model_card import MergeRecord, group_numbers
from divmerge_core.checkpoints.safetensors_io import BUFFERS, Stored, StoredModel
from divmerge_core.checkpoints.shards import KINDS, Planned
from divmerge_core.merging.require import require_mapping

BLOCK = 1 << 16  # numbers merged at a time: fewer leave calls the larger share, more the cache
# One block of a tensor: (place in it, the base's numbers [n], deltas [T, n]) -> merged numbers [n].
Block = Callable[[slice, Tensor, Tensor], Tensor]
# How a tensor is merged: (name on disk, the base's numbers, every expert's) -> its blocks.
Rule = Callable[[str, Tensor, Sequence[Tensor]], Block]


@dataclass(frozen=True)
class MergedTensors:
    """Merged numbers of some tensors of the base: name on disk -> numbers(dtype), in a row."""

    base: StoredModel
    numbers: Mapping[str, Callable[[torch.dtype], Tensor]]
    in_memory: bool = False

    @property
    def cores(self) -> tuple[str, ...]:
        """The merged tensors' names as the bare encoder has them."""
        return tuple(self.base.core(name) for name in self.numbers)


def in_memory(base: StoredModel, merged: Mapping[str, Tensor]) -> MergedTensors:
    """Merged tensors that are there already. Raises ValueError where they do not fit the base."""
    require_mapping(merged, "merged")
    cores, numbers = base.cores, {}
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
        numbers[place] = partial(finite, place, tensor.detach().reshape(-1))
    return MergedTensors(base, numbers, in_memory=True)


def streamed(
    base: StoredModel, record: MergeRecord, names: Sequence[str] | None, rule: Rule | None = None
) -> MergedTensors:
    """A merge computed from base and experts on disk, a tensor at a time, when it is asked for.

    names: see `write`. rule: None for the sum that the record's coefficients say. Raises ValueError
    where experts, coefficients and base do not fit together.
    """
    if (record.coeffs is None and rule is None) or set(record.experts) != set(record.tasks):
        raise ValueError(
            "a merge that is not in memory needs record.coeffs and a folder in record.experts for "
            f"each of {', '.join(record.tasks)}; else give merged="
        )
    tensors = tensors_of(base, record, names)
    rule = rule or weighted_sum(base, record, [name for name, *_ in tensors])
    numbers = {entry[0]: partial(merged_numbers, rule, *entry) for entry in tensors}
    return MergedTensors(base, numbers)


def tensors_of(
    base: StoredModel, record: MergeRecord, names: Sequence[str] | None
) -> list[tuple[str, Stored, list[Stored]]]:
    """(name on disk, the base's, every expert's) of the tensors to be merged: see `to_merge`."""
    experts = [record.opened.get(t) or StoredModel.at(record.experts[t]) for t in record.tasks]
    found = [(expert.tensors, expert.cores) for expert in experts]
    return [
        (name, base.tensors[name], [own[names[base.core(name)]] for own, names in found])
        for name in to_merge(base, experts, record, names)
    ]


def weighted_sum(base: StoredModel, record: MergeRecord, names: Sequence[str]) -> Rule:
    """theta_0 + sum_t Lambda[t, g] tau_t, by the record's coefficients."""
    columns = dict(zip(names, group_numbers(record, list(map(base.core, names))), strict=True))

    def rule(name: str, origin: Tensor, experts: Sequence[Tensor]) -> Block:
        row = record.coeffs[:, columns[name]].detach().cpu()
        return lambda place, origin, deltas: origin.addmv_(deltas.T, row.to(origin))

    return rule


def blocks(
    base: Tensor, experts: Sequence[Tensor], size: int | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(place, base [n], task vectors [T, n]) of every block, in float32 or wider.

    Both are written again for the next block. size: of a block; None for BLOCK.
    """
    kind, size = torch.promote_types(base.dtype, torch.float32), size or BLOCK
    origins, rows = torch.empty(size, dtype=kind), torch.empty(len(experts), size, dtype=kind)
    for start in range(0, len(base), size):
        place = slice(start, min(start + size, len(base)))
        origin, deltas = origins[: place.stop - start], rows[:, : place.stop - start]
        origin.copy_(base[place])
        for delta, expert in zip(deltas, experts, strict=True):
            delta.zero_() if expert is base else delta.copy_(expert[place]).sub_(origin)
        yield place, origin, deltas


def merged_numbers(
    rule: Rule, name: str, base: Stored, experts: Sequence[Stored], dtype: torch.dtype
) -> Tensor:
    """One tensor merged by a rule, block by block, in its dtype."""
    origin = base.mapped()
    theirs = [origin if expert == base else expert.mapped() for expert in experts]
    block, result = rule(name, origin, theirs), torch.empty(base.size, dtype=dtype)
    for place, start, deltas in blocks(origin, theirs):
        finite(name, block(place, start, deltas), dtype, result[place])
    return result


def to_merge(
    base: StoredModel,
    experts: Sequence[StoredModel],
    record: MergeRecord,
    names: Sequence[str] | None,
) -> list[str]:
    """Names on disk of the tensors to be merged. Raises ValueError for those that cannot be."""
    cores, held = base.cores, [expert.cores for expert in experts]
    for task, expert in zip(record.tasks if names is None else (), experts, strict=False):
        own = (expert.config or {}).get("tie_word_embeddings")
        if own is False and base.config.get("tie_word_embeddings"):
            raise ValueError(
                f"expert {task!r} has its own head, the base's is its embeddings: untie them"
            )
    if names is None:
        learned = (c for c, n in cores.items() if base.tensors[n].dtype.is_floating_point)
        learned = (core for core in learned if not BUFFERS.search(core))
        need = base.encoder.union(*held)
        names = [core for core in learned if core in need]
    names = [base.core(name) for name in names]
    for task, expert, theirs in zip(record.tasks, experts, held, strict=True):
        if lost := sorted(expert.encoder - set(cores)):
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


def planned(source: MergedTensors, dtype: torch.dtype | None) -> list[Planned]:
    """Every tensor of the base, merged where the source has it and copied elsewhere.

    Raises ValueError for a tensor of a dtype that cannot be written.
    """

    def plan(name: str, tensor: Stored) -> Planned:
        wanted = dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype
        if wanted not in KINDS:
            raise ValueError(f"{source.base.folder}: {name} is {wanted}, which is not written here")
        numbers = source.numbers.get(name, lambda kind: tensor.mapped().to(kind))
        return Planned(name, wanted, tensor.shape, lambda: numbers(wanted))

    return [plan(name, tensor) for name, tensor in source.base.tensors.items()]


def finite(name: str, numbers: Tensor, dtype: torch.dtype, into: Tensor | None = None) -> Tensor:
    """Merged numbers in a dtype, on the CPU. Raises ValueError for NaN, inf, and too large ones."""
    converted = numbers.to("cpu", dtype) if into is None else into.copy_(numbers)
    if len(converted) and not all(math.isfinite(end) for end in converted.aminmax()):
        reason = "hold NaN or inf; nothing was written"
        if torch.isfinite(numbers).all():
            reason = f"reach {numbers.abs().max():.3g}, too large for {dtype}; take bfloat16"
        raise ValueError(f"merged numbers of {name} {reason}")
    return converted
