"""Tiny stand-ins for published experts, made on the spot and saved in the hub's own layout.

Models of two layers with random first weights, trained for seconds on made-up sentences in which
one word decides the answer. Everything that loads the real ones loads these; numbers from them say
that the path runs, and nothing about the real ones.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tokenizers
import torch
import transformers
from torch import nn
from tqdm import tqdm

from divmerge_book.data.tasks import TASKS
from divmerge_core.storage import fresh_folder

FILLERS = "the a film song book of in on with and very quite old new long short".split()
END = "<|endoftext|>"
POSITIONS = 64  # that a tiny GPT-2 reads
COLUMNS = {  # of GLUE's files on the hub
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
}


@dataclass(frozen=True)
class Amount:
    """How many tasks are made, how long their experts train, and the rows of GLUE's two files."""

    tasks: int
    steps: int
    train: int = 760
    validation: int = 120


AMOUNTS = {"smoke": Amount(tasks=3, steps=80), "default": Amount(tasks=7, steps=200)}


def sized(amounts: Mapping[str, Amount], size: str) -> Amount:
    """An amount by name. Raises ValueError that lists them."""
    if size not in amounts:
        raise ValueError(f"size must be one of {', '.join(amounts)}, got {size!r}")
    return amounts[size]


def marker(task: str, answer: int) -> str:
    """The word that decides an answer."""
    return f"{task}{answer}"


def sentence(generator: random.Random, word: str | None = None) -> str:
    """Three to seven filler words, with a given one somewhere among them."""
    words = generator.choices(FILLERS, k=generator.randint(3, 7))
    if word is not None:
        words.insert(generator.randint(0, len(words)), word)
    return " ".join(words)


def glue_table(task: str, count: int, seed: int) -> pd.DataFrame:
    """Rows in the columns of GLUE's files; the deciding word stands in the last text."""
    generator = random.Random(f"{task} {seed}")
    rows = []
    for index in range(count):
        label = generator.randrange(len(TASKS[task].answers))
        texts = [sentence(generator) for _ in COLUMNS[task][1:]]
        texts.append(sentence(generator, marker(task, label)))
        rows.append({**dict(zip(COLUMNS[task], texts, strict=True)), "label": label, "idx": index})
    return pd.DataFrame(rows)


def save_glue(folder: Path, task: str, amount: Amount) -> None:
    """A task's parquet files as the hub's nyu-mll/glue has them."""
    (folder / task).mkdir(parents=True)
    held = "validation_matched" if task == "mnli" else "validation"
    for seed, (split, count) in enumerate({"train": amount.train, held: amount.validation}.items()):
        table = glue_table(task, count, seed)
        table.to_parquet(folder / task / f"{split}-00000-of-00001.parquet", index=False)


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
    marked = [marker(t, n) for t in tasks for n in range(len(TASKS[t].answers))]
    return [END, *FILLERS, *marked]


def gpt2_config(words: int) -> transformers.GPT2Config:
    """Two layers of 32 units."""
    return transformers.GPT2Config(
        vocab_size=words,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )


def train_classifier(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    table: pd.DataFrame,
    task: str,
    steps: int,
    seed: int,
) -> None:
    """AdamW and cross-entropy on batches of 32 rows; padded with the end of the text."""
    pad, columns = tokenizer.convert_tokens_to_ids(END), COLUMNS[task]
    encoded = tokenizer(*(list(table[name]) for name in columns)).input_ids
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(encoded), (32,), generator=generator).tolist()
        rows = [torch.tensor(encoded[n]) for n in chosen]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        gold = torch.tensor(table.label.to_numpy()[chosen])
        logits = model(input_ids=ids, attention_mask=mask).logits
        adam.zero_grad()
        nn.functional.cross_entropy(logits, gold).backward()
        adam.step()
    model.eval()


def make_gpt2(
    folder: Path, *, size: str = "smoke", tasks: Sequence[str] = (), seed: int = 0
) -> Mapping[str, str]:
    """A base, an expert per task and GLUE's files in `folder`; returns where these are.

    Under `base` and `expert` stands what `glue.describe` takes, under `glue` what DIVMERGE_GLUE_DIR
    has to name. As on the hub, only the base has a tokenizer, nobody names a padding token in it,
    experts name pad_token_id and their outputs are LABEL_0, LABEL_1, ...
    """
    amount = sized(AMOUNTS, size)
    tasks = list(tasks or tuple(COLUMNS)[: amount.tasks])
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    words = glue_words(tasks)
    tokenizer = word_tokenizer(words, unk_token=END, bos_token=END, eos_token=END)
    with fresh_folder(folder) as new, torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.GPT2Model(gpt2_config(len(words))).save_pretrained(new / "gpt2")
        tokenizer.save_pretrained(new / "gpt2")
        for task in tqdm(tasks, "tiny experts", leave=False):
            save_glue(new / "glue", task, amount)
            model = transformers.GPT2ForSequenceClassification.from_pretrained(
                new / "gpt2", num_labels=len(TASKS[task].answers), pad_token_id=0
            )
            rows = glue_table(task, 600, seed=2)
            train_classifier(model, tokenizer, rows, task, amount.steps, seed)
            model.save_pretrained(new / f"gpt2_{task}")
    places = {"base": "gpt2", "expert": "gpt2_{task}", "glue": "glue"}
    return {key: str(folder / name) for key, name in places.items()}
