"""Models in the hub's layout, read lazily.

safetensors checks every header once; tensors are mapped into memory, so that only the pages which
are looked at are read.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = re.compile(r"embed|wte|shared")
BUFFERS = re.compile(r"(^|\.)(inv_freq|position_ids|(attn|attention)\.(masked_)?bias)$")
PARTS = {"encoder", "decoder", "embeddings", "layer", "layers"}  # of bare encoders
OTHERS = re.compile(r"incomplete|\.(bin|pt|pth|h5|msgpack|onnx|gguf|ckpt|safetensors)$")
WRAPPERS = ("_orig_mod.module.", "module._orig_mod.", "_orig_mod.", "module.")


@dataclass(frozen=True)
class Stored:
    """One tensor in a file, of which only dtype, shape and first byte have been read."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    def mapped(self) -> Shaped[Tensor, " n"]:
        """Its numbers in a row, in its own dtype: read from the file where they are looked at."""
        if not self.size:  # no file is mapped from no byte
            return torch.empty(0, dtype=self.dtype)
        part = np.memmap(self.file, np.uint8, "c", self.start, self.size * self.dtype.itemsize)
        return torch.from_numpy(part).view(self.dtype)


def stored(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name.

    Raises ValueError where it is none, or not a whole one.
    """
    try:
        with open(file, "rb") as start, safe_open(file, "pt") as content:
            after = 8 + (size := int.from_bytes(start.read(8), "little"))
            header = json.loads(start.read(size))
            found = {name: header[name] for name in content.keys()}
            kinds = {facts["dtype"]: name for name, facts in found.items()}
            kinds = {kind: content.get_tensor(name).dtype for kind, name in kinds.items()}
    except SafetensorError as error:
        with open(file, "rb") as start:
            pointer = start.read(24).startswith(b"version https://git-lfs")
        kind = "a Git-LFS pointer (git lfs pull fetches the file itself)" if pointer else "damaged"
        raise ValueError(
            f"{file} is no whole safetensors file but {kind}: {error}; fetch or save it again"
        ) from error
    return {
        name: Stored(file, kinds[f["dtype"]], tuple(f["shape"]), after + f["data_offsets"][0])
        for name, f in found.items()
    }


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those of its index, or model.safetensors.

    Raises ValueError where there is none, one that the index names is missing or lies outside the
    folder, or there are both an index and a model.safetensors that it does not name.
    """
    names = indexed(folder / INDEX) if (folder / INDEX).is_file() else [SINGLE]
    if SINGLE not in names and (folder / SINGLE).exists():
        raise ValueError(
            f"{folder} holds both {SINGLE} and {INDEX}, and programs differ in which they read; "
            "remove the one that is out of date"
        )
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing[:3])}{instead(files)}; give a folder in the hub's "
            "layout (weights in another format: load them and save_pretrained them once)"
        )
    return files


def instead(files: Sequence[Path]) -> str:
    """What a folder has in the place of missing weights, in words."""
    if lost := [file.name for file in files if file.is_symlink() and not file.exists()]:
        return f" ({lost[0]} is a link to nothing: its cache was emptied or moved; fetch it again)"
    beside = sorted(path.name for path in files[0].parent.iterdir() if OTHERS.search(path.name))
    if cut := [name for name in beside if re.search(r"incomplete|-of-\d+\.safet", name)]:
        return f" (but {cut[0]}: the download did not end; fetch it again)"
    return f" (but {', '.join(beside[:3])})" if beside else ""


def indexed(path: Path) -> list[str]:
    """The file names in an index. Raises ValueError for a damaged index and for other folders."""
    try:
        names = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no index of weights ({error!r}); save them again") from error
    if outside:
        raise ValueError(f"{path} names {outside[0]!r}; an index names files beside it alone")
    return names


