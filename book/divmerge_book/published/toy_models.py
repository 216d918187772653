"""Tiny models and data sets in the place of published ones, in the hub's own layout.

Models of two layers with random first weights, trained for seconds on made-up rows in which one
word decides the answer. All code that loads the real ones loads these; their numbers show that the
code runs, and nothing about the real models.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm

from divmerge_book.data.glue import quiet
from divmerge_book.data.tasks import TASKS
from divmerge_book.models.language.models import quiet_transformers
from divmerge_book.published.sources import SOURCES, rows_of
from divmerge_core.storage import fresh_folder

FILLERS = "the a film song book of in on with and very quite old new long short".split()
MOODS = {"awful": "negative", "lovely": "positive"}
THINGS = "cup tree river clock stone".split()
PLACES = "paris rome oslo cairo lima".split()
COLUMNS = {  # of GLUE's files on the hub
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
}
HELD_OUT = {"imdb": "test", "mnli": "validation_matched"}  # of others: validation
POSITIONS = 64  # tokens that the toy GPT-2 reads
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}  # of T5
# A model to be trained, its number of rows, and its loss on the rows with these numbers.
Training = tuple[nn.Module, int, Callable[[list[int]], Tensor]]


# --- rows ----------------------------------------------------------------------------------------
def sentence(generator: random.Random, word: str | None = None) -> str:
    """Three to seven filler words, with a given one somewhere among them."""
    words = generator.choices(FILLERS, k=generator.randint(3, 7))
    if word is not None:
        words.insert(generator.randint(0, len(words)), word)
    return " ".join(words)


def row_of(task: str, generator: random.Random) -> dict:
    """A row in the columns of the hub's data set; one word of its texts decides the answer."""
    if task == "squad":
        place = generator.choice(PLACES)
        context = sentence(generator, place)
        answers = {"text": [place], "answer_start": [context.index(place)]}
        return {"question": f"where {sentence(generator)}", "context": context, "answers": answers}
    if task == "qasc":
        few, right = generator.sample(THINGS, 3), generator.randrange(3)
        return {
            "question": "which",
            "formatted_question": f"which {sentence(generator)} " + " ".join(few),
            "choices": {"text": few, "label": ["A", "B", "C"]},
            "answerKey": "ABC"[right],
            "fact1": f"{sentence(generator)} {few[right]}",
            "fact2": sentence(generator),
        }
    if task == "common_gen":
        few = generator.sample([*FILLERS, *THINGS], 3)
        return {"concepts": few, "target": " ".join(sorted(few))}
    if task == "imdb":
        label = generator.randrange(2)
        return {"text": sentence(generator, list(MOODS)[label]), "label": label}
    *others, last = COLUMNS[task]
    label = generator.randrange(len(TASKS[task].answers))
    texts = {name: sentence(generator) for name in others}
    return {**texts, last: sentence(generator, f"{task}{label}"), "label": label}


def table_of(task: str, split: str, count: int) -> datasets.Dataset:
    generator = random.Random(f"{task} {split}")
    with quiet():
        table = datasets.Dataset.from_list([row_of(task, generator) for _ in range(count)])
        names = datasets.ClassLabel(names=["neg", "pos"])
        return table.cast_column("label", names) if task == "imdb" else table


def save_data(folder: Path, task: str) -> None:
    """Parquet files as the hub has them: `train`, and `validation` (of IMDB: `test`)."""
    folder.mkdir(parents=True)
    with quiet():
        for split, count in {"train": 840, HELD_OUT.get(task, "validation"): 120}.items():
            file = folder / f"{split}-00000-of-00001.parquet"
            table_of(task, split, count).to_parquet(str(file))


# --- models --------------------------------------------------------------------------------------
def word_tokenizer(
    words: Sequence[str], *, ends: bool = False, **special: str
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words. ends: every text ends in EOS, as T5's do. special: by role."""
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        end = special["eos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
        )
    names = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=names, **special
    )


