"""Objectives of a fit of coefficients, divergences and baselines; and one such fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.cache import cached
from divmerge_book.evaluation.experiment import Experiment
from divmerge_book.evaluation.hyperparameter_search import validation_anp
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.models.encoders import classifier_forward, make_batches
from divmerge_core.divergences import DIVERGENCES, cosine, entropy, kl, objective
from divmerge_core.divergences.parse import Objective
from divmerge_core.kernels.delta_storage import dense
from divmerge_core.kernels.merge import grouped_merge
from divmerge_core.merging.coefficients import Coefficients
from divmerge_core.merging.fit import Step, fit_coefficients
from divmerge_core.merging.problem import Diverged, MergeProblem
from divmerge_core.merging.task_vectors import Layout, TaskVectors
from divmerge_core.registry import Registry

BASELINE_OBJECTIVES = Registry("objective")  # name -> function(experiment) -> FitSpec
START = "start"  # the objective of no fit: the merge at 1/T
WORDS = "embeddings.word_embeddings.weight"
Targets = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class FitConfig:
    """What all fits share. rates: Adam's step sizes to choose from; rate: where none is chosen."""

    epochs: int = 4
    rates: tuple[float, ...] = (3e-2, 1e-1)
    rate: float = 3e-2
    seed: int = 0


@dataclass(frozen=True)
class FitSpec:
    """What a fit minimises, and on what. targets: None for the experts' own logits."""

    problem: MergeProblem
    loss: Objective
    targets: Targets | None = None


@BASELINE_OBJECTIVES.register("hidden_cosine", label="hidden states, cosine")
def hidden_cosine(experiment: Experiment) -> FitSpec:
    """The angle between the pooled hidden states, which the heads read, of expert and merge."""
    width = experiment.base.encoder.config.hidden_size
    place = experiment.problem.vectors.base.device
    alike = {"weight": torch.eye(width, device=place), "bias": torch.zeros(width, device=place)}
    forward = classifier_forward(experiment.base, [alike] * len(experiment.experts))
    return FitSpec(replace(experiment.problem, forward=forward), cosine)


@BASELINE_OBJECTIVES.register("entropy", label="entropy (AdaMerging)")
def entropy_alone(experiment: Experiment) -> FitSpec:
    """The merged model's own uncertainty: no expert is asked."""
    return FitSpec(experiment.problem, lambda expert, merged: entropy(merged))


@BASELINE_OBJECTIVES.register("labels", label="labels (oracle, cheats)")
def labels(experiment: Experiment) -> FitSpec:
    """Cross-entropy on gold answers of the merge inputs, which no method may see: an oracle."""
    classes = [len(TASKS[task].answers) for task in experiment.problem.vectors.tasks]
    targets = [
        [one_hot(part, count).float().log() for part in parts]
        for count, parts in zip(classes, gold_answers(experiment), strict=True)
    ]
    return FitSpec(experiment.problem, kl, targets)


def gold_answers(experiment: Experiment) -> list[list[Int[Tensor, " A"]]]:
    """Gold answers of the merge inputs, `[task][batch] -> [A]`: only the oracle may ask."""
    found = []
    for number, task in enumerate(experiment.problem.vectors.tasks):
        sizes = [len(batch.weight) for batch in experiment.problem.batches[number]]
        rows = TASKS[task].load("merge").select(range(sum(sizes)))
        known = TASKS[task].read()["merge"][: sum(sizes)]
        assert [text for text, *_ in known] == list(rows["text"])
        length = experiment.experts[number].manifest["recipe"]["max_length"]
        _, order = make_batches(rows, experiment.base, batch_size=sizes[0], max_length=length)
        answers = torch.tensor([TASKS[task].answers.index(answer) for *_, answer in known])
        found.append(list(answers[order.cpu()].to(order.device).split(sizes)))
    return found


def fit_spec(experiment: Experiment, spec: str, temperature: float = 1.0) -> FitSpec:
    """The fit that an objective asks for: a name in BASELINE_OBJECTIVES, or a divergence's spec.

    Raises ValueError for unknown ones, and a temperature where there are no two answers.
    """
    if spec not in BASELINE_OBJECTIVES:
        return FitSpec(experiment.problem, objective(spec, temperature))
    if temperature != 1:
        raise ValueError(f"{spec!r} has no temperature, got {temperature}; leave it out")
    return BASELINE_OBJECTIVES[spec](experiment)


def objectives() -> list[str]:
    """Every registered divergence, and the baseline objectives."""
    return [*DIVERGENCES, *BASELINE_OBJECTIVES]


SPELT = {  # of words in names of objectives: what is no common word
    **{word: word.upper() for word in ("js", "kl", "l2", "mse")},
    **{"hellinger": "Hellinger", "jeffreys": "Jeffreys", "renyi": "Rényi"},
}


