"""The memory that a fit or a fine-tuning needs, planned before anything is loaded.

Weights, task vectors, gradients, answers and logits are exact; activations are what blocks store
for their backward pass, with fused attention and no dropout. Not counted are a library's short
allocations and gaps between allocations: leave some room.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from divmerge_book.planning.gpu_specs import ACCELERATORS, GB
from divmerge_book.planning.workloads import DELTAS, PRECISIONS, Fit, Model, Training
from divmerge_core.kernels.delta_storage import CHUNK

CONTEXT = GB  # set aside for the driver and for short-lived tensors; an assumption
# What one block stores per token, with fused attention: vectors [H] in float32 (inputs of norms and
# their first half's results); vectors [H] that enter matrices, in float32 and in bfloat16, where
# each matrix has a copy; vectors [I] of the feed-forward part; numbers of norms. Queries, keys,
# values and a number per head come on top.
KINDS: Mapping[str, tuple[int, int, int, int, int]] = {
    "gated": (4, 3, 6, 4, 2),  # Llama, Qwen2
    "gelu": (2, 3, 5, 2, 4),  # BERT
    "gelu_new": (2, 3, 3, 5, 4),  # GPT-2
}


class Line(NamedTuple):
    """One part of a plan: what, how many bytes, and why as many."""

    what: str
    nbytes: float | int
    why: str


@dataclass(frozen=True)
class Plan:
    """Bytes by line, against a device's capacity; host: those in its memory. str() is a table."""

    title: str
    device: str
    lines: tuple[Line, ...]
    capacity: float | int
    host: float | int = 0
    advice: tuple[str, ...] = ()

    @property
    def total(self) -> float | int:
        """Bytes on one device."""
        return sum(line.nbytes for line in self.lines)

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    def __str__(self) -> str:
        verdict = f"{'fits' if self.fits else 'does not fit'} {self.device}"
        rows = [*self.lines, Line("total", self.total, verdict)]
        rows.append(Line("capacity", self.capacity, ""))
        if self.host:
            rows.append(Line("host memory", self.host, "beside the device"))
        width = max(len(row.what) for row in rows)
        table = [f"{row.what:<{width}}  {size(row.nbytes):>11}  {row.why}".rstrip() for row in rows]
        return "\n".join([self.title, *table, *(f"- {one}" for one in self.advice)])


def size(nbytes: float | int) -> str:
    """Bytes as gigabytes (10^9), or megabytes where they are few."""
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB / 10 else f"{nbytes / 1e6:.2f} MB"


def plan(
    model: Model, work: Training, device: str | float | int = "t4", *, beside: Sequence[Line] = ()
) -> Plan:
    """The plan of a fit, or of a fine-tuning with AdamW, on a device: in ACCELERATORS, or bytes.

    beside: what lies on the device as well. Raises ValueError for an unknown device and for an
    encoder without a number of classes.
    """
    gpu = ACCELERATORS[device] if isinstance(device, str) else None
    name, capacity = (gpu.name, gpu.memory) if gpu else ("the device", device)
    if capacity <= 0:
        raise ValueError(f"a device has more than 0 bytes, got {device}")
    title, host = f"Fine-tuning: {model.name}, N = {model.parameters:,}", 0
    if isinstance(work, Fit):
        title = f"Fit: {model.name}, N = {model.parameters:,}, {work.tasks} tasks"
        if work.deltas.startswith("streamed"):
            host = work.tasks * DELTAS[work.deltas] * model.parameters / work.ranks

    def of(**fields: object) -> tuple[Line, ...]:
        return (*lines(model, replace(work, **fields)), *beside)

    return advised(Plan(title, name, of(), capacity, host), changes(work), of)


