"""What a fit of coefficients may minimise, divergence or not; and one such fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.cache import kept
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

BESIDE = Registry("objective")  # name -> function(bench) -> FitSpec: no divergence of answers
WORDS = "embeddings.word_embeddings.weight"
Targets = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Rule:
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


@BESIDE.register("hidden_cosine", label="hidden states, cosine")
def hidden_cosine(bench: Experiment) -> FitSpec:
    """The angle between the pooled hidden states, which the heads read, of expert and merge."""
    width = bench.base.encoder.config.hidden_size
    place = bench.problem.vectors.base.device
    alike = {"weight": torch.eye(width, device=place), "bias": torch.zeros(width, device=place)}
    forward = classifier_forward(bench.base, [alike] * len(bench.experts))
    return FitSpec(replace(bench.problem, forward=forward), cosine)


@BESIDE.register("entropy", label="entropy (AdaMerging)")
def entropy_alone(bench: Experiment) -> FitSpec:
    """The merged model's own uncertainty: no expert is asked."""
    return FitSpec(bench.problem, lambda expert, merged: entropy(merged))


@BESIDE.register("labels", label="labels (oracle, cheats)")
def labels(bench: Experiment) -> FitSpec:
    """Cross-entropy on gold answers of the merge inputs, which no method may see: an oracle."""
    targets = [
        [
            torch.nn.functional.one_hot(part, len(TASKS[task].answers)).float().log()
            for part in parts
        ]
        for task, parts in zip(bench.problem.vectors.tasks, gold_answers(bench), strict=True)
    ]
    return FitSpec(bench.problem, kl, targets)


def gold_answers(bench: Experiment) -> list[list[Int[Tensor, " A"]]]:
    """Gold answers of the merge inputs, `[task][batch] -> [A]`: only the oracle may ask."""
    found = []
    for number, task in enumerate(bench.problem.vectors.tasks):
        sizes = [len(batch.weight) for batch in bench.problem.batches[number]]
        rows = TASKS[task].load("merge").select(range(sum(sizes)))
        known = TASKS[task].read()["merge"][: sum(sizes)]
        assert [text for text, *_ in known] == list(rows["text"])
        length = bench.experts[number].manifest["recipe"]["max_length"]
        _, order = make_batches(rows, bench.base, batch_size=sizes[0], max_length=length)
        answers = torch.tensor([TASKS[task].answers.index(answer) for *_, answer in known])
        found.append(list(answers[order.cpu()].to(order.device).split(sizes)))
    return found


def pose(bench: Experiment, spec: str, temperature: float = 1.0) -> FitSpec:
    """The fit that an objective asks for: a name in BESIDE, or a divergence's spec.

    Raises ValueError for unknown ones, and a temperature where there are no two answers.
    """
    if spec not in BESIDE:
        return FitSpec(bench.problem, objective(spec, temperature))
    if temperature != 1:
        raise ValueError(f"{spec!r} has no temperature, got {temperature}; leave it out")
    return BESIDE[spec](bench)


def objectives() -> list[str]:
    """Every registered divergence, and what stands beside them."""
    return [*DIVERGENCES, *BESIDE]


def named(spec: str) -> str:
    """`reverse_chi_squared` -> `reverse chi squared`; `hidden_cosine` -> its label."""
    return BESIDE.facts[spec]["label"] if spec in BESIDE else spec.replace("_", " ")


# --- one fit --------------------------------------------------------------------------------------


def only_seen(problem: MergeProblem) -> MergeProblem:
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
    before, after = torch.arange(start), torch.arange(stop, layout.size)
    kept = torch.cat([before.to(used), entries, after.to(used)])
    shapes = [*layout.shapes]
    shapes[place] = (len(used), width)
    number = used.new_zeros(count)
    number[used] = torch.arange(len(used), device=used.device)
    batches = [
        [replace(b, inputs={**b.inputs, "input_ids": number[b.inputs["input_ids"]]}) for b in some]
        for some in problem.batches
    ]
    smaller = TaskVectors(
        Layout(layout.names, tuple(shapes)),
        vectors.tasks,
        vectors.base[kept],
        dense(vectors.deltas)[:, kept],
    )
    return replace(problem, vectors=smaller, batches=batches)


def fit(
    posed: FitSpec,
    grouping: str,
    rate: float,
    rule: Rule,
    watch: Callable[[Step], None] | None = None,
) -> Float[Tensor, "T G"]:
    """The coefficients that a fit ends with. Raises Diverged where it runs off."""
    problem = only_seen(posed.problem)
    vectors = problem.vectors
    coefficients = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping)
    fit_coefficients(
        problem,
        coefficients.to(vectors.base.device),
        posed.loss,
        targets=posed.targets,
        epochs=rule.epochs,
        lr=rate,
        seed=rule.seed,
        watch=watch,
        progress=False,
    )
    return coefficients().detach()


def merge(vectors: TaskVectors, coeffs: Float[Tensor, "T G"], grouping: str) -> Float[Tensor, " N"]:
    """The merged parameters at these coefficients."""
    segments = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping).segments
    return grouped_merge(vectors.base, vectors.deltas, coeffs.to(vectors.base), segments)


def learned(
    bench: Experiment, spec: str, grouping: str, rate: float, rule: Rule, temperature: float = 1.0
) -> dict:
    """A fit's coefficients [T][G], its validation ANP, and whether it diverged; kept in the cache.

    A fit that diverges is scored where it started, at 1/T.
    """

    def find() -> dict:
        vectors, failed = bench.problem.vectors, False
        try:
            coeffs = fit(pose(bench, spec, temperature), grouping, rate, rule)
        except Diverged:
            failed = True
            coeffs = Coefficients(vectors.layout, len(vectors.tasks), grouping=grouping)().detach()
        anp = validation_anp(bench, merge(vectors, coeffs, grouping))
        return {"coefficients": coeffs.tolist(), "validation": anp, "diverged": failed}

    what = ("choice", spec, grouping, rate, rule.epochs, rule.seed, temperature)
    return kept(bench, find, *what)


def answers(bench: Experiment, coeffs: Sequence[Sequence[float]], grouping: str) -> list[dict]:
    """Test answers of the model merged with these coefficients; kept in the cache."""

    def find() -> list[dict]:
        flat = merge(bench.problem.vectors, torch.tensor(coeffs), grouping)
        return evaluate(bench.problem, flat, bench.test).to_dict("records")

    return kept(bench, find, "choice, test", coeffs, grouping)