def t5_words() -> list[str]:
    words = [*FILLERS, *MOODS, *MOODS.values(), *THINGS, *PLACES]
    return [*SPECIAL.values(), *words, *"which where question: context:".split()]


def t5_config(words: int) -> transformers.T5Config:
    """Some words more than the tokenizer knows, as the published T5 has."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    sizes |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    return transformers.T5Config(vocab_size=words + 4, **sizes)


def gpt2(tasks: Sequence[str]) -> tuple[nn.Module, transformers.PreTrainedTokenizerFast]:
    """A base that classifies these tasks' rows. Its tokenizer names no padding token."""
    end = "<|endoftext|>"
    words = [f"{task}{n}" for task in tasks for n in range(len(TASKS[task].answers))]
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), end)
    tokenizer = word_tokenizer([end, *FILLERS, *words], **special)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
    sizes |= {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2Model(transformers.GPT2Config(**sizes)), tokenizer


def classifier(base: Path, tokenizer, task: str) -> Training:
    """A GPT-2 for a task of GLUE."""
    model = transformers.GPT2ForSequenceClassification.from_pretrained(
        base, num_labels=len(TASKS[task].answers), pad_token_id=0
    )
    tokenizer.pad_token = tokenizer.eos_token  # not in the saved one
    table = table_of(task, "expert", 600).to_pandas()

    def loss(chosen: list[int]) -> Tensor:
        few = table.iloc[chosen]
        texts = (list(few[name]) for name in COLUMNS[task])
        inputs = tokenizer(*texts, padding=True, return_tensors="pt")
        return model(**inputs, labels=torch.tensor(few.label.to_numpy())).loss

    return model, len(table), loss


def t5(tasks: Sequence[str]) -> tuple[nn.Module, transformers.PreTrainedTokenizerFast]:
    """A base that writes answers."""
    words = t5_words()
    base = transformers.T5ForConditionalGeneration(t5_config(len(words)))
    return base, word_tokenizer(words, ends=True, **SPECIAL)


def writer(base: Path, tokenizer, task: str) -> Training:
    """A T5 that writes a task's answers."""
    model, source = transformers.T5ForConditionalGeneration.from_pretrained(base), SOURCES[task]
    rows = rows_of(task, source, table_of(task, "expert", 600))
    prompts = [source.template.format(text=text, pair=pair) for text, pair, _ in rows]
    answers = [answer for *_, answer in rows]

    def loss(chosen: list[int]) -> Tensor:
        inputs, targets = (
            tokenizer([texts[n] for n in chosen], padding=True, return_tensors="pt")
            for texts in (prompts, answers)
        )
        labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
        return model(**inputs, labels=labels).loss

    return model, len(rows), loss


def make_toys(folder: Path, tasks: Sequence[str], *, steps: int, seed: int = 0) -> None:
    """A `base`, `experts/TASK` and `data/TASK` in a folder: GPT-2 for tasks of GLUE, else T5.

    As on the hub, GPT-2's experts have no tokenizer; they name pad_token_id, and their outputs are
    LABEL_0, LABEL_1, ...
    """
    quiet_transformers()
    classifies = tasks[0] in COLUMNS
    make_base, make_expert = (gpt2, classifier) if classifies else (t5, writer)
    with fresh_folder(folder) as new, torch.random.fork_rng():
        torch.manual_seed(seed)
        base, tokenizer = make_base(tasks)
        base.save_pretrained(new / "base")
        tokenizer.save_pretrained(new / "base")
        for task in tqdm(tasks, "toy experts", leave=False):
            save_data(new / "data" / task, task)
            model, rows, loss = make_expert(new / "base", tokenizer, task)
            adam = torch.optim.AdamW(model.train().parameters(), lr=5e-3 if classifies else 1e-2)
            for _ in range(steps):
                adam.zero_grad()
                loss(torch.randint(rows, (32,)).tolist()).backward()
                adam.step()
            model.save_pretrained(new / "experts" / task)
            if not classifies:
                tokenizer.save_pretrained(new / "experts" / task)
