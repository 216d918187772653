"""Shares of a model's segments on the threads of a CPU."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from divmerge_core.kernels.segments import Segments

SHARED = 1 << 18  # from so many parameters on, a CPU's threads share them


def in_threads(function: Callable, segments: Segments, like: Tensor) -> list:
    """function(rows) on equal shares of the segments, one per thread that PyTorch may use.

    PyTorch leaves products with so few rows to one core, which cannot fill the memory bus.
    """
    workers = torch.get_num_threads() if like.is_cpu and len(like) >= SHARED else 1
    if workers == 1:
        return [function(segments.rows)]
    return list(threads(workers, os.getpid()).map(function, segments.shares(workers)))


@lru_cache(maxsize=1)
def threads(workers: int, process: int) -> ThreadPoolExecutor:
    """Threads of one process: a forked child has none of its parent's."""
    torch.set_num_threads(workers)  # a child's first call of it must not come from two threads
    return ThreadPoolExecutor(workers)
