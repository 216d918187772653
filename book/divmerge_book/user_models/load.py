"""From a checked plan to an experiment: weights are read, one expert at a time."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModel, AutoModelForSequenceClassification

from divmerge_book.data.code_digest import code_digest, key_of
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.models.encoders import (
    Base,
    check_device,
    load_base,
    make_batches,
    pooled,
    resolve,
)
from divmerge_book.models.finetuning import Expert, data_digest, load_expert
from divmerge_book.user_models.adapters import finite
from divmerge_book.user_models.folders import Source
from divmerge_book.user_models.plan import Plan
from divmerge_core.checkpoints.safetensors_io import pools
from divmerge_core.checkpoints.save import input_files
from divmerge_core.merging.problem import MergeProblem, Pairs
from divmerge_core.merging.task_vectors import STORAGES, Layout, TaskVectors
from divmerge_core.storage import sha256

FAR = 0.5  # a task vector longer than this share of the base is no fine-tuning that we know


def read_model(kind: type, folder: object) -> tuple[nn.Module, set[str]]:
    """A model in float32, and the names that its checkpoint lacks.

    Raises ValueError where the checkpoint cannot be read.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        model, told = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: its weights cannot be loaded: {error}") from error
    except Exception as error:  # safetensors raises its own kind for a damaged file
        raise ValueError(f"{folder}: its weights cannot be loaded: {error!r}") from error
    return model.eval().requires_grad_(False), set(told["missing_keys"])


def from_transformers(plan: Plan, source: Source, state: Mapping) -> dict[str, Tensor]:
    model, missing = read_model(AutoModelForSequenceClassification, source.task.expert)
    if missing:
        raise ValueError(
            f"expert {source.task.expert} lacks {sorted(missing)[:3]}; save the whole fine-tuned "
            "classifier, with its head"
        )
    return dict(model.named_parameters())


def from_adapter(plan: Plan, source: Source, state: Mapping) -> dict[str, Tensor]:
    own = {source.prefix + name: tensor.cpu() for name, tensor in state.items()}
    whole = source.adapter.apply(own)
    missing = [name for name, _ in source.model.named_parameters() if name not in whole]
    if missing:
        raise ValueError(
            f"adapter {source.task.expert} and the base {plan.base.name!r} both lack "
            f"{missing[:3]}: it was drawn at random in training and not saved; train again with "
            f"its module in modules_to_save"
        )
    return whole


def from_package(plan: Plan, source: Source, state: Mapping) -> dict[str, Tensor]:
    expert = load_expert(source.task.expert)
    if expert.manifest["base"] != load_base(str(plan.base.folder)).digest:
        raise ValueError(
            f"expert {source.task.expert} was trained from {expert.manifest['encoder']!r} with "
            f"other weights or vocabulary than the base {plan.base.name!r}"
        )
    return {**expert.state, **{f"head.{name}": tensor for name, tensor in expert.head.items()}}


READERS = {
    "transformers": from_transformers,
    "adapter": from_adapter,
    "package": from_package,
}


