"""An example of one's own models and texts, made on the spot: three experts of three kinds.

Everything is on disk as a user would have it: a base, a transformers checkpoint, a PEFT folder, an
expert of this package, and rows in CSV, JSONL and parquet.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from divmerge_book.data.tasks import TASKS, Task
from divmerge_book.evaluation.sizes import QUICK
from divmerge_book.models.encoders import Base, load_base, make_batches
from divmerge_book.models.finetuning import Recipe, fine_tune, training_rows
from divmerge_book.models.language.models import quiet_transformers
from divmerge_book.models.merged import base_folder, labelled
from divmerge_book.user_models.data import write_rows
from divmerge_book.user_models.description import SPLITS
from divmerge_core.registry import Registry
from divmerge_core.storage import dump_json, sha256

ENCODER = "bert_tiny"
RANK, ALPHA = 8, 16


@dataclass(frozen=True)
class Amount:
    """How much the example trains and scores: training rows and passes, rows of each split."""

    train: int = 1000
    epochs: int = 4
    merge: int = 48
    validation: int = 60
    test: int = 200
    recipe: Recipe = Recipe()


AMOUNTS = Registry("size")
AMOUNTS |= {
    "smoke": Amount(train=400, epochs=2, merge=40, validation=40, test=100, recipe=QUICK),
    "default": Amount(),
    "full": Amount(merge=200, validation=200, test=500),
}


def train(
    weights: Iterable[Tensor],
    logits: Callable[[Mapping[str, Tensor]], Tensor],
    base: Base,
    task: Task,
    amount: Amount,
    lr: float,
) -> None:
    """AdamW on some weights, cross-entropy on labelled rows, step size falling to 0."""
    rows = training_rows(task, amount.train, 0)
    batches, order = make_batches(rows, base, batch_size=32)
    labels = torch.tensor(rows["label"])[order].split(32)
    adam = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    steps = amount.epochs * len(batches)
    rate = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, total_iters=steps)
    for number in (n for _ in range(amount.epochs) for n in torch.randperm(len(batches)).tolist()):
        loss = nn.functional.cross_entropy(logits(batches[number].inputs), labels[number])
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()


def classifier(base: Base, task: Task) -> nn.Module:
    """The base as transformers' classifier, with a new head."""
    quiet_transformers()
    folder, labels = base_folder(base.name), labelled(task.answers)
    return AutoModelForSequenceClassification.from_pretrained(folder, **labels).train()


def save_whole(folder: Path, base: Base, task: Task, amount: Amount) -> None:
    """A fine-tuned checkpoint, as transformers saves it."""
    model = classifier(base, task)
    train(model.parameters(), lambda inputs: model(**inputs).logits, base, task, amount, 5e-4)
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def save_adapter(folder: Path, base: Base, task: Task, amount: Amount) -> None:
    """A LoRA expert in PEFT's layout: factors of all matrices in the blocks, and the head whole."""
    model = classifier(base, task).requires_grad_(False)
    named = dict(model.named_parameters())
    head = {n: t for n, t in named.items() if n.startswith(("classifier", "bert.pooler"))}
    matrices = {n: t for n, t in named.items() if ".layer." in n and t.ndim == 2}
    left = {n: torch.zeros(len(t), RANK) for n, t in matrices.items()}
    right = {n: torch.randn(RANK, t.shape[1]) / RANK for n, t in matrices.items()}

    def logits(inputs: Mapping[str, Tensor]) -> Tensor:
        moved = {n: t + ALPHA / RANK * left[n] @ right[n] for n, t in matrices.items()}
        return functional_call(model, {**moved, **head}, kwargs=dict(inputs)).logits

    weights = [t.requires_grad_() for t in (*left.values(), *right.values(), *head.values())]
    train(weights, logits, base, task, amount, 2e-3)
    tensors = {f"base_model.model.{name}": tensor.detach() for name, tensor in head.items()}
    for name in matrices:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = right[name].detach()
        tensors[f"{module}.lora_B.weight"] = left[name].detach()
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": RANK, "lora_alpha": ALPHA}
    config |= {"bias": "none", "modules_to_save": ["classifier", "pooler"], "use_rslora": False}
    config |= {"target_modules": sorted({name.split(".")[-2] for name in matrices})}
    save_tensors(folder / "adapter_model.safetensors", tensors)
    dump_json(folder / "adapter_config.json", config)


def save_package(folder: Path, base: Base, task: Task, amount: Amount) -> None:
    """An expert of this package (from the cache where it is there), in its own layout."""
    expert, path = fine_tune(base, task, amount.recipe), folder / "model.safetensors"
    tensors = {f"encoder.{name}": tensor for name, tensor in expert.state.items()}
    save_tensors(path, tensors | {f"head.{name}": tensor for name, tensor in expert.head.items()})
    dump_json(folder / "manifest.json", {**expert.manifest, path.name: sha256(path)})


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True)
    save_file(dict(tensors), path)


KINDS = {  # task -> its expert's kind and the format of its rows
    "trec": (save_whole, "csv"),
    "movie": (save_package, "jsonl"),
    "sms": (save_adapter, "parquet"),
}


def make_example(folder: Path, *, size: str = "default", seed: int = 0) -> Path:
    """Base, experts and rows of three tasks, and the description of them; returns its path.

    Takes seconds where this package's own expert is cached. Raises ValueError for an unknown size,
    and for a folder that holds something already.
    """
    amount = AMOUNTS[size]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name a new folder")
    base, entries = load_base(ENCODER), []
    shutil.copytree(base_folder(ENCODER), folder / "bert-tiny")
    for name, (save, ending) in tqdm(KINDS.items(), "training experts", leave=False):
        torch.manual_seed(seed)
        save(folder / "experts" / name, base, TASKS[name], amount)
        files = {split: f"data/{name}/{split}.{ending}" for split in SPLITS}
        for split, file in files.items():
            answers, count = TASKS[name].answers, getattr(amount, split)
            write_rows(folder / file, TASKS[name], split, answers, count)
        entries.append({"name": name, "expert": f"experts/{name}", **files})
    entries[-1]["labels"] = list(TASKS["sms"].answers)  # an adapter's config has no names for them
    path = folder / "my_models.yaml"
    whole = {"base": "bert-tiny", "max_length": 64, "tasks": entries}
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path
