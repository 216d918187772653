"""An expert's greedy answers to its prompts, and its distributions at their tokens.

Both are cached on disk in parts, so that a killed run resumes with the next part.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm
from transformers import GenerationConfig

from divmerge_book.data.code_digest import code_digest, key_of, versions
from divmerge_book.models.encoders import resolve
from divmerge_book.models.language.forward import Parts, language_forward
from divmerge_book.models.language.models import Language
from divmerge_book.models.language.prompts import Prompt
from divmerge_book.models.language.reading import ask, by_length, collate
from divmerge_book.models.language.seq2seq import encodes, padded, start_of
from divmerge_core.kernels.expert_cache import TopKLogProbs, cache_expert
from divmerge_core.merging.problem import Batch
from divmerge_core.storage import cache_dir, dump_json, once

TOGETHER = 16  # prompts that are completed at a time: one part on disk


class Generation(torch.nn.Module):
    """A module whose forward pass is greedy generation by a model of transformers.

    The output matrix stays in its own precision; the model's generation settings are set aside.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, half: bool, **options: object) -> Tensor:
        head, settings = self.model.get_output_embeddings(), self.model.generation_config
        own, kind = head.forward, next(self.model.parameters()).device.type
        whole = torch.autocast(kind, enabled=False)
        head.forward = whole(lambda hidden: own(hidden.to(head.weight.dtype)))
        self.model.generation_config = GenerationConfig()
        try:
            with torch.autocast(kind, torch.bfloat16, enabled=half):
                return self.model.generate(**options)
        finally:
            self.model.generation_config = settings
            del head.forward


@torch.no_grad()
def greedy(
    base: Language,
    parameters: Mapping[str, Tensor],
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    precision: str = "float32",
) -> list[tuple[int, ...]]:
    """Greedy answers, each with its EOS; one that has not ended at `max_new` tokens has none."""
    two, half = encodes(base.model), resolve(precision, base.device) == "bfloat16"
    if half and not two:
        parameters = Parts.of(base.model).lowered(parameters)
    ids, mask = padded(base, prompts, "right" if two else "left")
    options = {"max_new_tokens": max_new, "do_sample": False, "use_cache": True}
    options |= {"decoder_start_token_id": start_of(base)} if two else {}
    options |= {"eos_token_id": list(base.stops), "pad_token_id": base.stop}
    config = GenerationConfig(**options)
    call = {"input_ids": ids, "attention_mask": mask, "half": half, "generation_config": config}
    weights = {f"model.{name}": tensor for name, tensor in parameters.items()}
    found = functional_call(Generation(base.model), weights, kwargs=call)
    rows = found[:, 1 if two else ids.shape[1] :].tolist()
    last = (next((n for n, t in enumerate(row) if t in base.stops), len(row)) for row in rows)
    return [tuple(row[: end + 1]) for row, end in zip(rows, last, strict=True)]


def written(base: Language, answer: Sequence[int]) -> str:
    """An answer as text, without the token that ends it."""
    kept = [token for token in answer if token not in base.ends]
    return base.tokenizer.decode(kept, skip_special_tokens=True)


@dataclass(frozen=True)
class Completions:
    """An expert's answers to its own prompts: as tokens, as batches that hold its distributions.

    counts: prompts; those that were shortened to fit; answers that had not ended at `max_new`
    tokens (they are kept as far as they go, without EOS); empty answers (only EOS: what is learned
    there is to say nothing); and the A answer positions of all.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    batches: Sequence[Batch]
    counts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Memory that the cached distributions take."""
        return sum(t.nbytes for batch in self.batches for t in tensors_of(batch.expert).values())


def tensors_of(distributions: Tensor | TopKLogProbs) -> dict[str, Tensor]:
    """The tensors of an expert's distributions, by name."""
    whole = {"log_probs": distributions}
    return vars(distributions) if isinstance(distributions, TopKLogProbs) else whole


def completions(
    base: Language,
    expert: Mapping[str, Tensor],
    prompt: Prompt,
    rows: datasets.Dataset | Sequence[Mapping[str, object]],
    *,
    key: Sequence[object],
    max_length: int,
    max_new: int,
    batch_size: int = 4,
    precision: str = "float32",
    top: int | None = None,
    progress: bool = True,
) -> Completions:
    """The expert's greedy answers to unlabelled rows, and its distributions where it gave them.

    expert: parameters by name. key: what tells this expert from others, for the cache. top: keep
    its likeliest classes only (see TopKLogProbs, which says what that loses); None keeps all V in
    bfloat16. Finished parts are read from the cache.
    """
    asked, code = ask(base, prompt, rows, max_length), code_digest(completions)
    what = [*key, base.digest, base.stops, asked.prompts, max_new, batch_size, precision, top]
    name = key_of(code, versions(), base.device.type, what)
    folder = cache_dir() / "completions" / f"{prompt.task}-{name}"
    forward = language_forward(base.model, precision=precision)
    shown = {"disable": not progress, "leave": False}

    def write_answers(few: Sequence[Sequence[int]], path: Path) -> None:
        dump_json(path, greedy(base, expert, few, max_new=max_new, precision=precision))

    @torch.no_grad()
    def write_distributions(batch: Batch, path: Path) -> None:
        found = tensors_of(cache_expert(forward(expert, [(0, batch)])[0], top=top))
        save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, path)

    answers, batches = [], []
    parts = [asked.prompts[n : n + TOGETHER] for n in range(0, len(asked.prompts), TOGETHER)]
    for number, few in enumerate(tqdm(parts, "completing", **shown)):
        path = folder / f"answers-{number}.json"
        once(path, partial(write_answers, few), folder=False)
        answers += map(tuple, json.loads(path.read_text("utf-8")))
    pairs = list(zip(asked.prompts, answers, strict=True))
    groups = list(by_length([len(prompt) + len(answer) for prompt, answer in pairs], batch_size))
    for number, group in enumerate(tqdm(groups, "asking", **shown)):
        batch, _ = collate(base, [pairs[row] for row in group])
        path = folder / f"distributions-{number}.safetensors"
        once(path, partial(write_distributions, batch), folder=False)
        kept = load_file(path, device=str(base.device))
        kept = TopKLogProbs(**kept) if "classes" in kept else kept["log_probs"]
        batches.append(replace(batch, expert=kept))
    return Completions(asked.prompts, answers, batches, counted(base, asked.shortened, answers))


def counted(base: Language, shortened: int, answers: Sequence[Sequence[int]]) -> dict[str, int]:
    """What happened to prompts and answers, as numbers."""
    return {
        "prompts": len(answers),
        "shortened": shortened,
        "unfinished": sum(answer[-1] not in base.stops for answer in answers),
        "empty": sum(not written(base, answer).strip() for answer in answers),
        "positions": sum(map(len, answers)),
    }
