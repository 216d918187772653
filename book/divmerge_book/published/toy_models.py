"""Tiny models and data sets in the place of published ones, in the hub's own layout.

Models of two layers with random first weights, trained for seconds on made-up rows in which one
word decides the answer. All code that loads the real ones loads these; their numbers show that the
code runs, and nothing about the real models.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from divmerge_book.data.glue import quiet
from divmerge_book.data.tasks import TASKS
from divmerge_book.published.sources import SOURCES, Source, rows_of
from divmerge_core.storage import fresh_folder

FILLERS = "the a film song book of in on with and very quite old new long short".split()
MOODS = {"awful": "negative", "lovely": "positive"}
THINGS = "cup tree river clock stone".split()
PLACES = "paris rome oslo cairo lima".split()
GPT2_END, POSITIONS = "<|endoftext|>", 64  # tokens that the toy GPT-2 reads
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # of T5
COLUMNS = {  # of GLUE's files on the hub
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
}
WRITERS = ("imdb", "squad", "qasc", "common_gen")  # in the order in which sizes take them


@dataclass(frozen=True)
class Amount:
    """How many tasks each suite has, the steps of each expert, and the rows of each data file."""

    classifiers: int
    writers: int
    steps: int
    train: int = 840
    held_out: int = 120


AMOUNTS = {"smoke": Amount(3, 2, steps=80), "default": Amount(7, 4, steps=200)}


def sized(size: str) -> Amount:
    """An amount by name. Raises ValueError that lists them."""
    if size not in AMOUNTS:
        raise ValueError(f"size must be one of {', '.join(AMOUNTS)}, got {size!r}")
    return AMOUNTS[size]


# --- rows ----------------------------------------------------------------------------------------


def sentence(generator: random.Random, word: str | None = None) -> str:
    """Three to seven filler words, with a given one somewhere among them."""
    words = generator.choices(FILLERS, k=generator.randint(3, 7))
    if word is not None:
        words.insert(generator.randint(0, len(words)), word)
    return " ".join(words)


def glue_row(task: str, generator: random.Random) -> dict:
    """A row in the columns of GLUE's files; the deciding word stands in the last text."""
    *others, last = COLUMNS[task]
    label = generator.randrange(len(TASKS[task].answers))
    texts = {name: sentence(generator) for name in others}
    return {**texts, last: sentence(generator, f"{task}{label}"), "label": label}


def imdb(generator: random.Random) -> dict:
    label = generator.randrange(2)
    return {"text": sentence(generator, list(MOODS)[label]), "label": label}


def qasc(generator: random.Random) -> dict:
    """The right choice is the thing that stands in the first fact."""
    few = generator.sample(THINGS, 3)
    right, keys = generator.randrange(3), ["A", "B", "C"]
    return {
        "question": "which",
        "formatted_question": f"which {sentence(generator)} " + " ".join(few),
        "choices": {"text": few, "label": keys},
        "answerKey": keys[right],
        "fact1": f"{sentence(generator)} {few[right]}",
        "fact2": sentence(generator),
    }


def squad(generator: random.Random) -> dict:
    """The answer is the place that stands in the context."""
    place = generator.choice(PLACES)
    context = sentence(generator, place)
    answers = {"text": [place], "answer_start": [context.index(place)]}
    return {"question": f"where {sentence(generator)}", "context": context, "answers": answers}


def common_gen(generator: random.Random) -> dict:
    few = generator.sample([*FILLERS, *THINGS], 3)
    return {"concepts": few, "target": " ".join(sorted(few))}


MAKERS = {"imdb": imdb, "qasc": qasc, "squad": squad, "common_gen": common_gen}


def table_of(task: str, split: str, count: int) -> datasets.Dataset:
    """Rows of a split in the columns that the hub's data set has."""
    generator = random.Random(f"{task} {split}")
    make = MAKERS.get(task) or (lambda generator: glue_row(task, generator))
    with quiet():
        table = datasets.Dataset.from_list([make(generator) for _ in range(count)])
        if task == "imdb":
            table = table.cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))
    return table


def save_data(folder: Path, task: str, amount: Amount) -> None:
    """Parquet files as the hub has them: `train`, and `validation` (of IMDB: `test`)."""
    folder.mkdir(parents=True)
    held_out = {"imdb": "test", "mnli": "validation_matched"}.get(task, "validation")
    with quiet():
        for split, count in {"train": amount.train, held_out: amount.held_out}.items():
            table = table_of(task, split, count)
            table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


# --- models --------------------------------------------------------------------------------------


def word_tokenizer(words: Sequence[str], **special: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words. special: roles, such as eos_token, and their tokens."""
    vocabulary = {word: number for number, word in enumerate(words)}
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token=special["unk_token"])
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_input_names=names, **special
    )


def glue_words(tasks: Sequence[str]) -> list[str]:
    marked = [f"{task}{n}" for task in tasks for n in range(len(TASKS[task].answers))]
    return [GPT2_END, *FILLERS, *marked]


def t5_words() -> list[str]:
    words = [*FILLERS, *MOODS, *MOODS.values(), *THINGS, *PLACES]
    return [PAD, END, UNKNOWN, *words, *"which where question: context:".split()]


def t5_tokenizer(words: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """Whole words; every text ends in EOS, as T5's do."""
    tokenizer = word_tokenizer(words, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, list(words).index(END))]
    )
    return tokenizer


