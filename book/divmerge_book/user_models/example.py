"""An example of one's own models and texts, made on the spot: three experts of three kinds.

Everything is written to disk as a reader would have it, so that nothing in the chapter is special:
a base, a transformers checkpoint, a PEFT folder, an expert of this package, and rows in CSV, JSONL
and parquet.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification

from divmerge_book.data.tasks import TASKS, Task
from divmerge_book.evaluation.sizes import QUICK
from divmerge_book.models.encoders import Base, load_base, make_batches
from divmerge_book.models.finetuning import Recipe, fine_tune
from divmerge_book.models.merged import base_folder
from divmerge_core.storage import sha256

ENCODER, FOLDER = "bert_tiny", "bert-tiny"
RANK, ALPHA = 8, 16
ENDINGS = {"trec": "csv", "movie": "jsonl", "sms": "parquet"}


@dataclass(frozen=True)
class Amount:
    """How much the example trains and scores: training rows and passes, rows of each split."""

    train: int = 1000
    epochs: int = 4
    merge: int = 48
    validation: int = 60
    test: int = 200
    recipe: Recipe = Recipe()


AMOUNTS = {
    "smoke": Amount(train=400, epochs=2, merge=40, validation=40, test=100, recipe=QUICK),
    "default": Amount(),
    "full": Amount(merge=200, validation=200, test=500),
}


def train_rows(task: Task, count: int) -> datasets.Dataset:
    rows = task.load("train").shuffle(seed=0)
    return rows.select(range(min(count, len(rows))))


def descend(
    weights: Sequence[Tensor],
    logits: Callable[[Mapping[str, Tensor]], Tensor],
    rows: datasets.Dataset,
    base: Base,
    *,
    lr: float,
    epochs: int,
) -> None:
    """AdamW on some weights, cross-entropy on labelled rows, step size falling to 0."""
    batches, order = make_batches(rows, base, batch_size=32)
    labels = torch.tensor(rows["label"])[order].split(32)
    adam = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    steps = epochs * len(batches)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for number in torch.randperm(len(batches)).tolist():
            loss = nn.functional.cross_entropy(logits(batches[number].inputs), labels[number])
            adam.zero_grad()
            loss.backward()
            adam.step()
            rate.step()


def classifier(base: Base, labels: Sequence[str]) -> nn.Module:
    """The base as transformers' classifier, with a new head."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    named = dict(enumerate(labels))
    return AutoModelForSequenceClassification.from_pretrained(
        base_folder(base.name), id2label=named, label2id={v: n for n, v in named.items()}
    )


def save_whole(folder: Path, base: Base, task: Task, amount: Amount) -> None:
    """A fine-tuned checkpoint, as transformers saves it."""
    model = classifier(base, task.answers).train()
    rows = train_rows(task, amount.train)
    descend(
        list(model.parameters()),
        lambda inputs: model(**inputs).logits,
        rows,
        base,
        lr=5e-4,
        epochs=amount.epochs,
    )
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def save_adapter(folder: Path, base: Base, task: Task, amount: Amount) -> None:
    """A LoRA expert in PEFT's layout: factors of all matrices in the blocks, and the head whole."""
    model = classifier(base, task.answers).train().requires_grad_(False)
    saved = {
        n: t for n, t in model.named_parameters() if n.startswith(("classifier", "bert.pooler"))
    }
    matrices = {n: t for n, t in model.named_parameters() if ".layer." in n and t.ndim == 2}
    left = {n: torch.zeros(t.shape[0], RANK, requires_grad=True) for n, t in matrices.items()}
    right = {
        n: (torch.randn(RANK, t.shape[1]) / RANK).requires_grad_() for n, t in matrices.items()
    }
    head = {name: tensor.requires_grad_() for name, tensor in saved.items()}

    def logits(inputs: Mapping[str, Tensor]) -> Tensor:
        moved = {n: t + ALPHA / RANK * left[n] @ right[n] for n, t in matrices.items()}
        return functional_call(model, {**moved, **head}, kwargs=dict(inputs)).logits

    weights = [*left.values(), *right.values(), *head.values()]
    rows = train_rows(task, amount.train)
    descend(weights, logits, rows, base, lr=2e-3, epochs=amount.epochs)
    tensors = {name: tensor.detach() for name, tensor in head.items()}
    for name in matrices:
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": right[name].detach()}
        tensors |= {f"{module}.lora_B.weight": left[name].detach()}
    folder.mkdir(parents=True)
    whole = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": RANK, "lora_alpha": ALPHA}
    config |= {"bias": "none", "modules_to_save": ["classifier", "pooler"], "use_rslora": False}
    config |= {"target_modules": sorted({name.split(".")[-2] for name in matrices})}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def save_package(folder: Path, base: Base, task: Task, amount: Amount) -> None:
    """An expert of this package (from the cache where it is there), in its own layout."""
    expert = fine_tune(base, task, amount.recipe)
    tensors = {f"encoder.{name}": tensor for name, tensor in expert.state.items()}
    tensors |= {f"head.{name}": tensor for name, tensor in expert.head.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    manifest = {**expert.manifest, "model.safetensors": sha256(folder / "model.safetensors")}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


SAVERS = {"trec": save_whole, "movie": save_package, "sms": save_adapter}


def save_rows(path: Path, task: Task, split: str, count: int) -> None:
    """The first rows of a split, labels as words, in the format of the path's ending."""
    rows = task.load(split)
    table = rows.select(range(min(count, len(rows)))).to_pandas()
    if "label" in table:
        table["label"] = [task.answers[number] for number in table.label]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_dict("records")))
    else:
        table.to_parquet(path, index=False)


def make_example(folder: Path, *, size: str = "default", seed: int = 0) -> Path:
    """Base, experts and rows of three tasks, and the description of them; returns its path.

    Takes seconds where this package's own expert is cached. Raises ValueError for an unknown size.
    """
    if size not in AMOUNTS:
        raise ValueError(f"size must be one of {', '.join(AMOUNTS)}, got {size!r}")
    amount, base = AMOUNTS[size], load_base(ENCODER)
    shutil.copytree(base_folder(ENCODER), folder / FOLDER)
    entries = []
    for name, save in SAVERS.items():
        torch.manual_seed(seed)
        save(folder / "experts" / name, base, TASKS[name], amount)
        entry: dict[str, object] = {"name": name, "expert": f"experts/{name}"}
        for split in ("merge", "validation", "test"):
            place = f"data/{name}/{split}.{ENDINGS[name]}"
            save_rows(folder / place, TASKS[name], split, getattr(amount, split))
            entry[split] = place
        entries.append(entry)
    entries[-1]["labels"] = list(TASKS["sms"].answers)  # an adapter's config has no names for them
    path = folder / "my_models.yaml"
    whole = {"base": FOLDER, "max_length": 64, "tasks": entries}
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path
