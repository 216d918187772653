"""The memory that a fit or a fine-tuning needs, planned before anything is loaded.

Weights, task vectors, gradients, answers and logits are exact; activations are what blocks store
for their backward pass, counted on small models (tests/book/test_memory.py), with fused attention
and no dropout. Not counted are a library's short allocations and gaps between allocations: leave
some room.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from divmerge_book.planning.gpu_specs import ACCELERATORS, GB
from divmerge_book.planning.workloads import DELTAS, KINDS, PRECISIONS, Fit, Model, Training
from divmerge_core.kernels.delta_storage import CHUNK

CONTEXT = GB  # set aside for the driver and for short-lived tensors; an assumption


@dataclass(frozen=True)
class Line:
    """One part of a plan: what, how many bytes, and why as many."""

    what: str
    nbytes: float | int
    why: str


@dataclass(frozen=True)
class Plan:
    """Bytes by line, against a device's capacity; str() is a table.

    host: bytes in the host's memory. advice: what saves memory, where it does not fit.
    """

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


def plan(model: Model, work: Fit | Training, device: str | float | int = "t4") -> Plan:
    """The plan of a fit, or of a fine-tuning with AdamW, on a device: in ACCELERATORS, or bytes.

    Raises ValueError for an unknown device and for an encoder without a number of classes.
    """
    if isinstance(device, str):
        name, capacity = ACCELERATORS[device].name, ACCELERATORS[device].memory
    elif device > 0:
        name, capacity = "the device", device
    else:
        raise ValueError(f"a device has more than 0 bytes, got {device}")
    title, host = f"Fine-tuning: {model.name}, N = {model.parameters:,}", 0
    if isinstance(work, Fit):
        title = f"Fit: {model.name}, N = {model.parameters:,}, {work.tasks} tasks"
        if work.deltas.startswith("streamed"):
            host = work.tasks * DELTAS[work.deltas] * model.parameters / work.ranks
    planned = Plan(title, name, tuple(lines(model, work)), capacity, host)
    return planned if planned.fits else replace(planned, advice=tuple(advise(model, work, planned)))


def lines(model: Model, work: Fit | Training) -> Iterator[Line]:
    """Every part of a plan, on one of the devices that share the work."""
    fit = isinstance(work, Fit)
    ranks, tasks = (work.ranks, work.tasks) if fit else (1, 1)
    size, classes = PRECISIONS[work.precision], work.num_classes(model)
    yield from fit_lines(model, work) if fit else training_lines(model)
    if work.precision == "bfloat16" and ranks == 1:
        yield Line("weights in bfloat16", 2 * model.products, "2 bytes, what is multiplied")
    yield activations(model, work, tasks * -(-work.rows // ranks) * work.tokens)
    answers = tasks * -(-work.positions // ranks)
    why = f"{answers} answers x {classes} classes x {size} bytes"
    yield Line("logits", answers * classes * size, why)
    yield Line("gradient of logits", answers * classes * size, "the same")
    if fit:
        each = {"float32": 4 * classes, "bfloat16": 2 * classes, "top": 12 * work.top + 4}
        cached = tasks * -(-work.inputs * work.positions // (work.rows * ranks))
        why = f"{cached} x {each[work.cached]} bytes"
        yield Line("experts' answers", cached * each[work.cached], why)
    yield Line("context", CONTEXT, "set aside (assumed)")


def training_lines(model: Model) -> Iterator[Line]:
    """Weights, gradients and optimizer states of AdamW, in float32."""
    yield Line("weights", 4 * model.parameters, "N x 4 bytes")
    yield Line("AdamW's two means", 8 * model.parameters, "N x 8 bytes")
    yield Line("gradients", 4 * model.parameters, "N x 4 bytes")


def fit_lines(model: Model, fit: Fit) -> Iterator[Line]:
    """Base, merged model, task vectors and gradients."""
    own, share = model.parameters / fit.ranks, f" / {fit.ranks}" if fit.ranks > 1 else ""
    yield Line("base", 4 * own, f"N{share} x 4 bytes")
    yield Line("merged model", 4 * own, f"N{share} x 4 bytes")
    if fit.ranks > 1:
        yield Line("shards in the model", 4 * own, "what ranks gather from")
        gathered = PRECISIONS[fit.precision] * (model.ends + 2 * model.block)
        yield Line("gathered weights", gathered, "embeddings, head, and two blocks at a time")
    each = DELTAS[fit.deltas]
    if fit.deltas == "low_rank":
        numbers, why = fit.rank * model.layers * model.sides / fit.ranks, f"of rank {fit.rank}"
    elif fit.deltas.startswith("streamed"):
        numbers, why = min(own, CHUNK), "two buffers of some columns"
        each = 2 * each + 4 * (each != 4)  # and one in float32, where they are not
    else:
        numbers, why = own, f"x N{share} x {each:.4g} bytes"
    yield Line("task vectors", fit.tasks * each * numbers, f"{fit.tasks} {why}")
    if fit.ranks > 1:
        numbers, why = max(model.ends, model.block), "of what is gathered at a time"
    elif fit.gradients == "buffer":
        numbers, why = model.parameters, "N x 4 bytes"
    else:
        numbers = (2 if model.tied else 1) * model.largest
        why = "of the largest tensor" + (", twice: embeddings and head" if model.tied else "")
    yield Line("gradients", 4 * numbers, why)


def bytes_per_token(model: Model, precision: str = "float32") -> float | int:
    """Bytes that one layer stores per token for its backward pass, weights' copies aside."""
    kept, size = KINDS[model.kind], PRECISIONS[precision]
    inputs = kept.inputs if precision == "float32" else kept.inputs_half
    wide = 4 * (kept.wide * model.hidden + kept.statistics + model.heads)
    attention = model.hidden + 2 * model.keys
    return wide + size * (inputs * model.hidden + attention + kept.inner * model.inner)