def lines(model: Model, work: Training) -> Iterator[Line]:
    """Every part of a plan, on one of the devices that share the work."""
    if isinstance(work, Fit):
        yield from fit_lines(model, work)
    else:
        yield Line("weights", 4 * model.parameters, "N x 4 bytes")
        yield Line("AdamW's two means", 8 * model.parameters, "N x 8 bytes")
        yield Line("gradients", 4 * model.parameters, "N x 4 bytes")
    if work.precision == "bfloat16" and work.ranks == 1:  # no embeddings, but the head
        products = model.layers * model.block + model.vocabulary * model.hidden
        yield Line("weights in bfloat16", 2 * products, "2 bytes, what is multiplied")
    yield activations(model, work)
    size, classes = PRECISIONS[work.precision], work.num_classes(model)
    answers = work.tasks * -(-work.positions // work.ranks)
    why = f"{answers} answers x {classes} classes x {size} bytes"
    yield Line("logits", answers * classes * size, why)
    yield Line("gradient of logits", answers * classes * size, "the same")
    if isinstance(work, Fit):
        each = {"float32": 4 * classes, "bfloat16": 2 * classes, "top": 12 * work.top + 4}
        cached = work.tasks * -(-work.inputs * work.positions // (work.rows * work.ranks))
        why = f"{cached} x {each[work.cached]} bytes"
        yield Line("experts' answers", cached * each[work.cached], why)
    yield Line("context", CONTEXT, "set aside (assumed)")


def fit_lines(model: Model, fit: Fit) -> Iterator[Line]:
    """Base, merged model, task vectors and gradients of a fit."""
    own, share = model.parameters / fit.ranks, f" / {fit.ranks}" if fit.ranks > 1 else ""
    ends = model.parameters - model.layers * model.block  # embeddings, last norm, head
    yield Line("base", 4 * own, f"N{share} x 4 bytes")
    yield Line("merged model", 4 * own, f"N{share} x 4 bytes")
    if fit.ranks > 1:
        yield Line("shards in the model", 4 * own, "what ranks gather from")
        gathered = PRECISIONS[fit.precision] * (ends + 2 * model.block)
        yield Line("gathered weights", gathered, "embeddings, head, and two blocks at a time")
    each = DELTAS[fit.deltas]
    numbers, why = own, f"x N{share} x {each:.4g} bytes"
    if fit.deltas == "low_rank":
        numbers, why = fit.rank * model.layers * model.sides / fit.ranks, f"of rank {fit.rank}"
    elif fit.deltas.startswith("streamed"):
        numbers, why = min(own, CHUNK), "two buffers of some columns"
        each = 2 * each + 4 * (each != 4)  # and one in float32, where they are not
    yield Line("task vectors", fit.tasks * each * numbers, f"{fit.tasks} {why}")
    if fit.ranks > 1:
        numbers, why = max(ends, model.block), "of what is gathered at a time"
    elif fit.gradients == "buffer":
        numbers, why = model.parameters, "N x 4 bytes"
    else:
        numbers = (1 + model.tied) * model.largest
        why = "of the largest tensor" + model.tied * ", twice: embeddings and head"
    yield Line("gradients", 4 * numbers, why)


def bytes_per_token(model: Model, precision: str = "float32") -> float | int:
    """Bytes that one layer stores per token for its backward pass, weights' copies aside."""
    wide, inputs, half, inner, statistics = KINDS[model.kind]
    inputs = inputs if precision == "float32" else half
    single = 4 * (wide * model.hidden + statistics + model.heads)
    vectors = (inputs + 1) * model.hidden + 2 * model.keys + inner * model.inner
    return single + PRECISIONS[precision] * vectors


def activations(model: Model, work: Training) -> Line:
    """What the layers store of a step's tokens; with checkpointing, their inputs and one layer."""
    tokens = work.tasks * -(-work.rows // work.ranks) * work.tokens
    per_layer = bytes_per_token(model, work.precision)
    if work.checkpointing:
        each, why = model.layers * 4 * model.hidden + per_layer, ", each layer's input kept"
    else:
        each, why = model.layers * per_layer, f" x {model.layers} layers x {per_layer:.0f} bytes"
    ends = 8 * model.hidden + 4  # the last norm
    return Line("activations", tokens * (each + ends), f"{tokens} tokens{why}")


def changes(work: Training) -> dict[str, dict]:
    """Changes that may save memory: text -> fields; the last two merge less or need devices."""
    answers, found = max(1, round(work.positions / work.rows)), {}
    found["gradient checkpointing"] = {"checkpointing": True}
    if isinstance(work, Fit):
        found["gradients consumed tensor by tensor"] = {"gradients": "stream"}
        found[f"only the experts' {work.top} most probable classes"] = {"cached": "top"}
        if not work.deltas.startswith("streamed"):
            lighter = [d for d in ("bfloat16", "int8") if DELTAS[d] < DELTAS[work.deltas]]
            found |= {f"task vectors in {deltas}": {"deltas": deltas} for deltas in lighter}
        streamed = {"float32": "streamed", "bfloat16": "streamed_bfloat16"}
        if work.deltas in streamed:
            to = {"deltas": streamed[work.deltas]}
            found["task vectors streamed from pinned host memory"] = to
    found[f"1 row at a time instead of {work.rows}"] = {"rows": 1, "answers": answers}
    if isinstance(work, Fit):
        found[f"2 tasks instead of {work.tasks}"] = {"tasks": 2}
        found[f"{2 * work.ranks} devices (torchrun, FSDP2)"] = {"ranks": 2 * work.ranks}
    return found


def advised(planned: Plan, ways: Mapping[str, dict], of: Callable[..., Sequence[Line]]) -> Plan:
    """The plan, with the changes that save memory where it does not fit.

    ways: what to do -> fields of a Fit or Training that change; of: the lines with these. Ways that
    are enough alone come first, the least first; then several together: they leave tasks and
    devices as they are, and come only where no way is enough.
    """
    if planned.fits:
        return planned

    def saved(fields: dict) -> float | int:
        return planned.total - sum(line.nbytes for line in of(**fields))

    needed = planned.total - planned.capacity
    every = {what: fields for what, fields in ways.items() if saved(fields) > 0}
    found, together = {what: saved(fields) for what, fields in every.items()}, {}
    for fields in every.values():
        together |= {} if {"tasks", "ranks"} & set(fields) else fields
    if together and all(nbytes < needed for nbytes in found.values()):
        found["all of these with the same tasks and devices"] = saved(together)
    order = sorted(found.items(), key=lambda one: (one[1] < needed, abs(one[1] - needed)))
    verdicts = [("enough" if nbytes >= needed else "not enough alone") for _, nbytes in order]
    shown = zip(order, verdicts, strict=True)
    advice = tuple(f"{what}: saves {size(n)} ({verdict})" for (what, n), verdict in shown)
    return replace(planned, advice=advice)
