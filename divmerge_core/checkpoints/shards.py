"""Weights on disk, piece by piece: models in the hub's layout, read and written as streams.

The format is 8 bytes for the length of a JSON header, the header (name -> dtype, shape, offsets),
then the tensors' bytes end to end; one model may be cut into several such files and an index. A
library call holds a whole file in memory, or maps it; here no more than PIECE numbers are held.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import transformers
from jaxtyping import Shaped
from torch import Tensor
from transformers import MODEL_MAPPING

PIECE = 1 << 17  # numbers read, merged and written at a time
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
INDEX = "model.safetensors.index.json"


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: what it is, and where its bytes begin."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    def piece(self, start: int = 0, stop: int | None = None) -> Shaped[Tensor, " n"]:
        """Its numbers start..stop, laid out in a row, in its own dtype."""
        count = (self.size if stop is None else stop) - start
        with open(self.file, "rb") as file:
            file.seek(self.begin + start * self.dtype.itemsize)
            content = bytearray(file.read(count * self.dtype.itemsize))
        return torch.frombuffer(content, dtype=self.dtype) if count else torch.empty(0)


def stored(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises ValueError for a file that is no safetensors file, is cut short, or holds a dtype that
    is not in DTYPES.
    """
    damaged = f"{file} is no whole safetensors file; fetch or save it again"
    total = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length + 8 > total:
            raise ValueError(damaged)
        try:
            header = json.loads(opened.read(length))
        except ValueError as error:
            raise ValueError(damaged) from error
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
    if entries and entries[-1][1]["data_offsets"][1] + length + 8 != total:
        raise ValueError(damaged)
    unknown = {entry["dtype"] for _, entry in entries} - set(DTYPES)
    if unknown:
        raise ValueError(f"{file} holds {sorted(unknown)}; only {', '.join(DTYPES)} can be read")
    return {
        name: Stored(file, DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in entries
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, or model.safetensors.

    Raises ValueError where there is none, or one that the index names is missing.
    """
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(index.values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing[:3])}; give a folder in the hub's layout (weights "
            "in another format: load them and save_pretrained them once)"
        )
    return files


@dataclass(frozen=True)
class StoredModel:
    """A model on disk in the hub's layout, of which only the headers have been read.

    tensors: by name, without those that are tied to another one. config: None for an expert that
    this package has trained, whose encoder and head lie in one file without it. prefix: what its
    names have in front of those of the bare encoder, as AutoModel has them (`bert.`), or nothing.
    early: whether some names on disk are spelled otherwise than today.
    """

    folder: Path
    tensors: Mapping[str, Stored]
    config: transformers.PretrainedConfig | None
    prefix: str
    early: bool = False

    @classmethod
    def at(cls, folder: Path) -> "StoredModel":
        """The model in a folder. Raises ValueError where there is none that can be read."""
        found = {n: tensor for file in weight_files(folder) for n, tensor in stored(file).items()}
        tensors = {today(name): tensor for name, tensor in found.items()}
        if not (folder / "config.json").is_file():
            tensors = {name: t for name, t in tensors.items() if not name.startswith("head.")}
            return cls(folder, tensors, None, "encoder.")
        config = read_config(folder)
        ties = tied(config)
        kept = {
            name: tensor
            for name, tensor in tensors.items()
            if not any(re.fullmatch(tie, name) and of in tensors for tie, of in ties.items())
        }
        encoder = MODEL_MAPPING.get(type(config), None)
        prefix = getattr(encoder, "base_model_prefix", "")
        early = tensors.keys() != found.keys()
        return cls(folder, kept, config, f"{prefix}." if prefix else "", early)

    def core(self, name: str) -> str:
        """A tensor's name as the bare encoder has it."""
        return name.removeprefix(self.prefix)

    @property
    def cores(self) -> dict[str, str]:
        """Names as the bare encoder has them -> names on disk."""
        return {self.core(name): name for name in self.tensors}


def today(name: str) -> str:
    """A name as it is spelled today: early BERT checkpoints have LayerNorm.gamma and .beta."""
    for old, new in LEGACY.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def read_config(folder: Path) -> transformers.PretrainedConfig:
    """A folder's config.json. Raises ValueError where transformers cannot read it."""
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder / 'config.json'} is not of a model that transformers knows: {error}"
        ) from error


def tied(config: transformers.PretrainedConfig) -> dict[str, str]:
    """Tensors (as patterns) that are another tensor under a second name -> that tensor."""
    name = (config.architectures or [""])[0]
    ties = getattr(getattr(transformers, name, None), "_tied_weights_keys", None)
    return dict(ties or {}) if getattr(config, "tie_word_embeddings", False) else {}


# --- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One tensor to be written: its dtype and shape, and its numbers start..stop when asked."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    piece: Callable[[int, int], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def shares(tensors: Sequence[Planned], max_bytes: int) -> list[list[Planned]]:
    """Tensors in order, cut into shards of at most max_bytes, or of one tensor that is larger."""
    found: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if found[-1] and filled + tensor.nbytes > max_bytes:
            found.append([])
            filled = 0
        found[-1].append(tensor)
        filled += tensor.nbytes
    return found


def write_shards(
    folder: Path,
    tensors: Sequence[Planned],
    *,
    max_bytes: int,
    wrote: Callable[[int], object] = lambda count: None,
) -> dict[str, str]:
    """Write a model's tensors: file name -> its SHA-256. wrote: told the bytes of every piece.

    One file is model.safetensors; several are named as the hub names them, with an index.
    """
    parts = shares(tensors, max_bytes)
    if len(parts) == 1:
        return {"model.safetensors": write_shard(folder / "model.safetensors", parts[0], wrote)}
    hashes, places = {}, {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        hashes[name] = write_shard(folder / name, part, wrote)
        places |= {tensor.name: name for tensor in part}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return hashes


def write_shard(path: Path, tensors: Sequence[Planned], wrote: Callable[[int], object]) -> str:
    """One safetensors file, written front to back; returns its SHA-256."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # keeps all aligned
    header: dict[str, Mapping] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        ends = [offset, offset := offset + tensor.nbytes]
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": ends,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for block in blocks(len(text).to_bytes(8, "little") + text, ordered):
            file.write(block)
            digest.update(block)
            wrote(len(block))
    return digest.hexdigest()


def blocks(header: bytes, tensors: Sequence[Planned]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a piece at a time."""
    yield header
    for tensor in tensors:
        size = prod(tensor.shape)
        for start in range(0, size, PIECE):
            numbers = tensor.piece(start, min(start + PIECE, size)).to("cpu", tensor.dtype)
            yield memoryview(numbers.contiguous().view(torch.uint8).numpy())
