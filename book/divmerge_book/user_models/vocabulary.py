"""How classifiers read texts: one tokenizer, one table of rows and one padding for all experts."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

import torch
import transformers
from safetensors.torch import load_file, save_file

from divmerge_book.user_models.description import collect_errors
from divmerge_book.user_models.folders import BaseFolder, Source, tokenizer_of
from divmerge_book.user_models.language_tokens import Reading, claimed, holding, owned
from divmerge_core.checkpoints.safetensors_io import SINGLE, weight_files
from divmerge_core.storage import dump_json

ROLES = tuple(f"{role}_token" for role in ("pad", "unk", "cls", "sep", "mask", "bos", "eos"))


@dataclass(frozen=True)
class Vocabulary:
    """What base and experts agree on: see `language_tokens`.

    rows: of the merged table. owners: number of a row -> places of the experts whose it is. pads:
    the experts' padding tokens.
    """

    tokenizer: transformers.PreTrainedTokenizerBase
    rows: int
    owners: Mapping[int, tuple[int, ...]]
    pads: tuple[str | None, ...]
    notes: tuple[str, ...]

    def added(self, place: int) -> str:
        """Tokens whose rows are this expert's own, in words."""
        mine = sorted(number for number, places in self.owners.items() if place in places)
        return ", ".join(self.tokenizer.convert_ids_to_tokens(mine)) or "none"


def agreed_words(
    base: BaseFolder, experts: Sequence[Source], texts: Sequence[Sequence[str]]
) -> Vocabulary:
    """One tokenizer and one table for a base and experts that may have added or renamed tokens.

    texts: of every expert's task. Rows that all know are merged; what experts added stays theirs.
    Raises ValueError, by name, where a number means different tokens in texts of two tasks, where
    special tokens differ, and where no tokenizer reads all texts as their experts do.
    """
    readings = []
    for source, own in zip(experts, texts, strict=True):
        tokenizer = tokenizer_of(source.task.expert) or base.tokenizer
        readings.append(Reading(source.task.name, tokenizer, source.shapes[base.table][0], own))
    ours = {number: token for token, number in base.tokenizer.get_vocab().items()}
    claims = claimed(base.tokenizer, ours, readings)
    owners, notes = owned(ours, claims, readings)
    mine = {number: readings[places[0]].names[number] for number, places in owners.items()}
    written = holding(base.tokenizer, readings, claims | mine)

    def fits(source: Source, own: Reading) -> None:
        if gap := reading_gap(written, own):
            raise ValueError(
                f"expert {source.task.expert}: {gap}; merging needs experts that read texts as the "
                "base does"
            )

    pairs = zip(experts, readings, strict=True)
    collect_errors(lambda pair=pair: fits(*pair) for pair in pairs)
    rows = max(base.shapes[base.table][0], *(one.rows for one in readings))
    pads = tuple(one.tokenizer.pad_token for one in readings)
    return Vocabulary(written, rows, owners, pads, tuple(notes))


def reading_gap(written: transformers.PreTrainedTokenizerBase, one: Reading) -> str | None:
    """How an expert reads its texts otherwise than the merged model; None where it does not."""
    if len(one.tokenizer) > one.rows:
        return (
            f"its tokenizer knows {len(one.tokenizer)} tokens and it has rows for {one.rows}; save "
            "its resized embeddings too"
        )
    for role in ROLES:
        wanted, found = getattr(written, role, None), getattr(one.tokenizer, role, None)
        if None not in (wanted, found) and wanted != found:
            return f"its {role.replace('_', ' ')} is {found!r}, the base's {wanted!r}"
    for text, own, other in zip(one.prompts, one.asked, one.cut(written, one.prompts), strict=True):
        if own != other:
            return (
                f"its tokenizer cuts up {text[:60]!r} in another way than the base's (lower case? "
                "special tokens?)"
            )
    return None


def grown_base(base: BaseFolder, rows: int, folder: Path) -> Path:
    """A copy of the base whose tables have so many rows (zeros) and whose tokenizer knows all.

    It is what a merge is written into; its numbers are replaced.
    """
    tensors = {name: t for file in weight_files(base.folder) for name, t in load_file(file).items()}
    few = base.shapes[base.table][0]
    for name, tensor in tensors.items():
        if tensor.shape[:1] == (few,) and not any(part.isdigit() for part in name.split(".")):
            more = tensor.new_zeros(rows - few, *tensor.shape[1:])
            tensors[name] = torch.cat([tensor, more])
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    for file in base.folder.iterdir():
        if (
            file.is_file()
            and file.suffix not in (".safetensors", ".bin")
            and ".index" not in file.name
        ):
            copyfile(file, folder / file.name)
    base.tokenizer.save_pretrained(folder)
    config = json.loads((base.folder / "config.json").read_text("utf-8"))
    pad = {"pad_token_id": base.tokenizer.pad_token_id}
    dump_json(folder / "config.json", {**config, **pad, "vocab_size": rows})
    return folder


def set_padding(
    base: BaseFolder, experts: Sequence[Source], pads: Sequence[str | None], given: str | None
) -> list[str]:
    """Set the base's tokenizer to the inputs that all models take and the one padding token.

    given: the description's. Returns a note where the base itself names no padding token.
    """
    tokenizer = base.tokenizer
    if given is not None and given not in tokenizer.get_vocab():
        raise ValueError(
            f"pad_token {given!r} is no token of the base {base.name!r}; give one of its own, such "
            f"as {tokenizer.eos_token or tokenizer.unk_token!r}"
        )
    models = [source.model for source in experts if source.model is not None]
    numbers = {model.config.pad_token_id for model in models} - {None}
    used = {tokenizer.pad_token, *pads, given, *map(tokenizer.convert_ids_to_tokens, numbers)}
    if len(used := used - {None}) != 1:
        raise ValueError(
            f"base and experts pad with {sorted(used) or 'nothing'}; one padding token is needed: "
            "name pad_token in the description, or set it in the base's tokenizer, and "
            "pad_token_id in every expert's config.json"
        )
    tokenizer.pad_token, tokenizer.padding_side = used.pop(), "right"
    for model in models:
        model.config.pad_token_id = tokenizer.pad_token_id
        taken = inspect.signature(model.forward).parameters
        tokenizer.model_input_names = [n for n in tokenizer.model_input_names if n in taken]
    if base.config.pad_token_id is None:
        return [
            f"the base {base.name!r} names no pad_token_id in its config.json, so the merged model "
            f"will name none: set it to {tokenizer.pad_token_id} before it reads batches"
        ]
    return []