def activations(model: Model, work: Fit | Training, tokens: int) -> Line:
    """What the layers store of that many tokens; with checkpointing, their inputs and one layer."""
    per_layer = bytes_per_token(model, work.precision)
    ends = 8 * model.hidden + 4  # the last norm
    if work.checkpointing:
        each = model.layers * 4 * model.hidden + per_layer + ends
        return Line("activations", tokens * each, f"{tokens} tokens, each layer's input kept")
    why = f"{tokens} tokens x {model.layers} layers x {per_layer:.0f} bytes"
    return Line("activations", tokens * (model.layers * per_layer + ends), why)


# --- advice ---------------------------------------------------------------------------------------


def changes(work: Fit | Training) -> Iterator[tuple[str, dict]]:
    """Changes that may save memory, as text and fields; the last two merge less or need devices."""
    if not work.checkpointing:
        yield "gradient checkpointing", {"checkpointing": True}
    if isinstance(work, Fit):
        if work.gradients == "buffer" and work.ranks == 1:
            yield "gradients consumed tensor by tensor", {"gradients": "stream"}
        if work.cached != "top":
            yield f"only the experts' {work.top} most probable classes", {"cached": "top"}
        for deltas in ("bfloat16", "int8"):
            if DELTAS[deltas] < DELTAS[work.deltas] and not work.deltas.startswith("streamed"):
                yield f"task vectors in {deltas}", {"deltas": deltas}
        if work.deltas in ("float32", "bfloat16"):
            kind = "streamed" if work.deltas == "float32" else "streamed_bfloat16"
            yield "task vectors streamed from pinned host memory", {"deltas": kind}
    if work.rows > 1:
        answers = max(1, round(work.positions / work.rows))
        yield f"1 row at a time instead of {work.rows}", {"rows": 1, "answers": answers}
    if isinstance(work, Fit):
        if work.tasks > 2:
            yield f"2 tasks instead of {work.tasks}", {"tasks": 2}
        yield f"{2 * work.ranks} devices (torchrun, FSDP2)", {"ranks": 2 * work.ranks}


def advise(model: Model, work: Fit | Training, planned: Plan) -> Iterator[str]:
    """Changes that save memory, those enough alone first, least first; then several together.

    All together leave tasks and devices as they are, and come only where no change is enough.
    """

    def saved(fields: dict) -> float | int:
        return planned.total - sum(line.nbytes for line in lines(model, replace(work, **fields)))

    needed, all_changes = planned.total - planned.capacity, list(changes(work))
    found = [(saved(fields), what) for what, fields in all_changes]
    together: dict = {}
    for _, fields in all_changes:
        together |= {} if {"tasks", "ranks"} & set(fields) else fields
    if together and all(bytes_saved < needed for bytes_saved, _ in found):
        found.append((saved(together), "all of these with the same tasks and devices"))
    found.sort(key=lambda one: (one[0] < needed, one[0] if one[0] >= needed else -one[0]))
    for bytes_saved, what in found:
        if bytes_saved > 0:
            verdict = "enough" if bytes_saved >= needed else "not enough alone"
            yield f"{what}: saves {size(bytes_saved)} ({verdict})"
