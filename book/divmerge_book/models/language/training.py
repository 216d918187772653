"""Fine-tuning on answers alone; a killed training resumes from its checkpoint."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint as recomputed

from divmerge_book.data.code_digest import key_of
from divmerge_book.models.encoders import resolve
from divmerge_book.models.finetuning import adamw, optimise
from divmerge_book.models.language.forward import Parts, answer_states
from divmerge_book.models.language.models import Language, blocks_of
from divmerge_book.models.language.reading import Pair, by_length, collate
from divmerge_core.storage import fresh_file


@dataclass(frozen=True)
class LanguageRecipe:
    """Everything that decides how an expert is trained, besides base, task and seed.

    rows: training rows drawn by the seed; None for all. lr: peak of AdamW's step size, reached
    after `warmup` of the steps and falling linearly to 0. batch_size: rows a step; micro: rows that
    go through the model at a time, their gradients added up; None for all at once. max_length: of
    prompts, in tokens; max_new: of answers, with EOS. trains: `all` parameters, `top:K`, the upper
    K blocks and what follows them, without the embeddings, or `lora:R`, a product of rank R added
    to every matrix of the blocks. precision: of matrix products, `float32`, `bfloat16` or `auto`.
    checkpointing: recompute activations in the backward pass. save_every: steps between two
    checkpoints.
    """

    rows: int | None = 1200
    epochs: int = 1
    lr: float = 1e-4
    batch_size: int = 8
    micro: int | None = None
    max_length: int = 64
    max_new: int = 24
    warmup: float = 0.1
    weight_decay: float = 0.01
    trains: str = "all"
    precision: str = "auto"
    checkpointing: bool = False
    save_every: int = 25

    def on(self, base: Language) -> "LanguageRecipe":
        """The recipe with its precision settled, checked against a base.

        Raises ValueError for values out of range.
        """
        counts = (self.epochs, self.batch_size, self.micro or 1, self.max_length, self.max_new)
        if min(*counts, self.save_every, self.rows or 1) < 1 or not self.lr > 0:
            raise ValueError(f"counts must be 1 or more and lr above 0, got {self}")
        trained(base.model, self.trains)
        return replace(self, precision=resolve(self.precision, base.device))


def trained(model: torch.nn.Module, which: str) -> list[str]:
    """Names of the parameters that `which` moves: `all`, `top:K` blocks, or matrices by `lora:R`.

    Raises ValueError for anything else, and for more blocks than there are.
    """
    names = [name for name, _ in model.named_parameters()]
    if which == "all":
        return names
    prefix, blocks = blocks_of(model)
    if re.fullmatch(r"lora:[1-9]\d*", which):
        linear = (n for n, part in model.named_modules() if isinstance(part, torch.nn.Linear))
        return [f"{name}.weight" for name in linear if name.startswith(f"{prefix}.")]
    wanted = re.fullmatch(r"top:(\d+)", which)
    if not wanted or not 1 <= int(wanted[1]) <= len(blocks):
        raise ValueError(
            f"trains must be all, top:1 .. top:{len(blocks)}, or lora:RANK, got {which!r}"
        )
    first = len(blocks) - int(wanted[1])
    last = max(n for n, name in enumerate(names) if name.startswith(f"{prefix}."))
    tops = {f"{prefix}.{number}." for number in range(first, len(blocks))}
    after = {name for name in names[last + 1 :] if "embed" not in name}
    return [name for name in names if name in after or name.startswith(tuple(tops))]


def order_of(lengths: Sequence[int], recipe: LanguageRecipe, seed: int) -> list[list[int]]:
    """Which rows every step takes: batches of like length, each epoch in a fresh order."""
    groups = list(by_length(lengths, recipe.batch_size))
    generator = torch.Generator().manual_seed(seed)
    return [
        groups[number]
        for _ in range(recipe.epochs)
        for number in torch.randperm(len(groups), generator=generator).tolist()
    ]


class LowRank(torch.nn.Module):
    """A matrix [M, K] plus a product of rank R, which starts at zero (LoRA, alpha = R)."""

    def __init__(self, matrix: Tensor, rank: int):
        super().__init__()
        shape = rank, matrix.shape[1]
        self.down = torch.nn.Parameter(torch.randn(shape, device=matrix.device) / shape[1] ** 0.5)
        self.up = torch.nn.Parameter(matrix.new_zeros(matrix.shape[0], rank))

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix + self.up @ self.down


def fine_tuned(
    base: Language,
    pairs: Sequence[Pair],
    recipe: LanguageRecipe,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The trained parameters by name, after AdamW on the answers' tokens, EOS included.

    The loss is the mean over an answer's tokens, then over rows. checkpoint: a file for weights,
    AdamW's state, the step and the random state, written every `save_every` steps and removed at
    the end. Training resumes from it to bitwise the same weights. Raises ValueError for the
    checkpoint of another base, recipe, seed or other rows.
    """
    model = copy.deepcopy(base.model).float()
    names = trained(model, recipe.trains)
    torch.manual_seed(seed)
    kind, _, rank = recipe.trains.partition(":")
    for name, tensor in list(model.named_parameters()):
        tensor.requires_grad_(name in names and kind != "lora")
        if name in names and kind == "lora":
            part = model.get_submodule(name.removesuffix(".weight"))
            register_parametrization(part, "weight", LowRank(tensor, int(rank)))
    for block in blocks_of(model)[1] if recipe.checkpointing else ():
        block.forward = partial(recomputed, block.forward, use_reentrant=False)
    weights = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    adam = adamw(weights.values(), recipe)
    order = order_of([len(prompt) + len(answer) for prompt, answer in pairs], recipe, seed)
    digest = key_of(base.digest, pairs, recipe, seed)
    begin = resume(checkpoint, weights, adam, digest)
    parts, model = Parts.of(model), model.train()

    def loss(numbers: Sequence[int]) -> Iterator[Tensor]:
        return losses(base, model, parts, [pairs[number] for number in numbers], recipe)

    options = {"total": len(order), "begin": begin, "progress": progress}
    for step in optimise(adam, recipe, order[begin:], loss, **options):
        if checkpoint is not None and step % recipe.save_every == 0:
            save(checkpoint, weights, adam, step, digest)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    if kind == "lora":
        weights = {n: model.get_submodule(n.removesuffix(".weight")).weight for n in names}
    return {name: tensor.detach() for name, tensor in weights.items()}


