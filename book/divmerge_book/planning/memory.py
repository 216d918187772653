"""What a fit or a fine-tuning will hold in memory, planned before anything is loaded.

Every line is a formula of the model's numbers. Weights, task vectors, gradients, answers and logits
are exact; activations are what blocks keep for their backward pass, counted on small models (see
tests/test_memory.py), with attention fused and no dropout. What a library allocates for a moment is
not in it, nor are gaps between allocations: leave some room.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from divmerge_book.planning.gpu_specs import ACCELERATORS, GB
from divmerge_book.planning.savings import devices, smaller_fits, smaller_trainings, what_is_lost
from divmerge_book.planning.workloads import DELTAS, KINDS, PRECISIONS, Fit, Model, Training
from divmerge_core.kernels.delta_storage import CHUNK

CONTEXT = GB  # set aside for the driver's own needs and for short-lived tensors; an assumption


@dataclass(frozen=True)
class Line:
    """One part of a plan: what, how many bytes, and why as many."""

    what: str
    nbytes: float | int
    why: str


@dataclass(frozen=True)
class Change:
    """One way to need less: what to change, bytes saved, and whether it is enough by itself."""

    what: str
    fit: Fit | Training
    saved: float | int
    enough: bool


@dataclass(frozen=True)
class Plan:
    """Bytes by line, against a device's capacity; str() is a table.

    host: bytes in the host's memory, beside the device. advice: changes, the smallest that is
    enough first; empty where it fits.
    """

    title: str
    device: str
    lines: tuple[Line, ...]
    capacity: float | int
    host: float | int = 0
    advice: tuple[Change, ...] = ()

    @property
    def total(self) -> float | int:
        """Bytes on one device."""
        return sum(line.nbytes for line in self.lines)

    @property
    def fits(self) -> bool:
        """Whether the device has room for all of it."""
        return self.total <= self.capacity

    def __str__(self) -> str:
        width = max(len(line.what) for line in self.lines)
        rows = [f"{line.what:<{width}}  {size(line.nbytes)}  {line.why}" for line in self.lines]
        verdict = "fits" if self.fits else "does not fit"
        rows += [f"{'total':<{width}}  {size(self.total)}  {verdict} {self.device}"]
        rows += [f"{'capacity':<{width}}  {size(self.capacity)}"]
        if self.host:
            rows += [f"{'host memory':<{width}}  {size(self.host)}  beside the device"]
        for change in self.advice:
            enough = "enough" if change.enough else "not enough alone"
            rows.append(f"- {change.what}: saves {size(change.saved).strip()} ({enough})")
        return "\n".join([self.title, *rows])


def size(nbytes: float | int) -> str:
    """Bytes as gigabytes (10^9), or megabytes where they are few."""
    return f"{nbytes / GB:8.2f} GB" if nbytes >= GB / 10 else f"{nbytes / 1e6:8.2f} MB"


def room(device: str | float | int) -> tuple[str, float]:
    """A device's name and bytes: of a name in ACCELERATORS, or as given."""
    if isinstance(device, str):
        found = ACCELERATORS[device]
        return found.name, float(found.memory)
    if not device > 0:
        raise ValueError(f"a device has more than 0 bytes, got {device}")
    return "the device", float(device)


# --- activations ----------------------------------------------------------------------------------


def kept_by_layer(model: Model, precision: str = "float32") -> float | int:
    """Bytes that one layer keeps per token for its backward pass, weights' copies aside."""
    kept, size = KINDS[model.kind], PRECISIONS[precision]
    inputs = kept.inputs if precision == "float32" else kept.inputs_half
    wide = 4 * (kept.wide * model.hidden + kept.statistics + model.heads)
    attention = model.hidden + 2 * model.keys
    return wide + size * (inputs * model.hidden + attention + kept.inner * model.inner)


