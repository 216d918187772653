"""Triton where it is installed and can run, and which backend a kernel runs on: else PyTorch."""

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor

# Its import is slow: it is made on a GPU, or where the variable says to interpret or compile.
WANTED = bool(torch.cuda.device_count()) or "TRITON_INTERPRET" in os.environ
try:
    if not WANTED:
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)

BACKENDS = ("auto", "torch", "triton")
# Triton's interpreter runs a kernel as Python on the CPU; Triton reads the variable at import.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable):
    """Triton's `jit` where Triton is installed. It wants the bare function: it reads the source."""
    return triton.jit(inspect.unwrap(function)) if triton else function


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one, for Triton's launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def resolve_backend(backend: str, *tensors: Tensor) -> str:
    """`torch` or `triton`: what a call on these tensors runs on.

    `auto` is Triton on a GPU where it is installed and no tensor is float64, else PyTorch. Raises
    ValueError for a backend that cannot run here, and for tensors on different devices.
    """
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on {sorted(devices)}; move them to one device")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    on_gpu = tensors[0].is_cuda  # PyTorch calls AMD's GPUs cuda as well
    if backend == "auto":
        return "triton" if on_gpu and triton is not None and not double else "torch"
    if backend == "triton" and triton is None and WANTED:
        raise ValueError(
            "backend 'triton' needs the package triton, which is not installed; "
            "pip install triton, or say backend='torch'"
        )
    if backend == "triton" and not (on_gpu or INTERPRETED):
        raise ValueError(
            f"backend 'triton' needs tensors on a GPU, got {devices.pop()}; say backend='torch', "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernel slowly on a CPU"
        )
    if backend == "triton" and double:
        raise ValueError("backend 'triton' computes in float32; say backend='torch' for float64")
    return backend
