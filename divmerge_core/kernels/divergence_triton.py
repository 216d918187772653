"""The Triton kernels of `divergence`: the loss of a row, the loss of a wide row, and the gradient.

All compute in float32. x and y are the logits of expert and merged model, p and q their softmax.
`state` is a [5, A] matrix of what the gradient needs of a row: the sum of its slopes, and for
either side its largest logit and its mass, sum_v exp(logit_v - largest).
"""

import torch
from torch import Tensor

from divmerge_core.kernels.backend import device_of, jit, tl

# Classes: the widest row, a power of two, that stays in registers; no kind or precision spills any
# on sm_80, sm_90 and gfx942. NVIDIA's 1024 threads have 64 each, which 32768 classes would fill.
WHOLE_ROW = 16384
STEP = 4096  # classes that a program takes at a time from wider rows
TILE = 2048  # classes that a program takes at least; narrow rows share one
PER_THREAD = 16  # classes of either side that a thread holds


@jit
def load(logits, rows, columns, stride, inside):
    """Logits in float32; outside of the matrix -inf, which is a class of probability 0."""
    offsets = rows.to(tl.int64) * stride + columns  # A V may exceed 2^31
    return tl.load(logits + offsets, mask=inside, other=float("-inf")).to(tl.float32)


@jit
def exp(x):
    """e^x by the hardware's 2^x: `tl.exp` spends three more instructions on subnormal results."""
    return tl.exp2(x * 1.4426950408889634)  # log2 e


@jit
def extend(largest, mass, x):
    """Each row's largest logit and mass, updated with the classes x."""
    new = tl.maximum(largest, tl.max(x, axis=1, keep_dims=True))
    kept = mass * exp(tl.maximum(largest - new, -1e30))  # it may start at float32's lowest
    return new, kept + tl.sum(exp(x - new), axis=1, keep_dims=True)


@jit
def log_softmax(x, largest, mass):
    """x - largest - log mass, one after the other: `largest` may be 1e4. A valid mass is >= 1."""
    return x - largest - tl.log(tl.maximum(mass, 1.0))


@jit
def terms_and_slopes(log_p, log_q, beta, KIND: tl.constexpr):
    """Class by class f(p, q), its slope q df/dq, and q; all are 0 where both sides mask it."""
    finite_p, finite_q = tl.maximum(log_p, -1e30), tl.maximum(log_q, -1e30)  # -inf - -inf is NaN
    if KIND == "js":
        ahead = finite_q - finite_p
        gap = tl.abs(ahead)
        size, ratio = exp(tl.maximum(finite_p, finite_q)), exp(-gap)  # the larger; smaller / larger
        large = tl.where(ahead > 0, beta, 1 - beta)  # what the larger one adds to m / size
        small = (1 - large) * ratio
        mix = large + small  # m / size; m itself may underflow
        log_mix = tl.log(mix)
        term = -size * (small * gap + mix * log_mix)
        q = size * tl.where(ahead > 0, 1.0, ratio)
        slope = beta * q * (tl.minimum(ahead, 0.0) - log_mix)
    else:
        p, q = exp(log_p), exp(log_q)
        forward = p * tl.where(p == 0, 0.0, finite_p - log_q)
        reverse = q * tl.where(q == 0, 0.0, finite_q - log_p)
        if KIND == "kl":
            term, slope = forward, -p
        elif KIND == "reverse_kl":
            term, slope = reverse, reverse
        else:
            term, slope = forward + reverse, reverse - p
    return term, slope, q


@jit
def store_loss(loss, rows, num_rows, term, slope, mass_p, mass_q):
    """Store each row's sum of terms, return that of slopes; NaN where there is no distribution."""
    sound = (mass_p > 0) & (mass_q > 0)
    term = tl.where(sound, tl.sum(term, axis=1, keep_dims=True), float("nan"))
    total = tl.sum(slope, axis=1, keep_dims=True)
    tl.store(loss + rows, term, mask=rows < num_rows)
    return tl.where(sound & (total < float("inf")), total, float("nan"))


@jit
def store_state(state, rows, num_rows, total, largest_p, mass_p, largest_q, mass_q):
    """Keep what `gradients` needs of each row."""
    inside = rows < num_rows
    tl.store(state + rows, total, mask=inside)
    tl.store(state + num_rows + rows, largest_p, mask=inside)
    tl.store(state + num_rows * 2 + rows, mass_p, mask=inside)
    tl.store(state + num_rows * 3 + rows, largest_q, mask=inside)
    tl.store(state + num_rows * 4 + rows, mass_q, mask=inside)


@jit
def store_gradient(
    gradient, incoming, rows, columns, num_rows, num_classes, inside, slope, q, total
):
    """slope - q total, times what comes in for the row, or 1 if `incoming` is None."""
    value = slope - q * total
    if incoming is not None:
        value *= tl.load(incoming + rows, mask=rows < num_rows, other=0.0)
    offsets = rows.to(tl.int64) * num_classes + columns
    tl.store(gradient + offsets, value.to(gradient.dtype.element_ty), mask=inside)


