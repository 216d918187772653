"""Memory and least time of a language suite on each GPU, planned from sizes alone.

Nothing here was measured: a real run is slower, and tokenising, completions, scoring and
communication are not counted. Merging moves (T + 2) N numbers and its gradient (T + 1) N; the model
multiplies each weight with each token once forwards and twice backwards, 2 operations a time; a
divergence reads and writes logits FUSED or PLAIN times.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import transformers

from divmerge_book.evaluation.sizes import LanguageSize
from divmerge_book.planning.gpu_specs import ACCELERATORS, Accelerator
from divmerge_book.planning.memory import Line, Plan, plan
from divmerge_book.planning.presets import smaller, too_small
from divmerge_book.planning.workloads import DELTAS, PRECISIONS, Fit, Model, Training

FUSED, PLAIN = 3, 7  # passes of a divergence over [A, V]
QWEN = {  # Qwen2.5-0.5B, as its config.json on the hub has it
    **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    **{"tie_word_embeddings": True, "name_or_path": "Qwen/Qwen2.5-0.5B"},
}
ACTIVATIONS = ("activations", "logits", "gradient of logits", "experts' answers")
GROUPS = {  # lines of plans that a table joins
    **dict.fromkeys(("base", "merged model", "loaded base", "weights in bfloat16"), "weights"),
    **dict.fromkeys(ACTIVATIONS, "activations and answers"),
}


def merge_bytes(model: Model, fit: Fit) -> tuple[float | int, float | int]:
    """Bytes that a merge and its gradient move on the device, and over the link to the host."""
    numbers = model.parameters
    if fit.deltas == "low_rank":
        numbers = fit.rank * model.layers * model.sides
    deltas = 2 * fit.tasks * DELTAS[fit.deltas] * numbers
    moved = (3 * 4 * model.parameters + deltas) / fit.ranks
    return moved, deltas / fit.ranks if fit.deltas.startswith("streamed") else 0.0


def operations(model: Model, work: Training) -> float | int:
    """Operations of forward and backward pass: layers on all tokens, the head on answers.

    Attention's own products are 4 S H per token and layer forwards (masks save nothing).
    """
    tokens, answers = work.tasks * work.rows * work.tokens, work.tasks * work.positions
    body = 2 * model.layers * model.block + 4 * work.tokens * model.hidden * model.layers
    head = 3 * 2 * model.hidden * work.num_classes(model) * answers
    return ((3 + work.checkpointing) * tokens * body + head) / work.ranks


def rate(gpu: Accelerator, precision: str) -> float | int:
    """Operations per second in this precision."""
    return gpu.half if precision == "bfloat16" else gpu.single


def step_seconds(model: Model, fit: Fit, gpu: Accelerator) -> dict[str, float | int]:
    """Least seconds of merge, model, divergence, and their sum."""
    moved, streamed = merge_bytes(model, fit)
    logits = fit.tasks * fit.positions * fit.num_classes(model) / fit.ranks
    a_pass = logits * PRECISIONS[fit.precision] / gpu.bandwidth
    parts = {
        "merge": max(moved / gpu.bandwidth, streamed / gpu.link),
        "model": operations(model, fit) / rate(gpu, fit.precision),
        "divergence": FUSED * a_pass,
    }
    return {**parts, "step": sum(parts.values()), "divergence, plain": PLAIN * a_pass}


def qwen() -> Model:
    """Qwen2.5-0.5B in numbers, made without its weights."""
    return Model.of(transformers.Qwen2Config(**QWEN))


def size_on(size: LanguageSize, gpu: Accelerator) -> LanguageSize:
    """The size as `preset` gives it to this GPU, with its precision resolved."""
    size = smaller(size) if too_small(gpu.memory, gpu.bfloat16) else size
    auto = {"auto": "bfloat16" if gpu.bfloat16 else "float32"}
    precisions = [auto.get(one.precision, one.precision) for one in (size, size.recipe)]
    recipe = replace(size.recipe, precision=precisions[1])
    return replace(size, recipe=recipe, precision=precisions[0])


def fit_of(size: LanguageSize, num_tasks: int, tokens: int, answers: int) -> Fit:
    """A step of the fit; answers: of a row, in tokens."""
    cached, top = ("top", size.top) if size.top else ("bfloat16", 32)
    how = {"precision": size.precision, "checkpointing": size.checkpointing}
    held = {"deltas": size.storage, "cached": cached, "top": top, "inputs": size.merge_rows or 1}
    rows = size.batch_size
    return Fit(rows, tokens, rows * answers, tasks=num_tasks, **how, **held)


def training_of(size: LanguageSize, rows: int, tokens: int, answers: int) -> Training:
    """So many rows of the fine-tuning at a time; answers: of a row, in tokens."""
    how = {"precision": size.recipe.precision, "checkpointing": size.recipe.checkpointing}
    return Training(rows, tokens, rows * answers, **how)


def training_seconds(
    model: Model, size: LanguageSize, gpu: Accelerator, tokens: int, answers: int, rows: int
) -> float:
    """Seconds of one expert's fine-tuning at best: products at peak, AdamW at full bandwidth.

    AdamW reads weights, gradients and two means, and writes three of them: 28 bytes a parameter.
    """
    recipe, batch = size.recipe, size.recipe.batch_size
    step = operations(model, training_of(size, batch, tokens, answers))
    seconds = step / rate(gpu, recipe.precision) + 28 * model.parameters / gpu.bandwidth
    return math.ceil((recipe.rows or rows) / batch) * recipe.epochs * seconds


def memory_plans(
    size: LanguageSize, gpu: str, *, num_tasks: int, tokens: int, answers: int, model: Model
) -> tuple[Plan, Plan]:
    """Plans of fine-tuning one expert and of the fit; the base as it was loaded stays in both."""
    size = size_on(size, ACCELERATORS[gpu])
    micro = size.recipe.micro or size.recipe.batch_size
    works = training_of(size, micro, tokens, answers), fit_of(size, num_tasks, tokens, answers)
    loaded = Line("loaded base", 4 * model.parameters, "N x 4 bytes, as it was read")
    return tuple(plan(model, work, gpu, beside=(loaded,)) for work in works)


def memory_table(
    size: LanguageSize, gpus: Sequence[str] = tuple(ACCELERATORS), **shape: object
) -> pd.DataFrame:
    """Gigabytes by what they hold: a row for fine-tuning and one for the fit, on each GPU.

    shape: as for `memory_plans`.
    """
    rows = [
        (ACCELERATORS[key].name, part, GROUPS.get(line.what, line.what), line.nbytes / 1e9)
        for key in gpus
        for part, one in zip(("fine-tuning", "fit"), memory_plans(size, key, **shape), strict=True)
        for line in one.lines
    ]
    table = pd.DataFrame(rows, columns=["gpu", "part", "what", "GB"])
    wide = table.pivot_table("GB", ["gpu", "part"], "what", "sum", fill_value=0.0, sort=False)
    return wide.rename_axis(index=[None, None], columns=None)


def suite_forecast(
    size: LanguageSize,
    gpus: Sequence[str] = tuple(ACCELERATORS),
    *,
    num_tasks: int,
    tokens: int,
    answers: int,
    rows: int,
    model: Model | None = None,
) -> pd.DataFrame:
    """A row per GPU: the preset it gets, gigabytes of both parts, and least seconds of each.

    tokens: of a row, with its answer; answers: those of the answer. rows: of training, for a recipe
    that takes all. model: None for Qwen2.5-0.5B.
    """
    model, found = model or qwen(), []
    shape = {"num_tasks": num_tasks, "tokens": tokens, "answers": answers}
    for key in gpus:
        gpu, chosen = ACCELERATORS[key], size_on(size, ACCELERATORS[key])
        training, fit = memory_plans(size, key, model=model, **shape)
        step = step_seconds(model, fit_of(chosen, **shape), gpu)["step"]
        steps = math.ceil((chosen.merge_rows or rows) / chosen.batch_size) * chosen.epochs
        expert = training_seconds(model, chosen, gpu, tokens, answers, rows)
        found.append(
            {
                "GPU": gpu.name,
                "preset": "smaller" if too_small(gpu.memory, gpu.bfloat16) else "as it is",
                "precision": chosen.precision,
                "fine-tuning, GB": training.total / 1e9,
                "fit, GB": fit.total / 1e9,
                "fits": training.fits and fit.fits,
                "a step of the fit, s": step,
                "the fit, s": steps * step,
                "an expert, s": expert,
                "experts and fit, s": num_tasks * expert + steps * step,
            }
        )
    return pd.DataFrame(found).set_index("GPU")
