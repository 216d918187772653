"""Tensors written in the hub's layout, a few of them in memory at a time."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from divmerge_core.checkpoints.safetensors_io import INDEX

KINDS = {  # dtypes, as safetensors calls them
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}


@dataclass(frozen=True)
class Planned:
    """One tensor to be written: its dtype and shape, and its numbers in a row when asked."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    numbers: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path, tensors: Sequence[Planned], *, max_bytes: int, wrote: Callable[[int], object]
) -> dict[str, str]:
    """Write a model's tensors: file name -> its SHA-256. wrote: told the bytes of every tensor.

    A shard has at most max_bytes of tensors, or one larger tensor. One file is model.safetensors;
    several are named as the hub names them, with an index.
    """
    plan = {tensor.name: tensor for tensor in tensors}
    parts = split_state_dict_into_shards_factory(
        plan,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    hashes = {
        file: write_file(folder / file, [plan[name] for name in names], wrote)
        for file, names in parts.filename_to_tensors.items()
    }
    if parts.is_sharded:
        places = dict(sorted(parts.tensor_to_filename.items()))
        index = {"metadata": parts.metadata, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return hashes


def ahead(jobs: Sequence[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """The results in order; every thread that PyTorch may use works on a job of its own."""
    workers, waiting = torch.get_num_threads(), deque()
    torch.set_num_threads(workers)  # its first call must not come from two threads
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_file(path: Path, tensors: Sequence[Planned], wrote: Callable[[int], object]) -> str:
    """Write one safetensors file, tensor by tensor; returns its SHA-256.

    The format: a JSON header behind its length, then the numbers, widest first so as to be aligned.
    """
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header, stop = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        place = [stop, stop := stop + tensor.nbytes]
        kind = KINDS[tensor.dtype]
        header[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(start)
    with open(path, "wb") as file:
        file.write(start)
        numbers = ahead([tensor.numbers for tensor in tensors])
        for tensor in tensors:
            found = next(numbers).contiguous()
            assert (found.dtype, found.numel()) == (tensor.dtype, prod(tensor.shape)), tensor.name
            content = found.view(torch.uint8).numpy()
            file.write(content)
            digest.update(content)
            wrote(tensor.nbytes)
            del found, content  # before the next is waited for
    return digest.hexdigest()
