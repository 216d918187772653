"""From a checked plan of language models to an experiment, one expert in memory at a time."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace

import datasets
import torch
from torch import Tensor
from tqdm import tqdm

from divmerge_book.data.code_digest import code_digest, key_of
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.language_scoring import WrittenSplit, likelihood_split, written_split
from divmerge_book.evaluation.metrics import LabelledSplit
from divmerge_book.models.encoders import check_device, resolve
from divmerge_book.models.finetuning import Expert, data_digest
from divmerge_book.models.language.agreement import check_forward
from divmerge_book.models.language.completions import completions
from divmerge_book.models.language.finetuning import load_language_expert
from divmerge_book.models.language.forward import language_forward
from divmerge_book.models.language.models import Language, described, vocabulary_digest
from divmerge_book.user_models.folders import read_model
from divmerge_book.user_models.language import LanguageSource, kind_of, tables
from divmerge_book.user_models.plan import Plan
from divmerge_book.user_models.weights import hashes, stored_vectors
from divmerge_core.merging.problem import Batch, MergeProblem
from divmerge_core.merging.task_vectors import Layout
from divmerge_core.storage import cache_dir

NEVER = -30.0  # log-probability of a token that an expert has no row for
WHOLE = 10**9  # tokens of a prompt: `check` has refused those that are too long


def opened(plan: Plan, place: torch.device) -> Language:
    """The base in float32. Raises ValueError for missing weights, and as `check_forward`."""
    model, missing = read_model(kind_of(plan.base.config), plan.base.folder)
    if missing:
        raise ValueError(f"the base {plan.base.folder} lacks {sorted(missing)[:3]}; save it again")
    base = described(plan.base.name, model.to(place), plan.base.tokenizer)
    check_forward(base)
    return base


def reader(base: Language, source: LanguageSource) -> Language:
    """The base's model with an expert's tokenizer, which adds no special tokens to a chat's own."""
    words = source.reading.tokenizer
    if source.reading.chat:
        words = copy.deepcopy(words)
        if (core := getattr(words, "backend_tokenizer", None)) is not None:
            core.post_processor = None
        else:  # one in Python, such as ByT5's
            words.build_inputs_with_special_tokens = lambda ids, *other: ids
    ends = source.reading.ends
    return replace(base, tokenizer=words, vocabulary=vocabulary_digest(words), ends=ends)


def expert_state(source: LanguageSource, base: Language) -> dict[str, Tensor]:
    """All parameters of an expert in float32, with as many rows as its own tables have."""
    if source.adapter is not None:
        return source.adapter.apply(base.state)
    if source.kind == "package":
        return dict(load_language_expert(base, source.task.expert).state)
    model, missing = read_model(kind_of(source.model.config), source.task.expert)
    if missing:
        raise ValueError(f"expert {source.task.expert} lacks {sorted(missing)[:3]}; save it again")
    own, kept = dict(model.named_buffers()), dict(base.model.named_buffers())
    for name in own.keys() & kept.keys():
        if own[name].shape == kept[name].shape and not own[name].equal(kept[name].cpu()):
            text = f"its {name} is no parameter and differs: the merge keeps the base's"
            warnings.warn(f"task {source.task.name!r}: {text}", stacklevel=3)
    return {name: tensor.detach().to(base.device) for name, tensor in model.named_parameters()}


def padded(table: Tensor, rows: int, value: float = 0.0, *, dim: int = 0) -> Tensor:
    """A tensor with more rows (or columns, dim 1) that hold this value."""
    more = [0, 0] * (table.ndim - 1 - dim) + [0, rows - table.shape[dim]]
    return torch.nn.functional.pad(table, more, value=value)


def answered(
    base: Language, source: LanguageSource, state: Mapping, rows: datasets.Dataset | None, **how
) -> tuple[list[Batch], dict]:
    """Batches with the expert's distributions at its own greedy answers, and counts of these."""
    if rows is None:
        return [], {}
    key = [hashes(source.task.expert)]
    found = completions(base, state, source.prompt, rows, key=key, max_length=WHOLE, **how)
    return list(found.batches), dict(found.counts)


def exam(
    base: Language, source: LanguageSource, rows: datasets.Dataset | None, **how: object
) -> LabelledSplit | WrittenSplit:
    """A labelled split, scored as the task asks; without rows it has none."""
    if rows is None:
        return LabelledSplit([], torch.zeros(0, dtype=torch.long, device=base.device))
    given = (base, source.prompt, rows)
    if source.score == "likelihood":
        spaced = source.reading.chat or all(text[-1].isspace() for text in rows["text"])
        return likelihood_split(*given, max_length=WHOLE, before="" if spaced else " ")
    return written_split(*given, max_length=WHOLE, grade=source.score, **how)


def load_language(plan: Plan, *, device: str, precision: str) -> Experiment:
    """The plan as an experiment: base, task vectors, experts' answers, labelled rows.

    All parameters are merged, tied ones once. Every expert answers its prompts greedily, and its
    distributions over the vocabulary at these answers are kept (and cached on disk). Tables have
    the rows of the longest; what one expert added stays with it (see `keep_rows`).

    Raises ValueError for weights that are missing, damaged, not finite or not of this base.
    """
    place = check_device(device)
    precision, most = resolve(precision, place), plan.description.max_new
    base, size = opened(plan, place), plan.tokens.rows
    long, how = tables(base.model), {"max_new": most, "precision": precision}
    whole = {n: padded(t, size) if n in long else t for n, t in base.state.items()}
    layout = Layout.of(whole)
    flat = layout.flatten(whole, "the base model")
    readers = [reader(base, source) for source in plan.experts]
    batches, counts = [], []

    def rows() -> Iterator[Tensor]:  # one expert is in memory at a time
        experts = tqdm(plan.experts, "reading experts", leave=False)
        every = zip(experts, readers, plan.rows["merge"], strict=True)
        for source, own, asked in every:
            state = expert_state(source, base)
            found, count = answered(own, source, state, asked, **how)
            batches.append([replace(b, expert=padded(b.expert, size, NEVER, dim=1)) for b in found])
            counts.append(count)
            for name in long & set(state):
                more = whole[name][len(state[name]) :]
                state[name] = torch.cat([state[name], more])
            yield layout.flatten(state, f"expert {source.task.expert}").sub_(flat)

    vectors = stored_vectors(plan, layout, flat, rows(), long)
    manifests = [
        {
            **{"task": source.task.name, "answers": list(source.labels), "kind": source.kind},
            **{"precision": precision, "files": hashes(source.task.expert), "counts": count},
        }
        for source, count in zip(plan.experts, counts, strict=True)
    ]
    experts = [Expert(manifest["task"], {}, {}, manifest) for manifest in manifests]
    splits = [
        [exam(*given, **how) for given in zip(readers, plan.experts, plan.rows[split], strict=True)]
        for split in ("validation", "test")
    ]
    seen = [rows and data_digest(rows) for parts in plan.rows.values() for rows in parts]
    scores = [plan.description.storage, *(source.score for source in plan.experts)]
    digest = key_of(code_digest(load_language), base.digest, manifests, seen, scores, most)
    forward = language_forward(base.model, precision=precision)
    problem = MergeProblem(vectors, batches, forward, base.model)
    return Experiment(base, experts, problem, *splits, digest, cache_dir() / "unfinished")
