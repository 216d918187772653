r"""The merge itself and its gradient, over a whole model at once.

Forward,  theta = theta_0 + sum_t Lambda[t, g] tau_t        on each group g of parameters;
gradient, dL/dLambda[t, g] = < dL/dtheta_g, tau_{t,g} >.

Both are limited by memory: forward reads base and T deltas and writes theta, (T + 2) N numbers;
the gradient reads dL/dtheta and T deltas, (T + 1) N. Sums are in float32 (float64 for a float64
base) whatever the dtype of base and deltas. Two backends compute the same: `torch`, the
definition; and `triton`, one launch for the whole model.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from divmerge_core.kernels import delta_storage
from divmerge_core.kernels.backend import device_of, jit, resolve_backend, tl
from divmerge_core.kernels.delta_storage import SCALE_BLOCK, Deltas, Int8Deltas, LowRankDeltas, wide
from divmerge_core.kernels.segments import Segments, block_table
from divmerge_core.kernels.threads import in_threads

BLOCK = 4096  # parameters per program on a GPU, read as rows of SCALE_BLOCK
uncompiled = torch.compiler.disable if torch.version.cuda or torch.version.hip else lambda f: f


# --- PyTorch --------------------------------------------------------------------------------------
def merge_rows(base, deltas, coeffs, out, rows) -> None:
    """The definition: in each group, the base plus a row of coefficients times a matrix."""
    for start, stop, group in rows:
        for low, high, matrix in delta_storage.columns(deltas, start, stop, coeffs.dtype):
            vector, row = base[None, low:high], coeffs[None, :, group]
            if base.dtype == coeffs.dtype:  # one pass, no temporary
                torch.addmm(vector, row, matrix, out=out[None, low:high])
            else:
                out[low:high] = torch.addmm(vector.to(coeffs.dtype), row, matrix)[0]


def inner_range(
    grad: Float[Tensor, " n"], deltas: Deltas, start: int, stop: int
) -> Float[Tensor, " T"]:
    """The gradient's definition: <grad, tau_t> over the parameters start..stop, in order."""
    dtype = wide(grad.dtype)
    if isinstance(deltas, LowRankDeltas):
        return deltas.inner(grad.to(dtype), start, stop)
    total = grad.new_zeros(deltas.shape[0], dtype=dtype)
    for low, high, matrix in delta_storage.columns(deltas, start, stop, dtype):
        total += matrix @ grad[low - start : high - start].to(dtype)
    return total


def add_inner(total, grad, deltas, rows, begin: int = 0) -> None:
    """Add <grad, tau_t> over every row (start, stop, group) to its column of total [T, G].

    grad: of the parameters from `begin` on, over all rows.
    """
    for start, stop, group in rows:
        total[:, group] += inner_range(grad[start - begin : stop - begin], deltas, start, stop)


def inner_torch(grad, deltas, segments) -> Tensor:
    """The gradient on every group; the shares of the threads are added in order.

    The products of low-rank factors are large enough for PyTorch's own threads.
    """

    def share(rows) -> Tensor:
        result = grad.new_zeros(deltas.shape[0], segments.num_groups, dtype=wide(grad.dtype))
        add_inner(result, grad, deltas, rows)
        return result

    if isinstance(deltas, LowRankDeltas):
        return share(segments.rows)
    return sum(in_threads(share, segments, grad))


# --- Triton ---------------------------------------------------------------------------------------
@jit
def read(pointer, offsets, inside, MASKED: tl.constexpr):
    """Numbers as float32. A mask forbids 128-bit loads, so full blocks are read without one."""
    if MASKED:
        return tl.load(pointer + offsets, mask=inside, other=0).to(tl.float32)
    else:
        return tl.load(pointer + offsets).to(tl.float32)


@jit
def places(low, high, ROWS: tl.constexpr, ROW: tl.constexpr):
    """The aligned block around low..high: its rows' numbers, its places, and which are inside."""
    rows = low // (ROWS * ROW) * ROWS + tl.arange(0, ROWS)[:, None]
    offsets = rows * ROW + tl.arange(0, ROW)[None, :]
    return rows, offsets, (offsets >= low) & (offsets < high)


