"""Language-model experts: fine-tuned once and kept by content, or read from a folder."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
from safetensors.torch import load_file

from divmerge_book.data.code_digest import code_digest, versions
from divmerge_book.data.tasks import Task
from divmerge_book.models.finetuning import Expert, data_digest, folder_of, save_expert
from divmerge_book.models.language.models import Language, check_same, load_language
from divmerge_book.models.language.prompts import PROMPTS, Prompt
from divmerge_book.models.language.reading import Pair, answer_tokens, ask
from divmerge_book.models.language.training import LanguageRecipe, fine_tuned
from divmerge_core.storage import cache_dir, once, sha256


def training_pairs(
    base: Language, prompt: Prompt, rows: datasets.Dataset, recipe: LanguageRecipe
) -> tuple[list[Pair], dict[str, int]]:
    """Prompts with their right answers as tokens; how many prompts and answers had to be cut."""
    asked = ask(base, prompt, rows, recipe.max_length)
    answers = [answer_tokens(base, prompt.answer(row), recipe.max_new) for row in rows]
    cut = sum(answer[-1] != base.stop for answer in answers)
    counts = {"shortened": asked.shortened, "cut_answers": cut}
    return list(zip(asked.prompts, answers, strict=True)), counts


def language_expert(
    base: Language, task: Task, recipe: LanguageRecipe, *, seed: int = 0, progress: bool = True
) -> Expert:
    """The expert for a task: from the cache where one was made in exactly this way, else trained.

    A training that was killed goes on where it stood. The key holds the base's digest, the rows'
    digest, prompt, recipe, seed, device type, the training's code and the versions of torch,
    transformers and tokenizers. On disk it holds the parameters that were trained; its state adds
    the base's others.
    """
    recipe, prompt = recipe.on(base), PROMPTS[task.name]
    rows = task.load("train").shuffle(seed=seed)
    rows = rows.select(range(min(recipe.rows or len(rows), len(rows))))
    manifest = {
        "task": task.name,
        "answers": list(task.answers),
        "prompt": asdict(prompt),
        "encoder": base.name,
        "base": base.digest,
        "vocabulary": base.vocabulary,
        "data": data_digest(rows),
        "rows": len(rows),
        "recipe": asdict(recipe),
        "seed": seed,
        "device": base.device.type,
        "code": code_digest(
            "divmerge_book.models.language.finetuning.training_pairs",
            "divmerge_book.models.language.training.fine_tuned",
        ),
        **versions("torch", "transformers", "tokenizers"),
    }
    folder = folder_of(manifest, "lm-")

    def make(new: Path) -> None:
        pairs, counts = training_pairs(base, prompt, rows, recipe)
        unfinished = cache_dir() / "unfinished" / f"{folder.name}.pt"
        state = fine_tuned(base, pairs, recipe, seed=seed, checkpoint=unfinished, progress=progress)
        save_expert(new, state, {**manifest, **counts})

    return load_language_expert(base, once(folder, make, holds="manifest.json"))


def load_language_expert(base: Language, place: Path | str, task: str | None = None) -> Expert:
    """An expert from its folder: one of ours, or any causal language model in the hub's layout.

    task: what the latter is an expert for; ours say it themselves. Raises ValueError where it was
    not made from this base, has another vocabulary or tensors, or is damaged.
    """
    folder = Path(place)
    if not (folder / "manifest.json").is_file():
        if task is None:
            raise ValueError(f"{place} is no expert of ours: say which task it is for")
        other = load_language(str(place), device=str(base.device))
        check_same(base, other.state, other.vocabulary, f"expert {task!r} from {place}")
        manifest = {"task": task, "encoder": base.name, "base": base.digest, "from": str(place)}
        manifest |= {"vocabulary": base.vocabulary, "model.safetensors": other.digest}
        return Expert(task, other.state, {}, manifest)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256(weights) != manifest["model.safetensors"]:
        raise ValueError(f"{weights} is missing or damaged; delete {folder} and train it again")
    state = load_file(weights, device=str(base.device))
    task, origin = manifest["task"], manifest["base"]
    whole = {**base.state, **state}
    check_same(base, whole, manifest.get("vocabulary", ""), f"expert {task!r}")
    if origin != base.digest:
        raise ValueError(
            f"expert {task!r} was trained from {manifest['encoder']!r} with other weights than "
            f"{base.name!r}; load its own base"
        )
    return Expert(task, whole, {}, manifest)


def counted(experts: Sequence[Expert]) -> list[dict[str, object]]:
    """What had to be cut before training, by expert: for the chapter's table."""
    keys = ("task", "rows", "shortened", "cut_answers")
    return [{key: expert.manifest.get(key) for key in keys} for expert in experts]