@dataclass(frozen=True)
class StoredModel:
    """A model on disk in the hub's layout, of which only the headers have been read.

    tensors: by name, without those that are tied to another one. config: config.json, which says so
    of tied ones; None for an expert of this project, whose encoder and head lie in one file without
    it. prefix: what its names have in front of the bare encoder's in AutoModel (`bert.`), or none.
    early: whether some names on disk are spelled otherwise (see `today` and `wrapper`).
    """

    folder: Path
    tensors: Mapping[str, Stored]
    config: Mapping[str, object] | None
    prefix: str
    early: bool = False

    @classmethod
    def at(cls, folder: Path, prefix: str | None = None) -> "StoredModel":
        """The model in a folder; prefix: None to derive it from the names.

        Raises ValueError where there is no model that can be read.
        """
        parts = [stored(file) for file in weight_files(folder)]
        found = {name: tensor for part in parts for name, tensor in part.items()}
        if len(found) < sum(map(len, parts)):
            raise ValueError(f"{folder}: two of its files hold the same tensor; save it again")
        start = len(wrapper(found))
        tensors = {today(name[start:]): tensor for name, tensor in found.items()}
        if not (folder / "config.json").is_file():
            tensors = {name: t for name, t in tensors.items() if not name.startswith("head.")}
            return cls(folder, tensors, None, "encoder.")
        config = read_config(folder)
        if aliases := tied(config, tensors):
            config["tie_word_embeddings"] = True  # by default some architectures have a head apart
        kept = {name: tensor for name, tensor in tensors.items() if name not in aliases}
        early = tensors.keys() != found.keys()
        return cls(folder, kept, config, prefix_of(kept) if prefix is None else prefix, early)

    def core(self, name: str) -> str:
        """A tensor's name as the bare encoder has it."""
        return name.removeprefix(self.prefix)

    @property
    def cores(self) -> dict[str, str]:
        """Names as the bare encoder has them -> names on disk."""
        return {self.core(name): name for name in self.tensors}

    @property
    def encoder(self) -> set[str]:
        """The encoder's tensors that no model may lack, as the bare encoder has them.

        Where no name has the prefix it is a bare encoder's file, and all are its.
        """
        own = [name for name in self.tensors if name.startswith(self.prefix)] or self.tensors
        return {self.core(name) for name in own if not spare(name)}


def wrapper(names: Iterable[str]) -> str:
    """What torch.compile or data parallel training put before all names, or nothing."""
    return next((w for w in WRAPPERS if names and all(name.startswith(w) for name in names)), "")


def pools(name: str) -> bool:
    """Whether a tensor is a pooler's, which a base may lack."""
    return "pooler" in name.split(".")


def spare(name: str) -> bool:
    """Whether a model may lack a tensor: a pooler's, or a buffer of older versions."""
    return pools(name) or BUFFERS.search(name) is not None


def today(name: str) -> str:
    """A name as it is spelled today: early BERT checkpoints have LayerNorm.gamma and .beta."""
    for old, new in LEGACY.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def read_config(folder: Path, name: str = "config.json") -> dict[str, object]:
    """A folder's config.json, or another file. Raises ValueError where it is no JSON object."""
    path = folder / name
    try:
        if isinstance(found := json.loads(path.read_text("utf-8")), dict):
            return found
        raise ValueError(f"it holds {str(found):.40}")
    except ValueError as error:
        raise ValueError(f"{path} is no JSON object ({error}); save the model again") from error


def prefix_of(names: Iterable[str]) -> str:
    """The first component of names with a head (`bert.`), or nothing for a bare encoder's names.

    It is common to the token embeddings and to the numbered blocks.
    """
    numbered = {name.partition(".")[0] for name in names if re.search(r"\.\d+\.", name)}
    embedding = {name.partition(".")[0] for name in names if EMBEDDING.search(name)}
    common = numbered & embedding - PARTS
    return f"{common.pop()}." if len(common) == 1 else ""


def tied(config: Mapping[str, object], tensors: Mapping[str, Stored]) -> set[str]:
    """Names of tensors that repeat the token embeddings (or another one's bias).

    Candidates are tensors of vocab_size rows; unless the config says tie_word_embeddings: false,
    those that equal the first of their shape, embeddings before heads, are tied to it.
    """
    rows = config.get("vocab_size")
    if rows is None or not config.get("tie_word_embeddings", True):
        return set()
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(tensors, key=lambda n: ("shared" not in n, not EMBEDDING.search(n), len(n))):
        if tensors[name].shape[:1] == (rows,) and not re.search(r"\.\d+\.", name):  # of no block
            by_shape.setdefault(tensors[name].shape, []).append(name)
    return {
        name
        for first, *others in by_shape.values()
        for name in others
        if tensors[name].mapped().equal(tensors[first].mapped())
    }