@jit
def merge_block(
    base, deltas, scales, coeffs, out, low, high, group, stride, num_scales, num_groups, T,
    INT8: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    rows, offsets, inside = places(low, high, ROWS, ROW)
    total = read(base, offsets, inside, MASKED)
    for t in range(T):  # not unrolled: all tasks' loads at once would need too many registers
        weight = tl.load(coeffs + t * num_groups + group)
        if INT8:
            weight *= tl.load(scales + rows, mask=rows < num_scales, other=0)
            scales += num_scales
        total += weight * read(deltas, offsets, inside, MASKED)
        deltas += stride  # a running pointer: t * stride may exceed 32 bits
    if MASKED:
        tl.store(out + offsets, total, mask=inside)
    else:
        tl.store(out + offsets, total)


@jit
def merge_kernel(
    table, base, deltas, scales, coeffs, out, stride, num_scales, num_groups, T,
    INT8: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """theta on one block of one group."""
    entry = table + 3 * tl.program_id(0)
    low, high, group = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    if high - low == ROWS * ROW:
        merge_block(base, deltas, scales, coeffs, out, low, high, group, stride, num_scales,
                    num_groups, T, INT8, ROWS, ROW, False)  # fmt: skip
    else:
        merge_block(base, deltas, scales, coeffs, out, low, high, group, stride, num_scales,
                    num_groups, T, INT8, ROWS, ROW, True)  # fmt: skip


@jit
def inner_block(
    grad, deltas, scales, partial, low, high, stride, num_scales, num_blocks, T,
    INT8: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    rows, offsets, inside = places(low, high, ROWS, ROW)
    slope = read(grad, offsets, inside, MASKED)
    for _ in range(T):
        product = slope * read(deltas, offsets, inside, MASKED)
        if INT8:
            product *= tl.load(scales + rows, mask=rows < num_scales, other=0)
            scales += num_scales
        tl.store(partial, tl.sum(product))
        deltas += stride
        partial += num_blocks


@jit
def inner_kernel(
    table, grad, deltas, scales, partial, stride, num_scales, num_blocks, T,
    INT8: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """<grad, tau_t> on one block, for all tasks: the gradient is read once."""
    entry = table + 3 * tl.program_id(0)
    low, high = tl.load(entry), tl.load(entry + 1)
    partial += tl.program_id(0)
    if high - low == ROWS * ROW:
        inner_block(grad, deltas, scales, partial, low, high, stride, num_scales, num_blocks,
                    T, INT8, ROWS, ROW, False)  # fmt: skip
    else:
        inner_block(grad, deltas, scales, partial, low, high, stride, num_scales, num_blocks,
                    T, INT8, ROWS, ROW, True)  # fmt: skip


@jit
def reduce_kernel(starts, partial, out, num_blocks, num_groups, WIDTH: tl.constexpr):
    """The blocks' sums of one group and task, added in a fixed order: no atomics."""
    group, t = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(starts + group), tl.load(starts + group + 1)
    total = tl.zeros([WIDTH], tl.float32)
    for low in range(first, last, WIDTH):
        block = low + tl.arange(0, WIDTH)
        total += tl.load(partial + t * num_blocks + block, mask=block < last, other=0)
    tl.store(out + t * num_groups + group, tl.sum(total))


def launch(deltas: Tensor | Int8Deltas, segments: Segments) -> tuple:
    """Table of blocks, and what both kernels are told about the deltas."""
    int8 = isinstance(deltas, Int8Deltas)
    values, scales = (deltas.values, deltas.scales) if int8 else (deltas, deltas)
    table, starts = block_table(segments, BLOCK, values.device)
    shape = {"T": len(values), "INT8": int8, "ROWS": BLOCK // SCALE_BLOCK, "ROW": SCALE_BLOCK}
    return table, starts, values, scales, values.stride(0), scales.shape[1] if int8 else 0, shape


@uncompiled  # a compiled step calls the launch as it is
def merge_triton(base, deltas, coeffs, segments, out) -> None:
    """One launch for the whole model, whatever the number of tensors."""
    table, _, values, scales, stride, num_scales, shape = launch(deltas, segments)
    if len(table):
        with device_of(base):
            merge_kernel[(len(table),)](
                table, base, values, scales, coeffs, out, stride, num_scales, coeffs.shape[1],
                **shape, num_warps=8,
            )  # fmt: skip


@uncompiled
def inner_triton(grad, deltas, segments) -> Tensor:
    """One pass over gradient and deltas, then a reduction of one number per block and task."""
    table, starts, values, scales, stride, num_scales, shape = launch(deltas, segments)
    result = grad.new_zeros(shape["T"], segments.num_groups, dtype=torch.float32)
    partial = result.new_empty(shape["T"], len(table))
    if len(table):
        with device_of(grad):
            inner_kernel[(len(table),)](
                table, grad, values, scales, partial, stride, num_scales, len(table),
                **shape, num_warps=8,
            )  # fmt: skip
            reduce_kernel[tuple(result.T.shape)](
                starts, partial, result, len(table), segments.num_groups, WIDTH=1024
            )
    return result


# --- what others call -----------------------------------------------------------------------------
def write(base, deltas, coeffs, segments, out, backend) -> Tensor:
    """The forward formula into `out`, on a backend already resolved."""
    base, coeffs = base.detach(), coeffs.detach().to(wide(base.dtype)).contiguous()
    if isinstance(deltas, LowRankDeltas):
        deltas.merge(base, coeffs, segments, out)
    elif backend == "triton" and not isinstance(deltas, delta_storage.StreamedDeltas):
        merge_triton(base, deltas, coeffs, segments, out)
    else:
        in_threads(partial(merge_rows, base, deltas, coeffs, out), segments, base)
    return out


class Merge(torch.autograd.Function):
    """theta, with gradients to base and coefficients."""

    @staticmethod
    def forward(ctx, base, coeffs, deltas, segments, backend):
        ctx.rest = (deltas, segments, backend, coeffs.dtype)
        return write(base, deltas, coeffs, segments, torch.empty_like(base), backend)

    @staticmethod
    def backward(ctx, grad):
        deltas, segments, backend, dtype = ctx.rest
        inner = grouped_inner(grad.contiguous(), deltas, segments, backend=backend).to(dtype)
        return grad, inner, None, None, None


def grouped_merge(
    base: Float[Tensor, " N"],
    deltas: Deltas,
    coeffs: Float[Tensor, "T G"],
    segments: Segments,
    *,
    out: Float[Tensor, " N"] | None = None,
    backend: str = "auto",
    validate: bool = True,
) -> Float[Tensor, " N"]:
    """theta = theta_0 + sum_t Lambda[t, g] tau_t on each group g (DivMerge Eq. 3).

    deltas: `[T, N]` in float32, bfloat16 or float16 whatever the base's, or a store of int8,
    low-rank or streamed ones; the last two run on PyTorch. The result has the base's dtype and is
    differentiable in base and coefficients; written into `out`, it is not. backend: `auto` is
    Triton on a GPU where it is installed, else PyTorch. validate=False skips the one check that
    reads the coefficients back from a GPU, that they are finite; nothing else synchronises, so that
    the call can stand in a CUDA graph (after one call to warm up) and in `torch.compile`.

    Raises ValueError where shapes, dtypes, devices or memory layouts do not fit together, for a
    backend that cannot run here, and for coefficients that are not finite.
    """
    delta_storage.check(base, deltas, segments, coeffs)
    backend = resolve_backend(backend, base, coeffs, delta_storage.sample(deltas))
    if validate and not torch.isfinite(coeffs).all():
        raise ValueError("coefficients hold NaN or inf; a fit that got there needs a smaller lr")
    if out is None:
        return Merge.apply(base, coeffs, deltas, segments, backend)
    if torch.is_grad_enabled() and (coeffs.requires_grad or base.requires_grad):
        raise ValueError("a merge into `out` records no gradient; detach, or give no out")
    if (out.shape, out.dtype, out.device) != (base.shape, base.dtype, base.device):
        raise ValueError(
            f"out must be like base, {list(base.shape)} of {base.dtype} on {base.device}, got "
            f"{list(out.shape)} of {out.dtype} on {out.device}"
        )
    delta_storage.check(out, deltas, segments)
    return write(base, deltas, coeffs, segments, out, backend)


@torch.no_grad()
def grouped_inner(
    grad: Float[Tensor, " N"], deltas: Deltas, segments: Segments, *, backend: str = "auto"
) -> Float[Tensor, "T G"]:
    """dL/dLambda[t, g] = <grad_g, tau_{t,g}>, the gradient of `grouped_merge` in its coefficients.

    In float32, or float64 for a float64 gradient. Sums have a fixed order and no atomics: the
    result is bitwise the same on every run. Raises ValueError as `grouped_merge` does.
    """
    delta_storage.check(grad, deltas, segments)
    backend = resolve_backend(backend, grad, delta_storage.sample(deltas))
    if backend == "triton" and not isinstance(deltas, LowRankDeltas | delta_storage.StreamedDeltas):
        return inner_triton(grad, deltas, segments)
    return inner_torch(grad, deltas, segments)
