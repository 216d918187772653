"""Experts: fine-tuned once, kept under a key of all that determines them, never mixed up."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
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
    """Everything that decides how an expert is trained, besides base, task and seed.

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
    """A fine-tuned encoder and the head that stays with its task."""

    task: str
    state: Mapping[str, Tensor]
    head: Mapping[str, Tensor]  # weight [V, H], bias [V]
    manifest: Mapping[str, object]


def data_digest(rows: datasets.Dataset) -> str:
    """SHA-256 of the rows themselves, whatever file they came from."""
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fine_tune(
    base: Base, task: Task, recipe: Recipe | None = None, *, seed: int = 0, progress: bool = True
) -> Expert:
    """The expert for a task: from the cache where one was made in exactly this way, else trained.

    The seed draws the training rows, the head's first weights, the order and the dropout. The key
    is what `described` tells. Of several processes that want an expert, one trains it.
    """
    manifest, rows = described(base, task, recipe or Recipe(), seed=seed)

    def make(new: Path) -> None:
        recipe = Recipe(**manifest["recipe"])
        state, head = train(base, task, rows, recipe, seed=seed, progress=progress)
        tensors = {f"encoder.{k}": v for k, v in state.items()}
        tensors |= {f"head.{k}": v for k, v in head.items()}
        save_expert(new, tensors, manifest)

    device = str(next(base.encoder.parameters()).device)
    folder = once(folder_of(manifest), make, holds="manifest.json")
    return load_expert(folder, device=device)


def described(
    base: Base, task: Task, recipe: Recipe, *, seed: int
) -> tuple[dict[str, object], datasets.Dataset]:
    """All that decides an expert, as its manifest, and the rows that it is trained on.

    The digests of the base, of the rows and of the training's code; the recipe, the seed, the
    device type, and the versions of torch, transformers and tokenizers.
    """
    device = next(base.encoder.parameters()).device
    recipe = replace(
        recipe,
        lr=recipe.lr or (1e-4 if base.encoder.config.hidden_size >= 256 else 5e-4),
        precision=resolve(recipe.precision, device),
    )
    rows = task.load("train").shuffle(seed=seed)
    rows = rows.select(range(min(recipe.rows or len(rows), len(rows))))
    manifest = {
        "task": task.name,
        "answers": list(task.answers),
        "encoder": base.name,
        "base": base.digest,
        "data": data_digest(rows),
        "rows": len(rows),
        "recipe": asdict(recipe),
        "seed": seed,
        "device": device.type,
        "code": code_digest("divmerge_book.models.finetuning.train"),
        **versions("torch", "transformers", "tokenizers"),
    }
    return manifest, rows


def folder_of(manifest: Mapping[str, object], prefix: str = "") -> Path:
    """Where the expert of a manifest is kept."""
    return cache_dir() / "experts" / f"{prefix}{manifest['task']}-{key_of(manifest)}"


def save_expert(
    folder: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, object]
) -> None:
    """Write an expert's tensors and its manifest, which gains their digest."""
    weights = folder / "model.safetensors"
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, weights)
    whole = {**manifest, weights.name: sha256(weights)}
    (folder / "manifest.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")


def load_expert(folder: Path, *, device: str = "cpu") -> Expert:
    """An expert from its folder. Raises ValueError where its weights are not those saved."""
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} holds no expert: manifest.json is missing")
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256(weights) != manifest["model.safetensors"]:
        raise ValueError(f"{weights} is missing or damaged; delete {folder} and train it again")
    tensors = load_file(weights, device=device)
    part = {
        name: {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(name)}
        for name in ("encoder", "head")
    }
    return Expert(manifest["task"], part["encoder"], part["head"], manifest)


def train(
    base: Base, task: Task, rows: datasets.Dataset, recipe: Recipe, *, seed: int, progress: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """AdamW on encoder and head, cross-entropy on the labels; returns both state dicts."""
    device = next(base.encoder.parameters()).device
    torch.manual_seed(seed)
    names = [name for name, _ in base.encoder.named_parameters()]
    weights = [tensor.detach().clone().requires_grad_() for tensor in base.encoder.parameters()]
    head = torch.nn.Linear(base.encoder.config.hidden_size, len(task.answers)).to(device)
    adam = torch.optim.AdamW(
        [*weights, *head.parameters()], lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
    )
    batches, order = make_batches(
        rows, base, batch_size=recipe.batch_size, max_length=recipe.max_length
    )
    labels = torch.tensor(rows["label"], device=device)[order].split(recipe.batch_size)
    steps = recipe.epochs * len(batches)
    warm = max(1, round(recipe.warmup * steps))
    rate = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    bar = tqdm(total=steps, desc=f"training {task.name}", disable=not progress, leave=False)
    base.encoder.train()
    try:
        for _ in range(recipe.epochs):
            for number in torch.randperm(len(batches)).tolist():
                with torch.autocast(
                    device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"
                ):
                    parameters = dict(zip(names, weights, strict=True))
                    logits = head(pooled(base.encoder, parameters, batches[number].inputs))
                loss = torch.nn.functional.cross_entropy(logits.float(), labels[number])
                adam.zero_grad()
                loss.backward()
                adam.step()
                rate.step()
                bar.update()
    finally:
        base.encoder.eval()
        bar.close()
    state = {name: tensor.detach() for name, tensor in zip(names, weights, strict=True)}
    return state, {name: tensor.detach() for name, tensor in head.named_parameters()}