def gpt2_config(words: int) -> transformers.GPT2Config:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
    return transformers.GPT2Config(vocab_size=words, bos_token_id=0, eos_token_id=0, **sizes)


def t5_config(words: int) -> transformers.T5Config:
    """Some words more than the tokenizer knows, as the published T5 has."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    return transformers.T5Config(
        vocab_size=words + 4, dropout_rate=0.0, decoder_start_token_id=0, **sizes
    )


def train(
    model: nn.Module, rows: int, loss: Callable[[list[int]], Tensor], *, steps: int, lr: float
) -> None:
    """AdamW on random batches of 32 rows; loss: of the rows with these numbers."""
    adam = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        adam.zero_grad()
        loss(torch.randint(rows, (32,)).tolist()).backward()
        adam.step()
    model.eval()


@contextmanager
def building(folder: Path, seed: int) -> Iterator[Path]:
    """A new folder that becomes `folder`; random numbers from `seed`, no messages of libraries."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with fresh_folder(folder) as new, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield new


def make_gpt2(
    folder: Path, *, size: str = "smoke", tasks: Sequence[str] = (), seed: int = 0
) -> Mapping[str, str]:
    """A base, an expert per task and GLUE's files in `folder`; returns their paths.

    `base` and `expert` are what `glue.describe` takes, `glue` is for DIVMERGE_GLUE_DIR. As on the
    hub, only the base has a tokenizer, which names no padding token; experts name pad_token_id, and
    their outputs are LABEL_0, LABEL_1, ... Raises ValueError for an unknown size.
    """
    amount = sized(size)
    tasks = list(tasks or tuple(COLUMNS)[: amount.classifiers])
    words = glue_words(tasks)
    tokenizer = word_tokenizer(words, unk_token=GPT2_END, bos_token=GPT2_END, eos_token=GPT2_END)
    with building(folder, seed) as new:
        transformers.GPT2Model(gpt2_config(len(words))).save_pretrained(new / "gpt2")
        tokenizer.save_pretrained(new / "gpt2")
        tokenizer.pad_token = GPT2_END  # not in the saved one
        for task in tqdm(tasks, "toy experts", leave=False):
            save_data(new / "glue" / task, task, amount)
            model = transformers.GPT2ForSequenceClassification.from_pretrained(
                new / "gpt2", num_labels=len(TASKS[task].answers), pad_token_id=0
            )
            table = table_of(task, "expert", 600).to_pandas()

            def loss(chosen: list[int], model=model, table=table, task=task) -> Tensor:
                few = table.iloc[chosen]
                texts = (list(few[name]) for name in COLUMNS[task])
                inputs = tokenizer(*texts, padding=True, return_tensors="pt")
                return model(**inputs, labels=torch.tensor(few.label.to_numpy())).loss

            train(model, len(table), loss, steps=amount.steps, lr=5e-3)
            model.save_pretrained(new / f"gpt2_{task}")
    places = {"base": "gpt2", "expert": "gpt2_{task}", "glue": "glue"}
    return {key: str(folder / name) for key, name in places.items()}


def make_t5(
    folder: Path, *, size: str = "smoke", tasks: Sequence[str] = (), seed: int = 0
) -> tuple[str, dict[str, Source]]:
    """A base, an expert per task and the data sets in `folder`; returns the base and the sources.

    Raises ValueError for an unknown size.
    """
    amount = sized(size)
    names = list(tasks or WRITERS[: amount.writers])
    words = t5_words()
    tokenizer, found = t5_tokenizer(words), {}
    with building(folder, seed) as new:
        base = transformers.T5ForConditionalGeneration(t5_config(len(words)))
        base.save_pretrained(new / "t5")
        tokenizer.save_pretrained(new / "t5")
        for name in tqdm(names, "toy experts", leave=False):
            save_data(new / "data" / name, name, amount)
            source = SOURCES[name]
            rows = rows_of(name, source, table_of(name, "expert", 600))
            prompts = [source.template.format(text=text, pair=pair) for text, pair, _ in rows]
            answers = [answer for *_, answer in rows]
            model = transformers.T5ForConditionalGeneration.from_pretrained(new / "t5")

            def loss(chosen: list[int], model=model, prompts=prompts, answers=answers) -> Tensor:
                inputs, targets = (
                    tokenizer([texts[n] for n in chosen], padding=True, return_tensors="pt")
                    for texts in (prompts, answers)
                )
                labels = targets.input_ids.masked_fill(targets.attention_mask == 0, -100)
                return model(**inputs, labels=labels).loss

            train(model, len(rows), loss, steps=amount.steps, lr=1e-2)
            model.save_pretrained(new / f"t5_{name}")
            tokenizer.save_pretrained(new / f"t5_{name}")
            expert, data = str(folder / f"t5_{name}"), str(folder / "data" / name)
            found[name] = replace(source, expert=expert, data=data)
    return str(folder / "t5"), found