def named(spec: str) -> str:
    """`reverse_kl` -> `reverse KL`; `hidden_cosine` -> its label."""
    if spec in BASELINE_OBJECTIVES:
        return BASELINE_OBJECTIVES.facts[spec]["label"]
    return " ".join(SPELT.get(word, word) for word in spec.split("_"))


# --- one fit --------------------------------------------------------------------------------------
def with_used_words(problem: MergeProblem) -> MergeProblem:
    """The problem without the rows of the word embedding that none of its inputs names.

    No gradient reaches these, so a fit finds the same coefficients in less time. Token 0 stays, as
    it pads.
    """
    vectors, layout = problem.vectors, problem.vectors.layout
    if WORDS not in layout.names:
        return problem
    place = layout.names.index(WORDS)
    (start, stop), (count, width) = layout.bounds[place], layout.shapes[place]
    named = [b.inputs["input_ids"].flatten() for batches in problem.batches for b in batches]
    used = torch.cat([*named, named[0].new_zeros(1)]).unique()
    entries = (start + used[:, None] * width + torch.arange(width, device=used.device)).flatten()
    rest = torch.arange(layout.size, device=used.device)
    kept = torch.cat([rest[:start], entries, rest[stop:]])
    shapes = (*layout.shapes[:place], (len(used), width), *layout.shapes[place + 1 :])
    number = used.new_zeros(count)
    number[used] = torch.arange(len(used), device=used.device)
    batches = [
        [replace(b, inputs={**b.inputs, "input_ids": number[b.inputs["input_ids"]]}) for b in some]
        for some in problem.batches
    ]
    base, deltas = vectors.base[kept], dense(vectors.deltas)[:, kept]
    smaller = TaskVectors(Layout(layout.names, shapes), vectors.tasks, base, deltas)
    return replace(problem, vectors=smaller, batches=batches)


def coefficients_of(vectors: TaskVectors, grouping: str) -> Coefficients:
    """The coefficients 1/T, where every fit begins."""
    start = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping)
    return start.to(vectors.base.device)


def merge(vectors: TaskVectors, coeffs: Float[Tensor, "T G"], grouping: str) -> Float[Tensor, " N"]:
    """The merged parameters at these coefficients."""
    segments = coefficients_of(vectors, grouping).segments
    return grouped_merge(vectors.base, vectors.deltas, coeffs.to(vectors.base), segments)


def fit(
    spec: FitSpec,
    grouping: str,
    rate: float,
    config: FitConfig,
    callback: Callable[[Step], None] | None = None,
) -> tuple[Float[Tensor, "T G"], bool]:
    """The coefficients of a fit, or 1/T where it diverges; and whether it does."""
    problem = with_used_words(spec.problem)
    coefficients = coefficients_of(problem.vectors, grouping)
    options = {"targets": spec.targets, "callback": callback, "progress": False}
    options |= {"epochs": config.epochs, "lr": rate, "seed": config.seed}
    try:
        fit_coefficients(problem, coefficients, spec.loss, **options)
    except Diverged:
        return coefficients_of(problem.vectors, grouping)().detach(), True
    return coefficients().detach(), False


def fit_result(
    experiment: Experiment,
    objective: str,
    grouping: str,
    rate: float,
    config: FitConfig,
    temperature: float = 1.0,
) -> dict:
    """A fit's coefficients [T][G], its validation ANP, and whether it diverged; kept in the cache.

    objective: START for no fit at all. A fit that diverges is scored where it started, at 1/T.
    """

    def find() -> dict:
        vectors = experiment.problem.vectors
        coeffs, diverged = coefficients_of(vectors, grouping)().detach(), False
        if objective != START:
            spec = fit_spec(experiment, objective, temperature)
            coeffs, diverged = fit(spec, grouping, rate, config)
        anp = validation_anp(experiment, merge(vectors, coeffs, grouping))
        return {"coefficients": coeffs.tolist(), "validation": anp, "diverged": diverged}

    what = (objective, grouping, rate, config.epochs, config.seed, temperature)
    return cached(experiment, find, "fit of an objective", *what)


def fit_and_predict(
    experiment: Experiment,
    *,
    seed: int,
    count: int,
    objective: str,
    grouping: str,
    rate: float,
    config: FitConfig,
    temperature: float = 1.0,
    **labels: object,
) -> pd.DataFrame:
    """Test predictions of a fit on the first `count` tasks, its validation ANP, and `diverged`."""
    part = experiment.select(experiment.problem.vectors.tasks[:count])
    found = fit_result(part, objective, grouping, rate, config, temperature)
    flat = merge(part.problem.vectors, torch.tensor(found.pop("coefficients")), grouping)
    return evaluate(part.problem, flat, part.test).assign(**found)