def load_task_vectors(
    plan: Plan, state: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[TaskVectors, dict[str, dict[str, Tensor]]]:
    """Task vectors of the named tensors, and each task's head: all other tensors of its expert.

    state: the base's tensors. One expert is in memory at a time.
    """
    heads: dict[str, dict[str, Tensor]] = {}
    base = {name: state[name] for name in names}
    layout = Layout.of(base)
    flat = layout.flatten(base, "the base model")

    def rows() -> Iterator[Tensor]:
        for source in plan.experts:
            who, whole = f"expert {source.task.expert}", READERS[source.kind](plan, source, state)
            own = {name: whole.pop(source.prefix + name) for name in names}
            vector = layout.flatten(own, who).sub_(flat)
            finite(whole, f"the head of {who}")
            heads[source.task.name] = whole
            yield vector

    stored = STORAGES["float32"](rows(), len(plan.tasks))
    return TaskVectors(layout, plan.tasks, flat, stored), heads


def task_forward(
    source: Source, encoder: nn.Module, head: Mapping[str, Tensor], device: torch.device
) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]:
    """A task's forward pass: (merged parameters, inputs) -> logits [B, V].

    The classifier's own code runs, on the shared encoder, with the merged parameters and the
    task's head in place of its own.
    """
    head = {name: tensor.to(device) for name, tensor in head.items()}
    if source.model is None:
        weight, bias = head["head.weight"], head["head.bias"]
        return lambda parameters, inputs: (
            pooled(encoder, parameters, inputs).to(weight) @ weight.T + bias
        )
    model, prefix = copy.deepcopy(source.model), source.prefix  # weightless, so a small copy
    setattr(model, prefix.removesuffix("."), encoder)
    model.eval().requires_grad_(False)

    def answer(parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        named = {prefix + name: tensor for name, tensor in parameters.items()} | head
        return functional_call(model, named, kwargs=dict(inputs)).logits

    return answer


def labelled_split(rows: datasets.Dataset | None, base: Base, max_length: int) -> LabelledSplit:
    """Labelled rows ready to be scored; without batches where there are none."""
    device = next(base.encoder.parameters()).device
    if rows is None:
        return LabelledSplit([], torch.zeros(0, dtype=torch.long, device=device))
    batches, order = make_batches(rows, base, batch_size=32, max_length=max_length)
    return LabelledSplit(batches, torch.tensor(rows["label"], device=device)[order])


def lengths(vectors: TaskVectors, base: str) -> list[str]:
    """Notes on task vectors that are nothing, or longer than fine-tuning makes them."""
    shares = (vectors.norms() / vectors.base.double().norm()).tolist()
    said = []
    for task, share in zip(vectors.tasks, shares, strict=True):
        if share == 0:
            said.append(f"task {task!r}: the expert's encoder is the base itself")
        elif share > FAR:
            said.append(
                f"task {task!r}: the task vector is {share:.2f} times as long as the base "
                f"{base!r}; is this the base that the expert was fine-tuned from?"
            )
    return said


def digest_of(plan: Plan, manifests: Sequence[Mapping], device: str) -> str:
    """Of all that decides a score: the code, base, weights, rows, labels, precision and length."""
    rows = [
        None if part is None else data_digest(part)
        for parts in plan.rows.values()
        for part in parts
    ]
    base = hashes(input_files(plan.base.folder), plan.base.folder)
    length, padding = plan.description.max_length, plan.base.tokenizer.pad_token
    return key_of(code_digest(load), base, manifests, rows, length, padding, device)


def hashes(weights: Sequence[Path], folder: Path) -> dict[str, str]:
    """SHA-256 of the weights that are read, and of the folder's settings and vocabulary."""
    words = (path for path in folder.iterdir() if path.suffix in {".json", ".txt", ".model"})
    return {path.name: sha256(path) for path in sorted({*weights, *words})}


def load(plan: Plan, *, device: str = "cpu", precision: str = "float32") -> Experiment:
    """The plan as an experiment: base, task vectors, heads, unlabelled inputs, labelled rows.

    Parameters that base and all experts have are merged, by the encoder's own names; tied ones
    count once. What an expert has beyond them (classifier, a pooler that the base lacks) is its
    task's head. Experts are read one after the other; their tensors live on as task vectors only,
    so `Expert.state` is empty. Labelled splits of tasks without rows have no batches. precision:
    of the forward passes, `float32`, `bfloat16` or `auto`. Warns where an expert is its base, or
    so far from it that it was hardly fine-tuned from this base.

    Raises ValueError for weights that are missing, damaged, not finite or not of this base.
    """
    place = check_device(device)
    precision = resolve(precision, place)
    encoder, missing = read_model(AutoModel, plan.base.folder)
    lost = sorted(name for name in missing if not pools(name))
    if lost:
        raise ValueError(
            f"the base {plan.base.folder} lacks {len(lost)} tensors of its model, such as "
            f"{lost[:3]}; only a pooler may be absent: save the whole base again"
        )
    encoder.config.use_cache = False  # decoders keep keys and values for text that never comes
    state = {n: t for n, t in encoder.named_parameters() if n not in missing}
    names = [n for n in state if all(n in source.shapes for source in plan.experts)]
    vectors, heads = load_task_vectors(plan, state, names)
    for note in lengths(vectors, plan.base.name):
        warnings.warn(note, stacklevel=2)
    if device != "cpu":
        vectors = TaskVectors(
            vectors.layout, vectors.tasks, vectors.base.to(place), vectors.deltas.to(place)
        )
    encoder = encoder.to(place)
    return assembled(plan, encoder, vectors, heads, precision)


def assembled(
    plan: Plan,
    encoder: nn.Module,
    vectors: TaskVectors,
    heads: Mapping[str, Mapping[str, Tensor]],
    precision: str,
) -> Experiment:
    """The experiment of weights that are loaded."""
    place, half = vectors.base.device, precision == "bfloat16"
    ways = [task_forward(s, encoder, heads[s.task.name], place) for s in plan.experts]

    def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
        with torch.autocast(place.type, torch.bfloat16, enabled=half):
            found = [ways[task](parameters, batch.inputs) for task, batch in pairs]
        return [logits.float() for logits in found]

    manifests = [
        {
            "task": source.task.name,
            "answers": list(source.labels),
            "kind": source.kind,
            "precision": precision,
            "files": hashes(source.weights, source.task.expert),
        }
        for source in plan.experts
    ]
    digest = digest_of(plan, manifests, place.type)
    length = plan.description.max_length
    base = Base(plan.base.name, encoder, plan.base.tokenizer, digest)
    merge = [make_batches(r, base, batch_size=4, max_length=length)[0] for r in plan.rows["merge"]]
    exams = {
        split: [labelled_split(rows, base, length) for rows in plan.rows[split]]
        for split in ("validation", "test")
    }
    experts = [Expert(m["task"], {}, heads[m["task"]], m) for m in manifests]
    problem = MergeProblem(vectors, merge, forward, encoder)
    return Experiment(base, experts, problem, exams["validation"], exams["test"], digest)