def activations(model: Model, tokens: int, precision: str, checkpointing: bool) -> Line:
    """What the layers keep of that many tokens; with checkpointing, each its input, and one all."""
    per_layer = kept_by_layer(model, precision)
    ends = 8 * model.hidden + 4  # the last norm
    if checkpointing:
        each = model.layers * 4 * model.hidden + per_layer + ends
        return Line("activations", tokens * each, f"{tokens} tokens, each layer's input kept")
    why = f"{tokens} tokens x {model.layers} layers x {per_layer:.0f} bytes"
    return Line("activations", tokens * (model.layers * per_layer + ends), why)


def copies(model: Model, precision: str) -> Iterator[Line]:
    """Half-precision copies of the weights, which products keep for the backward pass."""
    if precision == "bfloat16":
        yield Line("weights in bfloat16", 2 * model.products, "2 bytes, what is multiplied")


# --- a fit ----------------------------------------------------------------------------------------


def deltas_line(model: Model, fit: Fit) -> Line:
    """The task vectors, or what of them is on the device at a time."""
    each, own = DELTAS[fit.deltas], model.parameters / fit.ranks
    if fit.deltas == "low_rank":
        numbers = fit.rank * model.layers * model.sides / fit.ranks
        return Line("task vectors", fit.tasks * each * numbers, f"{fit.tasks} of rank {fit.rank}")
    if fit.deltas.startswith("streamed"):
        at_once = min(own, CHUNK) * fit.tasks
        wider = "" if each == 4 else ", and one in float32"
        why = f"two buffers of {min(int(own), CHUNK)} columns{wider}"
        return Line("task vectors", at_once * (2 * each + 4 * (each != 4)), why)
    return Line("task vectors", fit.tasks * each * own, f"{fit.tasks} x N x {each:.4g} bytes")


def gradient_line(model: Model, fit: Fit) -> Line:
    """The buffer of all gradients, or the largest tensor's."""
    if fit.ranks > 1:
        most = max(model.ends, model.block)
        return Line("gradients", 4 * most, "of what is gathered at a time, before it is summed")
    if fit.gradients == "buffer":
        return Line("gradients", 4 * model.parameters, "N x 4 bytes")
    held, why = (2, "twice: embeddings and head") if model.tied else (1, "4 bytes")
    return Line("gradients", 4 * held * model.largest, f"of the largest tensor, {why}")


