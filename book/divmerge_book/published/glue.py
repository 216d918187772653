"""The suite `gpt2_glue`: FusionBench's seven GPT-2 experts, described as one's own models are.

What `describe` writes goes through `divmerge_book.user_models` like any other description: every
expert's head stays with its task, options are chosen on validation rows, scores are of test rows.
Source: Tang et al. 2024; their printed table is `paper.frame("methods", "fusionbench")`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from tqdm import tqdm

from divmerge_book.data.tasks import TASKS
from divmerge_book.published.sources import distinct_tasks
from divmerge_book.user_models.data import write_rows
from divmerge_book.user_models.description import SPLITS
from divmerge_book.user_models.folders import config_of, fetched
from divmerge_book.user_models.labels import unnamed
from divmerge_core.storage import fresh_folder

SUITE = "gpt2_glue"
BASE = "openai-community/gpt2"
PAD = "<|endoftext|>"  # GPT-2 has no padding token; its experts pad with the end of the text
PRINTED = {  # our tasks and FusionBench's columns
    **{"cola": "CoLA", "mnli": "MNLI", "mrpc": "MRPC", "qnli": "QNLI", "qqp": "QQP"},
    **{"rte": "RTE", "sst2": "SST-2"},
}
EXPERTS = {task: f"tanganke/gpt2_{task}" for task in PRINTED}
WORDS = {"mrpc": ("not_equivalent", "equivalent"), "qqp": ("not_duplicate", "duplicate")}


def order_of(task: str, outputs: Sequence[str]) -> list[int]:
    """Which of the task's answers every output of a head stands for.

    outputs: their names in the expert's config.json. `LABEL_0` and the like say nothing: these are
    in GLUE's own order, as transformers numbers them in training. Raises ValueError for another
    number of outputs, and for names that are not GLUE's.
    """
    answers = TASKS[task].answers
    if len(outputs) != len(answers):
        raise ValueError(
            f"the head for {task} has {len(outputs)} outputs, the task {len(answers)} answers: "
            f"{', '.join(answers)}; give an expert that was trained on it"
        )
    if unnamed(outputs):
        return list(range(len(answers)))
    known: dict[str, int] = {}
    for words in (WORDS.get(task, ()), answers):
        known |= {re.sub(r"[\s_-]+", " ", word).lower(): n for n, word in enumerate(words)}
    numbers = [known.get(re.sub(r"[\s_-]+", " ", name).strip().lower(), -1) for name in outputs]
    if sorted(numbers) != list(range(len(answers))):
        raise ValueError(
            f"the head for {task} names its outputs {list(outputs)}, GLUE's are "
            f"{', '.join(answers)}; correct id2label in the expert's config.json"
        )
    return numbers


def words_of(task: str, folder: Path) -> tuple[Sequence[str], bool]:
    """A head's names of the task's answers, in the task's order, and whether they are its own."""
    config = config_of(folder)
    outputs = [config.id2label[number] for number in range(config.num_labels)]
    order = order_of(task, outputs)
    if unnamed(outputs):
        return TASKS[task].answers, False
    return [outputs[order.index(number)] for number in range(len(order))], True


def describe(
    folder: Path,
    tasks: Sequence[str] = tuple(PRINTED),
    *,
    base: str = BASE,
    experts: Mapping[str, str] = EXPERTS,
    max_length: int = 512,
    pad_token: str | None = PAD,
    rows: Mapping[str, int] | None = None,
    progress: bool = True,
) -> Path:
    """Fetch base and experts, write GLUE's rows and the description of it all; returns its path.

    base, experts: hub names or folders. Rows come from the hub's nyu-mll/glue, or from
    DIVMERGE_GLUE_DIR: merge and validation rows from GLUE's train, test rows from its validation
    split, 500 at most, so that no option is chosen on a scored row. rows: at most so many of a
    split, for a quick look. max_length: FusionBench's 512 tokens. Raises ValueError for what is
    unknown, cannot be fetched, or has a head that is not the task's.
    """
    names, limits, entries = distinct_tasks(SUITE, tasks, PRINTED), rows or {}, []
    if lacking := [task for task in names if task not in experts]:
        raise ValueError(f"no expert for {', '.join(lacking)}; there are {', '.join(experts)}")
    sources = {task: fetched(experts[task]).resolve() for task in names}
    whole = {"base": str(fetched(base).resolve()), "max_length": max_length, "pad_token": pad_token}
    with fresh_folder(folder) as new:
        for task, source in (bar := tqdm(sources.items(), SUITE, disable=not progress)):
            bar.set_postfix_str(task)
            words, named = words_of(task, source)
            files = {split: f"data/{task}/{split}.parquet" for split in SPLITS}
            for split, file in files.items():
                write_rows(new / file, TASKS[task], split, words, limits.get(split))
            entry = {"name": task, "expert": str(source), **files}
            entry |= {"columns": {"pair": "pair"}} if TASKS[task].pair else {}
            entries.append(entry | ({} if named else {"labels": list(words)}))
        path = new / f"{SUITE}.yaml"
        path.write_text(yaml.safe_dump({**whole, "tasks": entries}, sort_keys=False), "utf-8")
    return folder / path.name
