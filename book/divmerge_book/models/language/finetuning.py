"""Language-model experts: fine-tuned once and cached, or read from a folder."""

from dataclasses import asdict
from pathlib import Path

import datasets

from divmerge_book.data.code_digest import code_digest
from divmerge_book.data.tasks import Task
from divmerge_book.models import finetuning
from divmerge_book.models.language.models import Language
from divmerge_book.models.language.prompts import PROMPTS, Prompt
from divmerge_book.models.language.reading import Pair, answer_tokens, ask
from divmerge_book.models.language.training import LanguageRecipe, fine_tuned
from divmerge_core.storage import cache_dir, once


def training_pairs(
    base: Language, prompt: Prompt, rows: datasets.Dataset, recipe: LanguageRecipe
) -> tuple[list[Pair], dict[str, int]]:
    """Prompts with their right answers as tokens, and how many prompts and answers were cut."""
    asked = ask(base, prompt, rows, recipe.max_length)
    answers = [answer_tokens(base, prompt.answer(row), recipe.max_new) for row in rows]
    cut = sum(answer[-1] != base.stop for answer in answers)
    counts = {"shortened": asked.shortened, "cut_answers": cut}
    return list(zip(asked.prompts, answers, strict=True)), counts


def language_expert(
    base: Language, task: Task, recipe: LanguageRecipe, *, seed: int = 0, progress: bool = True
) -> finetuning.Expert:
    """The expert of a task: from the cache, or trained; a killed training resumes.

    The file holds the trained parameters; the state adds the base's others.
    """
    recipe, prompt = recipe.on(base), PROMPTS[task.name]
    rows = finetuning.training_rows(task, recipe.rows, seed)
    code = code_digest(
        "divmerge_book.models.language.finetuning.training_pairs",
        "divmerge_book.models.language.training.fine_tuned",
    )
    facts = {"prompt": asdict(prompt), "vocabulary": base.vocabulary}
    manifest = finetuning.manifest_of(base, task, recipe, rows, seed, code, **facts)
    folder = finetuning.folder_of(manifest, "lm-")

    def make(new: Path) -> None:
        pairs, counts = training_pairs(base, prompt, rows, recipe)
        unfinished = cache_dir() / "unfinished" / f"{folder.name}.pt"
        state = fine_tuned(base, pairs, recipe, seed=seed, checkpoint=unfinished, progress=progress)
        finetuning.save_expert(new, state, {**manifest, **counts})

    return load_language_expert(base, once(folder, make, holds="manifest.json"))


def load_language_expert(base: Language, folder: Path) -> finetuning.Expert:
    """An expert from its folder.

    Raises ValueError where it is damaged, or was not made from this base and vocabulary.
    """
    manifest, trained = finetuning.read_expert(folder, str(base.device))
    task, made = manifest["task"], (manifest["base"], manifest.get("vocabulary"))
    if made != (base.digest, base.vocabulary):
        raise ValueError(
            f"expert {task!r} was trained from {manifest['encoder']!r} with other weights or "
            f"another vocabulary than {base.name!r}; load its own base"
        )
    return finetuning.Expert(task, {**base.state, **trained}, {}, manifest)