def fit_lines(model: Model, fit: Fit) -> Iterator[Line]:
    """Every part of a fit, on one device of `fit.ranks`."""
    own, share = model.parameters / fit.ranks, f" / {fit.ranks}" if fit.ranks > 1 else ""
    size, classes = PRECISIONS[fit.precision], fit.classes or model.vocabulary
    if not classes:
        raise ValueError("an encoder has no vocabulary to answer with; give classes in Fit")
    yield Line("base", 4 * own, f"N{share} x 4 bytes")
    yield Line("live buffer", 4 * own, f"N{share} x 4 bytes, the merged model")
    if fit.ranks > 1:
        yield Line("shares in the model", 4 * own, "what ranks gather from")
        gathered = size * (model.ends + 2 * model.block)
        yield Line("gathered weights", gathered, "embeddings, head, and two blocks at a time")
    else:
        yield from copies(model, fit.precision)
    yield deltas_line(model, fit)
    yield gradient_line(model, fit)
    tokens = fit.tasks * -(-fit.rows // fit.ranks) * fit.tokens
    yield activations(model, tokens, fit.precision, fit.checkpointing)
    answers = fit.tasks * -(-fit.positions // fit.ranks)
    why = f"{answers} answers x {classes} classes x {size} bytes"
    yield Line("logits", answers * classes * size, why)
    yield Line("gradient of logits", answers * classes * size, "the same")
    each = {"float32": 4 * classes, "bfloat16": 2 * classes, "top": 12 * fit.top + 4}[fit.cached]
    cached = fit.tasks * -(-fit.inputs * fit.positions // (fit.rows * fit.ranks))
    yield Line("experts' answers", cached * each, f"{cached} x {each} bytes")
    yield Line("context", CONTEXT, "set aside (assumed)")


def plan(model: Model, fit: Fit, device: str | float | int = "t4") -> Plan:
    """The plan of a fit on a device: a name in ACCELERATORS, or bytes.

    Raises ValueError for an unknown device and for an encoder without a number of classes.
    """
    name, capacity = room(device)
    made = Plan(
        f"Fit: {model.name}, N = {model.parameters:,}, {fit.tasks} tasks",
        name,
        tuple(fit_lines(model, fit)),
        capacity,
        host_bytes(model, fit),
    )
    if made.fits:
        return made
    return replace(made, advice=advised(model, fit, capacity, smaller_fits, plan_total))


def host_bytes(model: Model, fit: Fit) -> float | int:
    """What streamed task vectors take in the host's memory."""
    streamed = fit.deltas.startswith("streamed")
    return fit.tasks * DELTAS[fit.deltas] * model.parameters / fit.ranks if streamed else 0.0


def plan_total(model: Model, work: Fit | Training) -> float | int:
    """Bytes of a fit or a fine-tuning on one device."""
    lines = fit_lines if isinstance(work, Fit) else training_lines
    return sum(line.nbytes for line in lines(model, work))


def advised(
    model: Model, work: Fit | Training, capacity: float | int, smaller: Callable, total: Callable
) -> tuple[Change, ...]:
    """Changes that save something: enough alone, least first; then others, most first.

    Where none is enough on as many devices, several together come last, dropping tasks after all.
    """

    def fits(one: Fit | Training) -> bool:
        return total(model, one) <= capacity

    def changes(now: Fit | Training) -> list[Change]:
        before = total(model, now)
        found = [
            Change(what, w, before - total(model, w), fits(w)) for what, w in smaller(now, fits)
        ]
        return [change for change in found if change.saved > 0]

    found = sorted(changes(work), key=lambda c: (not c.enough, c.saved if c.enough else -c.saved))
    now, names = work, []
    if any(change.enough and devices(change.fit) == devices(work) for change in found):
        return tuple(found)
    while not fits(now) and (left := [c for c in changes(now) if devices(c.fit) == devices(now)]):
        best = min(left, key=lambda c: (*what_is_lost(now, c.fit), -c.saved))
        now, names = best.fit, [*names, best.what]
    saved = total(model, work) - total(model, now)
    return (*found, Change("together: " + "; ".join(names), now, saved, fits(now)))


# --- fine-tuning ----------------------------------------------------------------------------------


def training_lines(model: Model, training: Training) -> Iterator[Line]:
    """Every part of fine-tuning with AdamW, weights and states in float32."""
    size, classes = PRECISIONS[training.precision], training.classes or model.vocabulary
    if not classes:
        raise ValueError("an encoder has no vocabulary to answer with; give classes in Training")
    yield Line("weights", 4 * model.parameters, "N x 4 bytes")
    yield Line("AdamW's two means", 8 * model.parameters, "N x 8 bytes")
    yield Line("gradients", 4 * model.parameters, "N x 4 bytes")
    yield from copies(model, training.precision)
    tokens = training.rows * training.tokens
    yield activations(model, tokens, training.precision, training.checkpointing)
    logits = training.positions * classes
    yield Line("logits", logits * size, f"{training.positions} answers x {classes} x {size} bytes")
    yield Line("gradient of logits", logits * size, "the same")
    yield Line("context", CONTEXT, "set aside (assumed)")


def training_plan(model: Model, training: Training, device: str | float | int = "t4") -> Plan:
    """The plan of a fine-tuning of all weights on a device, as `plan` of a fit."""
    name, capacity = room(device)
    title = f"Fine-tuning: {model.name}, N = {model.parameters:,}"
    made = Plan(title, name, tuple(training_lines(model, training)), capacity)
    if made.fits:
        return made
    return replace(made, advice=advised(model, training, capacity, smaller_trainings, plan_total))