def losses(
    base: Language,
    model: torch.nn.Module,
    parts: Parts,
    rows: Sequence[Pair],
    recipe: LanguageRecipe,
) -> Iterator[Tensor]:
    """The loss on some rows, in parts that add up to it: one for every `micro` rows."""
    size = recipe.micro or len(rows)
    half = recipe.precision == "bfloat16"
    parameters = dict(model.named_parameters())
    for start in range(0, len(rows), size):
        few = rows[start : start + size]
        batch, tokens = collate(base, few)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=half):
            hidden = answer_states(parts, parameters, batch)
        each = torch.nn.functional.cross_entropy(
            parts.words(parameters, hidden), tokens, reduction="none"
        )
        yield batch.weight @ each * (len(few) / len(rows))


def save(
    path: Path, weights: Mapping[str, Tensor], adam: torch.optim.AdamW, step: int, digest: str
) -> None:
    """Write a checkpoint atomically; digest: of everything that determines the training."""
    state = {"weights": {name: tensor.detach() for name, tensor in weights.items()}}
    state |= {"adam": adam.state_dict(), "step": step, "random": torch.get_rng_state()}
    state["digest"] = digest
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    with fresh_file(path) as new:
        torch.save(state, new)


def resume(
    path: Path | None, weights: Mapping[str, Tensor], adam: torch.optim.AdamW, digest: str
) -> int:
    """Read a checkpoint into weights and AdamW; returns the number of steps done.

    Raises ValueError where its digest is another one.
    """
    if path is None or not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("digest") != digest:
        raise ValueError(f"{path} was written by another training; delete it")
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(state["weights"][name])
    adam.load_state_dict(state["adam"])
    torch.set_rng_state(state["random"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    return state["step"]