@jit
def whole_rows(
    expert, merged, stride_p, stride_q, num_rows, num_classes, beta, loss, state, incoming,
    gradient,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of ROWS rows of at most BLOCK classes; each side is read once.

    Of `state` and `gradient` one is None: stored is what a later gradient needs, or this itself.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = (rows < num_rows) & (columns < num_classes)
    x = load(expert, rows, columns, stride_p, inside)
    y = load(merged, rows, columns, stride_q, inside)
    lowest = tl.full([ROWS, 1], -3.4028234663852886e38, tl.float32)  # -inf - -inf would be NaN
    largest_p, mass_p = extend(lowest, 0.0, x)
    largest_q, mass_q = extend(lowest, 0.0, y)
    log_p, log_q = log_softmax(x, largest_p, mass_p), log_softmax(y, largest_q, mass_q)
    term, slope, q = terms_and_slopes(log_p, log_q, beta, KIND)
    total = store_loss(loss, rows, num_rows, term, slope, mass_p, mass_q)
    if gradient is None:
        store_state(state, rows, num_rows, total, largest_p, mass_p, largest_q, mass_q)
    else:
        store_gradient(gradient, incoming, rows, columns, num_rows, num_classes, inside, slope, q,
                       total)  # fmt: skip


@jit
def wide_rows(
    expert, merged, stride_p, stride_q, num_rows, num_classes, beta, loss, state,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of ROWS rows of any width: read once for largest logit and mass, once to compare."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    largest_p = tl.full([ROWS, 1], -3.4028234663852886e38, tl.float32)
    largest_q = largest_p
    mass_p = tl.zeros([ROWS, 1], tl.float32)
    mass_q = mass_p
    for start in range(0, num_classes, BLOCK):
        inside = (rows < num_rows) & (start + columns < num_classes)
        x = load(expert, rows, start + columns, stride_p, inside)
        y = load(merged, rows, start + columns, stride_q, inside)
        largest_p, mass_p = extend(largest_p, mass_p, x)
        largest_q, mass_q = extend(largest_q, mass_q, y)
    terms = tl.zeros([ROWS, BLOCK], tl.float32)
    slopes = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, num_classes, BLOCK):
        inside = (rows < num_rows) & (start + columns < num_classes)
        x = load(expert, rows, start + columns, stride_p, inside)
        y = load(merged, rows, start + columns, stride_q, inside)
        log_p, log_q = log_softmax(x, largest_p, mass_p), log_softmax(y, largest_q, mass_q)
        term, slope, _ = terms_and_slopes(log_p, log_q, beta, KIND)
        terms += term
        slopes += slope
    total = store_loss(loss, rows, num_rows, terms, slopes, mass_p, mass_q)
    store_state(state, rows, num_rows, total, largest_p, mass_p, largest_q, mass_q)


@jit
def gradients(
    expert, merged, stride_p, stride_q, num_rows, num_classes, beta, state, incoming, gradient,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient in ROWS times BLOCK merged logits, times what comes in for each row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    real = rows < num_rows
    inside = real & (columns < num_classes)
    total = tl.load(state + rows, mask=real, other=0.0)
    largest_p = tl.load(state + num_rows + rows, mask=real, other=0.0)
    mass_p = tl.load(state + num_rows * 2 + rows, mask=real, other=0.0)
    largest_q = tl.load(state + num_rows * 3 + rows, mask=real, other=0.0)
    mass_q = tl.load(state + num_rows * 4 + rows, mask=real, other=0.0)
    log_p = log_softmax(load(expert, rows, columns, stride_p, inside), largest_p, mass_p)
    log_q = log_softmax(load(merged, rows, columns, stride_q, inside), largest_q, mass_q)
    _, slope, q = terms_and_slopes(log_p, log_q, beta, KIND)
    store_gradient(gradient, incoming, rows, columns, num_rows, num_classes, inside, slope, q,
                   total)  # fmt: skip


def tiling(num_classes: int, limit: int) -> dict[str, int]:
    """Rows, classes (at most `limit`) and warps of one program."""
    block = min(1 << (num_classes - 1).bit_length(), limit)
    rows = max(1, TILE // block)
    warp = 64 if torch.version.hip else 32
    return {"ROWS": rows, "BLOCK": block, "num_warps": rows * block // PER_THREAD // warp}


def launch(kernel, limit: int, expert: Tensor, merged: Tensor, kind: str, beta: float, *rest):
    """Run a kernel on all rows of [A, V] logits with unit stride along V."""
    num_rows, num_classes = merged.shape
    tile = tiling(num_classes, limit)
    parts = -(-num_classes // tile["BLOCK"]) if kernel is gradients else 1
    grid = -(-num_rows // tile["ROWS"]), parts
    given = expert, merged, expert.stride(0), merged.stride(0), num_rows, num_classes, beta
    with device_of(merged):
        kernel[grid](*given, *rest, KIND=kind, **tile)


def loss_and_state(expert: Tensor, merged: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Loss [A] and state [5, A], for a gradient later on."""
    loss = torch.empty(len(merged), dtype=torch.float32, device=merged.device)
    state = loss.new_empty(5, len(merged))
    given = expert, merged, kind, beta, loss, state
    if merged.shape[1] <= WHOLE_ROW:
        launch(whole_rows, WHOLE_ROW, *given, None, None)
    else:
        launch(wide_rows, STEP, *given)
    return loss, state


def gradient(
    expert: Tensor, merged: Tensor, kind: str, beta: float, state: Tensor, incoming: Tensor | None
) -> Tensor:
    """Gradient [A, V] in the merged logits and their dtype; `incoming` [A] or None, which is 1."""
    result = torch.empty(merged.shape, dtype=merged.dtype, device=merged.device)
    launch(gradients, TILE, expert, merged, kind, beta, state, incoming, result)
    return result


def loss_and_gradient(
    expert: Tensor, merged: Tensor, kind: str, beta: float, incoming: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both in one launch if a row fits in registers, else by the two functions above."""
    if merged.shape[1] > WHOLE_ROW:
        loss, state = loss_and_state(expert, merged, kind, beta)
        return loss, gradient(expert, merged, kind, beta, state, incoming)
    loss = torch.empty(len(merged), dtype=torch.float32, device=merged.device)
    result = torch.empty(merged.shape, dtype=merged.dtype, device=merged.device)
    launch(whole_rows, WHOLE_ROW, expert, merged, kind, beta, loss, None, incoming, result)
    return loss, result
