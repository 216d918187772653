"""What the tests of users' language models share: a tiny base, experts and prompts, as files."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from language_toys import family_config, save_model, tokenizer
from local_files import describe
from torch import Tensor

PROMPTS = {
    "mood": ["Is this review positive or negative?\nReview: {} film\nAnswer:", "positive negative"],
    "same": ["Do these two sentences say the same?\nFirst: {}\nSame:", "yes no"],
}


def save_family(folder: Path, kind: str, **more: object) -> Path:
    """A tiny random model of a family with the toys' tokenizer."""
    config = family_config(kind, vocab_size=316, eos_token_id=0, bos_token_id=0, **more)
    build = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        build, config.decoder_start_token_id = transformers.AutoModelForSeq2SeqLM, 0
    torch.manual_seed(0)
    build.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def expert_of(base: Path, folder: Path, *, seed: int, scale: float = 0.02) -> Path:
    """The base with noise on every weight, saved by transformers with the base's tokenizer."""
    kind = transformers.AutoModelForCausalLM
    if transformers.AutoConfig.from_pretrained(base).is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
    model = kind.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def prompt_rows(name: str, count: int, start: int = 0) -> list[dict]:
    """Prompts of a task with one of its two answers."""
    asked, words = PROMPTS[name]
    answers = words.split()
    texts = ["a good", "no bad", "one", "the cat", "two", "good bad", "sat", "maybe"]
    return [
        {"prompt": asked.format(f"{texts[n % 8]} {n}"), "answer": answers[n % 2]}
        for n in range(start, start + count)
    ]


def as_chat(row: Mapping) -> dict:
    """A row as chat messages, the answer last."""
    user = {"role": "user", "content": row["prompt"]}
    return {"messages": [user, {"role": "assistant", "content": row["answer"]}]}


def write_lines(path: Path, rows: Sequence[Mapping]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_language_project(
    folder: Path,
    kind: str = "llama",
    *,
    base: Path | None = None,
    row: Callable[[Mapping], Mapping] = dict,
    **task_fields: object,
) -> Path:
    """A base, two experts, their rows, and the description of it all."""
    base = base or save_model(folder / "base", kind)
    splits, tasks = {"merge": (0, 5), "validation": (5, 6), "test": (11, 8)}, []
    for seed, name in enumerate(PROMPTS, 1):
        expert_of(base, folder / "experts" / name, seed=seed)
        entry = {"name": name, "expert": f"experts/{name}"}
        for split, (start, count) in splits.items():
            rows = [row(one) for one in prompt_rows(name, count, start)]
            write_lines(folder / "data" / f"{name}-{split}.jsonl", rows)
            entry[split] = f"data/{name}-{split}.jsonl"
        entry |= task_fields
        tasks.append({field: value for field, value in entry.items() if value is not None})
    options = {"kind": "language", "base": str(base), "max_new": 4, "max_length": 64}
    return describe(folder / "models.yaml", tasks, **options)


def logits_of(folder: Path, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """What transformers alone computes from a folder, row by row."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0] for row in rows]
