"""From a checked plan to an experiment: weights are read, one expert at a time."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import datasets
import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm
from transformers import AutoModel

from divmerge_book.data.code_digest import code_digest, key_of
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.models.encoders import Base, check_device, make_batches, pooled, resolve
from divmerge_book.models.finetuning import Expert, data_digest
from divmerge_book.user_models.folders import TENSORS, Source, read_model
from divmerge_book.user_models.language_load import load_language, padded
from divmerge_book.user_models.plan import Plan
from divmerge_book.user_models.weights import hashes, stored_vectors
from divmerge_core.merging.problem import MergeProblem, Pairs
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.storage import cache_dir


def task_forward(
    source: Source, encoder: nn.Module, head: Mapping[str, Tensor]
) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]:
    """A task's forward pass, (merged parameters, inputs) -> logits [B, V].

    It is the classifier's own code, on the shared encoder and with this head.
    """
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
    if rows is None:
        return LabelledSplit([], torch.zeros(0, dtype=torch.long, device=base.device))
    batches, order = make_batches(rows, base, batch_size=32, max_length=max_length)
    return LabelledSplit(batches, torch.tensor(rows["label"], device=base.device)[order])


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
    if plan.tokens is not None:
        return load_language(plan, device=device, precision=precision)
    place, length = check_device(device), plan.description.max_length
    precision = resolve(precision, place)
    encoder, missing = read_model(AutoModel, plan.base.folder)
    encoder.config.use_cache = False  # decoders keep keys and values for text that never comes
    state = {n: t for n, t in encoder.to(place).named_parameters() if n not in missing}
    size, table = plan.vocabulary.rows, plan.base.table
    state[table] = padded(state[table], size)
    shapes, heads = [source.shapes for source in plan.experts], {}
    weights = {name: t for name, t in state.items() if all(name in own for own in shapes)}
    layout = Layout.of(weights)
    flat = layout.flatten(weights, "the base model")

    def rows() -> Iterator[Tensor]:  # one expert is in memory at a time
        for source in tqdm(plan.experts, "reading experts", leave=False):
            who, tensors = f"expert {source.task.expert}", TENSORS[source.kind]
            whole = {n: t.to(place) for n, t in tensors(source, plan.base, state).items()}
            own = {name: whole.pop(source.prefix + name) for name in weights}
            own[table] = torch.cat([own[table], weights[table][len(own[table]) :]])
            Layout.of(whole).check(whole, f"the head of {who}")
            heads[source.task.name] = whole
            yield layout.flatten(own, who).sub_(flat)

    vectors = stored_vectors(plan, layout, flat, rows(), {table})
    manifests = [
        {
            **{"task": source.task.name, "answers": list(source.labels), "kind": source.kind},
            **{"precision": precision, "files": hashes(source.task.expert)},
        }
        for source in plan.experts
    ]
    rows = [rows and data_digest(rows) for parts in plan.rows.values() for rows in parts]
    given = (rows, length, plan.base.tokenizer.pad_token, place.type, plan.description.storage)
    digest = key_of(code_digest(load), hashes(plan.base.folder), manifests, *given)
    base = Base(plan.base.name, encoder, plan.base.tokenizer, digest)
    batches = partial(make_batches, base=base, batch_size=4, max_length=length)
    merge = [batches(rows)[0] if rows else [] for rows in plan.rows["merge"]]
    validation, test = (
        [labelled_split(rows, base, length) for rows in plan.rows[split]]
        for split in ("validation", "test")
    )
    answers = [task_forward(source, encoder, heads[source.task.name]) for source in plan.experts]

    def forward(parameters: Mapping[str, Tensor], pairs: Pairs) -> list[Tensor]:
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bfloat16"):
            found = [answers[task](parameters, batch.inputs) for task, batch in pairs]
        return [logits.float() for logits in found]

    experts = [Expert(m["task"], {}, heads[m["task"]], m) for m in manifests]
    problem = MergeProblem(vectors, merge, forward, encoder)
    return Experiment(base, experts, problem, validation, test, digest, cache_dir() / "unfinished")
