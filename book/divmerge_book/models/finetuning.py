"""Experts: fine-tuned once, and cached under a key of everything that determines them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from divmerge_book.data.code_digest import code_digest, key_of, versions
from divmerge_book.data.tasks import Task
from divmerge_book.models.encoders import Base, make_batches, pooled, resolve
from divmerge_core.storage import cache_dir, once, sha256


@dataclass(frozen=True)
class Recipe:
    """Everything that determines an expert besides base, task and seed.

    rows: training rows drawn by the seed; None for all. lr: peak of AdamW's step size, reached
    after `warmup` of the steps and falling linearly to 0; None means 1e-4, or 5e-4 for hidden sizes
    below 256. precision: of the forward pass, `float32` or `bfloat16`; `auto` picks bfloat16 where
    the hardware has it.
    """

    rows: int | None = 1200
    epochs: int = 3
    lr: float | None = None
    batch_size: int = 32
    max_length: int = 64
    warmup: float = 0.1
    weight_decay: float = 0.01
    precision: str = "auto"


@dataclass(frozen=True)
class Expert:
    """A fine-tuned model; an encoder has a head [V, H] with a bias [V], which is never merged."""

    task: str
    state: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    manifest: Mapping[str, object]


def data_digest(rows: datasets.Dataset) -> str:
    """SHA-256 of the rows themselves, independent of the file they came from."""
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fine_tune(
    base: Base, task: Task, recipe: Recipe | None = None, *, seed: int = 0, progress: bool = True
) -> Expert:
    """The expert of a task: from the cache, or trained by one process.

    The seed determines the training rows, the head's initial weights, the order and the dropout.
    The key is the manifest of `described`.
    """
    manifest, rows = described(base, task, recipe or Recipe(), seed=seed)

    def make(new: Path) -> None:
        recipe = Recipe(**manifest["recipe"])
        state, head = train(base, task, rows, recipe, seed=seed, progress=progress)
        tensors = {f"encoder.{k}": v for k, v in state.items()}
        tensors |= {f"head.{k}": v for k, v in head.items()}
        save_expert(new, tensors, manifest)

    folder = once(folder_of(manifest), make, holds="manifest.json")
    return load_expert(folder, device=str(base.device))


def described(
    base: Base, task: Task, recipe: Recipe, *, seed: int
) -> tuple[dict[str, object], datasets.Dataset]:
    """The manifest of an expert, and its training rows."""
    lr = recipe.lr or (1e-4 if base.encoder.config.hidden_size >= 256 else 5e-4)
    recipe = replace(recipe, lr=lr, precision=resolve(recipe.precision, base.device))
    rows = training_rows(task, recipe.rows, seed)
    code = code_digest("divmerge_book.models.finetuning.train")
    return manifest_of(base, task, recipe, rows, seed, code), rows


def training_rows(task: Task, count: int | None, seed: int) -> datasets.Dataset:
    """The training rows that a seed draws; None for all."""
    rows = task.load("train").shuffle(seed=seed)
    return rows.select(range(min(count or len(rows), len(rows))))


def manifest_of(
    base, task: Task, recipe, rows: datasets.Dataset, seed: int, code: str, **facts: object
) -> dict[str, object]:
    """Everything that determines an expert: base, rows and code by their digests, and `facts`."""
    return {
        **{"task": task.name, "answers": list(task.answers)},
        **{"encoder": base.name, "base": base.digest},
        **{"data": data_digest(rows), "rows": len(rows)},
        **{"recipe": asdict(recipe), "seed": seed, "device": base.device.type, "code": code},
        **versions("torch", "transformers", "tokenizers"),
        **facts,
    }


def folder_of(manifest: Mapping[str, object], prefix: str = "") -> Path:
    """The cache folder of an expert."""
    return cache_dir() / "experts" / f"{prefix}{manifest['task']}-{key_of(manifest)}"


def save_expert(
    folder: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, object]
) -> None:
    """Write an expert's tensors, and its manifest with their digest."""
    weights = folder / "model.safetensors"
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, weights)
    whole = {**manifest, weights.name: sha256(weights)}
    (folder / "manifest.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")


def read_expert(folder: Path, device: str) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Manifest and tensors. Raises ValueError where they are missing or not those saved."""
    file, weights = folder / "manifest.json", folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} holds no expert: manifest.json is missing")
    manifest = json.loads(file.read_text("utf-8"))
    if not weights.is_file() or sha256(weights) != manifest["model.safetensors"]:
        raise ValueError(f"{weights} is missing or damaged; delete {folder} and train it again")
    return manifest, load_file(weights, device=device)


def load_expert(folder: Path, *, device: str = "cpu") -> Expert:
    """A fine-tuned encoder from its folder; raises as `read_expert`."""
    manifest, tensors = read_expert(folder, device)
    encoder, head = (
        {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(name)}
        for name in ("encoder", "head")
    )
    return Expert(manifest["task"], encoder, head, manifest)


def adamw(weights: Iterable[Tensor], recipe) -> torch.optim.AdamW:
    """The recipe's AdamW on these weights."""
    options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    return torch.optim.AdamW(weights, fused=True, **options)


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak step size: rises over the first steps, then falls to 0."""
    warm = max(1, round(warmup * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def optimise(
    adam: torch.optim.AdamW,
    recipe,
    steps: Iterable[object],
    losses: Callable[[object], Iterable[Tensor]],
    *,
    total: int,
    begin: int = 0,
    title: str = "training",
    progress: bool = True,
) -> Iterator[int]:
    """AdamW on the sum of losses of every step; yields how many of `total` steps are done."""
    with tqdm(total=total, initial=begin, desc=title, disable=not progress, leave=False) as bar:
        for number, rows in enumerate(steps, begin):
            adam.param_groups[0]["lr"] = recipe.lr * rate(number, total, recipe.warmup)
            adam.zero_grad()
            for loss in losses(rows):
                loss.backward()
            adam.step()
            bar.update()
            yield number + 1


def train(
    base: Base, task: Task, rows: datasets.Dataset, recipe: Recipe, *, seed: int, progress: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """AdamW on encoder and head, cross-entropy on the labels; returns both state dicts."""
    device = base.device
    torch.manual_seed(seed)
    weights = {n: w.detach().clone().requires_grad_() for n, w in base.encoder.named_parameters()}
    head = torch.nn.Linear(base.encoder.config.hidden_size, len(task.answers)).to(device)
    adam = adamw([*weights.values(), *head.parameters()], recipe)
    batches, order = make_batches(
        rows, base, batch_size=recipe.batch_size, max_length=recipe.max_length
    )
    labels = torch.tensor(rows["label"], device=device)[order].split(recipe.batch_size)
    half = partial(torch.autocast, device.type, torch.bfloat16)

    def losses(number: int) -> Iterator[Tensor]:
        with half(enabled=recipe.precision == "bfloat16"):
            logits = head(pooled(base.encoder, weights, batches[number].inputs))
        yield torch.nn.functional.cross_entropy(logits.float(), labels[number])

    drawn = (n for _ in range(recipe.epochs) for n in torch.randperm(len(batches)).tolist())
    options = {"title": f"training {task.name}", "progress": progress}
    base.encoder.train()
    try:
        for _ in optimise(
            adam, recipe, drawn, losses, total=recipe.epochs * len(batches), **options
        ):
            pass
    finally:
        base.encoder.eval()
    return tuple(
        {name: tensor.detach() for name, tensor in part}
        for part in (weights.items(), head.named_parameters())
    )
