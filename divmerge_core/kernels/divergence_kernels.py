"""The Triton kernels of `divergence`: the loss of a row, the loss of a wide row, and the gradient.

All compute in float32. x and y are the logits of expert and merged model, p and q their softmax.
`state` is a [5, A] matrix of what the gradient needs of a row: the sum of its slopes, and for
either side its largest logit and its mass, sum_v exp(logit_v - largest).
"""

import torch
from torch import Tensor

from divmerge_core.kernels.backend import jit, on, tl

WHOLE_ROW = 8192  # classes: the widest row, a power of two, that stays in registers without spills
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
    """Each row's largest logit and mass, once the classes x are taken in."""
    new = tl.maximum(largest, tl.max(x, axis=1, keep_dims=True))
    kept = mass * exp(tl.maximum(largest - new, -1e30))  # it may start at float32's lowest
    return new, kept + tl.sum(exp(x - new), axis=1, keep_dims=True)


@jit
def log_softmax(x, largest, mass):
    """Subtracted in turn, as `largest` may be 1e4. The mass is 1 or more in any sound row."""
    return x - largest - tl.log(tl.maximum(mass, 1.0))


@jit
def compare(log_p, log_q, beta, KIND: tl.constexpr):
    """Class by class f(p, q), its slope q df/dq, and q; all are 0 where both sides rule it out."""
    finite_p, finite_q = tl.maximum(log_p, -1e30), tl.maximum(log_q, -1e30)  # -inf - -inf is NaN
    if KIND == "js":
        top = tl.maximum(finite_p, finite_q)
        low_p, low_q = finite_p - top, finite_q - top  # one is 0, so that mix does not underflow
        size, share_q = exp(top), exp(low_q)
        q = size * share_q
        share_p, share_q = (1 - beta) * exp(low_p), beta * share_q
        log_mix = tl.log(share_p + share_q)  # log m - top
        slope = size * share_q * (low_q - log_mix)
        term = size * share_p * (low_p - log_mix) + slope
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
def store(loss, state, rows, num_rows, term, slope, largest_p, mass_p, largest_q, mass_q):
    """Sum terms into the loss and slopes into `state`; NaN for a row without a distribution."""
    inside = rows < num_rows
    sound = (mass_p > 0) & (mass_q > 0)
    term = tl.where(sound, tl.sum(term, axis=1, keep_dims=True), float("nan"))
    slope = tl.sum(slope, axis=1, keep_dims=True)
    slope = tl.where(sound & (slope < float("inf")), slope, float("nan"))
    tl.store(loss + rows, term, mask=inside)
    tl.store(state + rows, slope, mask=inside)
    tl.store(state + num_rows + rows, largest_p, mask=inside)
    tl.store(state + num_rows * 2 + rows, mass_p, mask=inside)
    tl.store(state + num_rows * 3 + rows, largest_q, mask=inside)
    tl.store(state + num_rows * 4 + rows, mass_q, mask=inside)


@jit
def whole_rows(
    expert,
    merged,
    stride_p,
    stride_q,
    num_rows,
    num_classes,
    beta,
    loss,
    state,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of ROWS rows of at most BLOCK classes; each side is read once."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    columns = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside = (rows < num_rows) & (columns < num_classes)
    x = load(expert, rows, columns, stride_p, inside)
    y = load(merged, rows, columns, stride_q, inside)
    lowest = tl.full([ROWS, 1], -3.4028234663852886e38, tl.float32)  # -inf - -inf would be NaN
    largest_p, mass_p = extend(lowest, 0.0, x)
    largest_q, mass_q = extend(lowest, 0.0, y)
    log_p, log_q = log_softmax(x, largest_p, mass_p), log_softmax(y, largest_q, mass_q)
    term, slope, _ = compare(log_p, log_q, beta, KIND)
    store(loss, state, rows, num_rows, term, slope, largest_p, mass_p, largest_q, mass_q)


@jit
def wide_rows(
    expert,
    merged,
    stride_p,
    stride_q,
    num_rows,
    num_classes,
    beta,
    loss,
    state,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
        term, slope, _ = compare(log_p, log_q, beta, KIND)
        terms += term
        slopes += slope
    store(loss, state, rows, num_rows, terms, slopes, largest_p, mass_p, largest_q, mass_q)


@jit
def gradients(
    expert,
    merged,
    stride_p,
    stride_q,
    num_rows,
    num_classes,
    beta,
    state,
    incoming,
    gradient,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    scale = tl.load(incoming + rows, mask=real, other=0.0)
    log_p = log_softmax(load(expert, rows, columns, stride_p, inside), largest_p, mass_p)
    log_q = log_softmax(load(merged, rows, columns, stride_q, inside), largest_q, mass_q)
    _, slope, q = compare(log_p, log_q, beta, KIND)
    offsets = rows.to(tl.int64) * num_classes + columns
    value = scale * (slope - q * total)
    tl.store(gradient + offsets, value.to(gradient.dtype.element_ty), mask=inside)


def tiling(num_classes: int, limit: int) -> dict[str, int]:
    """What a program takes: its rows, its classes (at most `limit`) and its warps."""
    block = min(1 << (num_classes - 1).bit_length(), limit)
    rows = max(1, TILE // block)
    warp = 64 if torch.version.hip else 32
    return {"ROWS": rows, "BLOCK": block, "num_warps": rows * block // PER_THREAD // warp}


def loss_and_state(expert: Tensor, merged: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Loss [A] and state [5, A] of two logit matrices [A, V] with unit stride along V."""
    num_rows, num_classes = merged.shape
    loss = torch.empty(num_rows, dtype=torch.float32, device=merged.device)
    state = torch.empty(5, num_rows, dtype=torch.float32, device=merged.device)
    whole = num_classes <= WHOLE_ROW
    tile = tiling(num_classes, WHOLE_ROW if whole else STEP)
    kernel = (whole_rows if whole else wide_rows)[(cdiv(num_rows, tile["ROWS"]),)]
    sides = expert, merged, expert.stride(0), merged.stride(0)
    with on(merged):
        kernel(*sides, num_rows, num_classes, beta, loss, state, KIND=kind, **tile)
    return loss, state


def gradient(
    expert: Tensor, merged: Tensor, kind: str, beta: float, state: Tensor, incoming: Tensor
) -> Tensor:
    """Gradient [A, V] in the merged logits and their dtype, from the incoming one [A]."""
    num_rows, num_classes = merged.shape
    result = torch.empty(merged.shape, dtype=merged.dtype, device=merged.device)
    tile = tiling(num_classes, TILE)
    grid = cdiv(num_rows, tile["ROWS"]), cdiv(num_classes, tile["BLOCK"])
    sides = expert, merged, expert.stride(0), merged.stride(0)
    with on(merged):
        gradients[grid](
            *sides, num_rows, num_classes, beta, state, incoming, result, KIND=kind, **tile
        )
    return result


def cdiv(a: int, b: int) -> int:
    """How many portions of b hold a."""
    return -(-a // b)
