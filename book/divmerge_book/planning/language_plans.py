"""Memory and least time of a language suite on each GPU, planned from sizes alone.

Nothing here was measured. A run on a real GPU is slower; tokenising, completions and scoring are
not counted.
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
from divmerge_book.planning.step_seconds import operations, step_seconds
from divmerge_book.planning.workloads import Fit, Model, Training

QWEN = {  # Qwen2.5-0.5B, as its config.json on the hub has it
    **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    **{"tie_word_embeddings": True, "name_or_path": "Qwen/Qwen2.5-0.5B"},
}


def qwen() -> Model:
    """Qwen2.5-0.5B in numbers, made without its weights."""
    return Model.of(transformers.Qwen2Config(**QWEN))


def size_on(size: LanguageSize, gpu: Accelerator) -> LanguageSize:
    """The size as `preset` gives it to this GPU, with its precision resolved."""
    if too_small(gpu.memory, gpu.bfloat16):
        size = smaller(size)
    auto = "bfloat16" if gpu.bfloat16 else "float32"

    def resolved(precision: str) -> str:
        return auto if precision == "auto" else precision

    recipe = replace(size.recipe, precision=resolved(size.recipe.precision))
    return replace(size, recipe=recipe, precision=resolved(size.precision))


def training_of(size: LanguageSize, tokens: int, answers: int) -> Training:
    """One micro-batch of the fine-tuning; answers: of a row, in tokens."""
    recipe, rows = size.recipe, size.recipe.micro or size.recipe.batch_size
    how = {"precision": recipe.precision, "checkpointing": recipe.checkpointing}
    return Training(rows, tokens, rows * answers, **how)


def fit_of(size: LanguageSize, num_tasks: int, tokens: int, answers: int) -> Fit:
    """A step of the fit; answers: of a row, in tokens."""
    return Fit(
        size.batch_size,
        tokens,
        size.batch_size * answers,
        precision=size.precision,
        checkpointing=size.checkpointing,
        tasks=num_tasks,
        deltas=size.storage,
        cached="top" if size.top else "bfloat16",
        top=size.top or 32,
        inputs=size.merge_rows or 1,
    )


def training_seconds(
    model: Model, size: LanguageSize, gpu: Accelerator, tokens: int, answers: int, rows: int
) -> float:
    """Seconds of one expert's fine-tuning at best: products at peak, AdamW at full bandwidth.

    AdamW reads weights, gradients and two means, and writes three of them: 28 bytes a parameter.
    """
    recipe, batch = size.recipe, size.recipe.batch_size
    step = Fit(batch, tokens, batch * answers, checkpointing=recipe.checkpointing, tasks=1)
    rate = gpu.half if recipe.precision == "bfloat16" else gpu.single
    seconds = operations(model, step) / rate + 28 * model.parameters / gpu.bandwidth
    return math.ceil((recipe.rows or rows) / batch) * recipe.epochs * seconds


def memory_plans(
    size: LanguageSize, gpu: str, *, num_tasks: int, tokens: int, answers: int, model: Model
) -> tuple[Plan, Plan]:
    """The plans of fine-tuning one expert and of the fit, on a GPU in ACCELERATORS.

    The base as it was loaded stays on the GPU in both.
    """
    chosen = size_on(size, ACCELERATORS[gpu])
    works = training_of(chosen, tokens, answers), fit_of(chosen, num_tasks, tokens, answers)
    loaded = Line("loaded base", 4 * model.parameters, "N x 4 bytes, as it was read")
    plans = [plan(model, work, gpu) for work in works]
    return tuple(replace(one, lines=(*one.lines, loaded)) for one in plans)


GROUPS = {  # lines of plans that a table joins
    **dict.fromkeys(("base", "merged model", "loaded base", "weights in bfloat16"), "weights"),
    **dict.fromkeys(
        ("activations", "logits", "gradient of logits", "experts' answers"),
        "activations and answers",
    ),
}


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
        plans = memory_plans(size, key, model=model, **shape)
        step = step_seconds(model, fit_of(chosen, **shape), gpu)["step"]
        steps = math.ceil((chosen.merge_rows or rows) / chosen.batch_size) * chosen.epochs
        one = training_seconds(model, chosen, gpu, tokens, answers, rows)
        found.append(
            {
                "GPU": gpu.name,
                "preset": "smaller" if too_small(gpu.memory, gpu.bfloat16) else "as it is",
                "precision": chosen.precision,
                "fine-tuning, GB": plans[0].total / 1e9,
                "fit, GB": plans[1].total / 1e9,
                "fits": all(plan.fits for plan in plans),
                "a step of the fit, s": step,
                "the fit, s": steps * step,
                "an expert, s": one,
                "experts and fit, s": num_tasks * one + steps * step,
            }
        )
    return pd.DataFrame(found).set_index("GPU")
