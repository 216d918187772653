"""Tiny stand-ins for T5's experts and their data sets, made on the spot in the hub's own layout.

Two layers with random first weights, trained for seconds on made-up rows. Everything that loads the
real ones loads these; numbers from them say that the path runs, and nothing about the real ones.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
from tqdm import tqdm

from divmerge_book.data.glue import quiet
from divmerge_book.published.sources import SOURCES, Source
from divmerge_book.published.toy_models import FILLERS, Amount, sentence, sized, word_tokenizer
from divmerge_core.storage import fresh_folder

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MOODS = {"awful": "negative", "lovely": "positive"}
THINGS = "cup tree river clock stone".split()
PLACES = "paris rome oslo cairo lima".split()
ROWS = {"train": 760, "validation": 120}
FEW = ("imdb", "squad", "qasc", "common_gen")  # in the order in which sizes take them
AMOUNTS = {"smoke": Amount(tasks=2, steps=80), "default": Amount(tasks=4, steps=250)}


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


MAKERS: Mapping[str, Callable[[random.Random], dict]] = {
    "imdb": imdb,
    "qasc": qasc,
    "squad": squad,
    "common_gen": common_gen,
}


def save_data(folder: Path, name: str) -> None:
    """Parquet files as the hub has them: IMDB has a test file, the others one for validation."""
    held = "test" if name == "imdb" else "validation"
    with quiet():
        for seed, (split, count) in enumerate(ROWS.items()):
            generator = random.Random(f"{name} {seed}")
            table = datasets.Dataset.from_list([MAKERS[name](generator) for _ in range(count)])
            if name == "imdb":
                names = datasets.ClassLabel(names=["neg", "pos"])
                table = table.cast_column("label", names)
            part = split if split == "train" else held
            table.to_parquet(str(folder / f"{part}-00000-of-00001.parquet"))


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


def t5_config(words: int) -> transformers.T5Config:
    """Two layers of 32 units on either side, and some words more than the tokenizer knows."""
    return transformers.T5Config(
        vocab_size=words + 4,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )


def train_writer(
    model: torch.nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    name: str,
    steps: int,
    seed: int,
) -> None:
    """AdamW on batches of 16 rows, cross-entropy on the answers' tokens."""
    generator, source = random.Random(f"{name} training {seed}"), SOURCES[name]
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        rows = [asked(name, source, MAKERS[name](generator)) for _ in range(16)]
        read = tokenizer([prompt for prompt, _ in rows], padding=True, return_tensors="pt")
        wanted = tokenizer([answer for _, answer in rows], padding=True, return_tensors="pt")
        labels = wanted.input_ids.masked_fill(wanted.attention_mask == 0, -100)
        adam.zero_grad()
        model(**read, labels=labels).loss.backward()
        adam.step()
    model.eval()


def asked(name: str, source: Source, row: Mapping[str, object]) -> tuple[str, str]:
    """Prompt and answer of a made-up row, as the suite's formats would read it."""
    columns = {**row}
    if name == "imdb":
        columns["label"] = list(MOODS.values())[row["label"]]
    if name == "qasc":
        columns["choice"] = row["choices"]["text"]["ABC".index(row["answerKey"])]
    if name == "common_gen":
        columns["concepts"] = " ".join(row["concepts"])
    pair = source.pair.format(**columns) if source.pair else None
    text = source.template.format(text=source.text.format(**columns), pair=pair)
    return text, source.answer.format(**columns)


def make_t5(
    folder: Path, *, size: str = "smoke", tasks: Sequence[str] = (), seed: int = 0
) -> tuple[str, dict[str, Source]]:
    """A base, an expert per task and the data sets in `folder`; returns the base and the sources.

    Raises ValueError for an unknown size.
    """
    amount = sized(AMOUNTS, size)
    names = list(tasks or FEW[: amount.tasks])
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    words = t5_words()
    tokenizer = t5_tokenizer(words)
    with fresh_folder(folder) as new, torch.random.fork_rng():
        torch.manual_seed(seed)
        base = transformers.T5ForConditionalGeneration(t5_config(len(words)))
        base.save_pretrained(new / "t5")
        tokenizer.save_pretrained(new / "t5")
        for name in tqdm(names, "tiny experts", leave=False):
            (new / "data" / name).mkdir(parents=True)
            save_data(new / "data" / name, name)
            model = transformers.T5ForConditionalGeneration.from_pretrained(new / "t5")
            train_writer(model, tokenizer, name, amount.steps, seed)
            model.save_pretrained(new / f"t5_{name}")
            tokenizer.save_pretrained(new / f"t5_{name}")
    places = {
        name: {"expert": str(folder / f"t5_{name}"), "data": str(folder / "data" / name)}
        for name in names
    }
    return str(folder / "t5"), {name: replace(SOURCES[name], **places[name]) for name in names}
