"""What a language suite needs of each GPU: memory, and the time that no run can be faster than.

Planned from the sizes alone, before anything is loaded; nothing here was measured. A run on a real
GPU is slower, and what is not counted (tokenising, completions, scoring) comes on top.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import transformers

from divmerge_book.evaluation.sizes import LanguageSize
from divmerge_book.planning.gpu_specs import ACCELERATORS, Accelerator
from divmerge_book.planning.memory import Line, Plan, plan, training_plan
from divmerge_book.planning.presets import smaller, too_small
from divmerge_book.planning.step_seconds import operations, step_seconds
from divmerge_book.planning.workloads import Fit, Model, Training

QWEN = {  # Qwen2.5-0.5B, as its config.json on the hub has it
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "name_or_path": "Qwen/Qwen2.5-0.5B",
}


def qwen() -> Model:
    """Qwen2.5-0.5B in numbers, made without its weights."""
    return Model.of(transformers.Qwen2Config(**QWEN))


def size_on(size: LanguageSize, gpu: Accelerator) -> LanguageSize:
    """The size as `preset` gives it to this GPU, with its precision settled."""
    if too_small(gpu.memory, gpu.bfloat16):
        size = smaller(size)
    settled = {"auto": "bfloat16" if gpu.bfloat16 else "float32"}
    recipe = replace(
        size.recipe, precision=settled.get(size.recipe.precision, size.recipe.precision)
    )
    return replace(size, recipe=recipe, precision=settled.get(size.precision, size.precision))


def training_of(size: LanguageSize, tokens: int, answers: int) -> Training:
    """What goes through the model at a time in fine-tuning; answers: of a row, in tokens."""
    recipe, rows = size.recipe, size.recipe.micro or size.recipe.batch_size
    return Training(
        rows,
        tokens,
        answers=rows * answers,
        precision=recipe.precision,
        checkpointing=recipe.checkpointing,
    )


def fit_of(size: LanguageSize, num_tasks: int, tokens: int, answers: int) -> Fit:
    """A step of the fit; answers: of a row, in tokens."""
    return Fit(
        num_tasks,
        size.batch_size,
        tokens,
        answers=size.batch_size * answers,
        deltas=size.storage,
        precision=size.precision,
        checkpointing=size.checkpointing,
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
    recipe = size.recipe
    batch = recipe.batch_size
    step = Fit(1, batch, tokens, answers=batch * answers, checkpointing=recipe.checkpointing)
    rate = gpu.half if recipe.precision == "bfloat16" else gpu.single
    seconds = operations(model, step) / rate + 28 * model.parameters / gpu.bandwidth
    return math.ceil((recipe.rows or rows) / batch) * recipe.epochs * seconds


def memory_plans(
    size: LanguageSize, gpu: str, *, num_tasks: int, tokens: int, answers: int, model: Model
) -> tuple[Plan, Plan]:
    """The plans of fine-tuning one expert and of the fit, on a GPU in ACCELERATORS.

    The base as it was loaded stays on the GPU beside either.
    """
    chosen = size_on(size, ACCELERATORS[gpu])
    fit = fit_of(chosen, num_tasks, tokens, answers)
    plans = training_plan(model, training_of(chosen, tokens, answers), gpu), plan(model, fit, gpu)
    loaded = Line("loaded base", 4 * model.parameters, "N x 4 bytes, as it was read")
    return tuple(replace(one, lines=(*one.lines, loaded)) for one in plans)


GROUPS = {  # lines of plans that a reader need not tell apart
    "base": "weights",
    "live buffer": "weights",
    "loaded base": "weights",
    "weights in bfloat16": "weights",
    "activations": "activations and answers",
    "logits": "activations and answers",
    "gradient of logits": "activations and answers",
    "experts' answers": "activations and answers",
}


def memory_table(
    size: LanguageSize, gpus: Sequence[str] = tuple(ACCELERATORS), **shape: object
) -> pd.DataFrame:
    """Gigabytes by what they hold: a row for fine-tuning and one for the fit, on each GPU.

    shape: as for `memory_plans`.
    """
    found = {}
    for key in gpus:
        both = memory_plans(size, key, **shape)
        for name, one in zip(("fine-tuning", "fit"), both, strict=True):
            held: dict[str, float] = {}
            for line in one.lines:
                group = GROUPS.get(line.what, line.what)
                held[group] = held.get(group, 0.0) + line.nbytes / 1e9
            found[ACCELERATORS[key].name, name] = held
    return pd.DataFrame(found).T.fillna(0.0)


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
