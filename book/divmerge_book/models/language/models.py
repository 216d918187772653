"""Language models, causal or encoder-decoders: loaded once, with the digests that hold experts to
their base."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from divmerge_book.data.downloads import ASSETS, fetch
from divmerge_book.models.encoders import check_device, load_pretrained, quiet_transformers
from divmerge_core.registry import Registry
from divmerge_core.storage import cache_dir, once

MODELS = Registry("language model")  # packaged ones: name -> its folder, in the hub's layout


@dataclass(frozen=True)
class Language:
    """A causal language model (in evaluation mode), its tokenizer, and digests of what it is.

    vocabulary: a digest of the tokenizer: two models with the same one read and write the same
    numbers. digest: of configuration, tokenizer and weights. ends: tokens that end answers too.
    """

    name: str
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    vocabulary: str
    digest: str
    ends: tuple[int, ...] = ()

    @property
    def state(self) -> dict[str, Tensor]:
        """The parameters that merging acts on, by name; tied ones once."""
        return {name: tensor.detach() for name, tensor in self.model.named_parameters()}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def stop(self) -> int:
        """The number of the token that ends an answer (EOS)."""
        return self.tokenizer.eos_token_id

    @property
    def stops(self) -> tuple[int, ...]:
        """The numbers of all tokens that end an answer: EOS, and what else does."""
        return (self.stop, *self.ends)

    @property
    def pad(self) -> int:
        """The number that fills short rows: masked everywhere, so any will do."""
        return self.stop if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id


@MODELS.register("smollm2")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: out of its 4-bit file once, then kept as safetensors."""
    asset = ASSETS["smollm2"]
    folder = cache_dir() / "models" / f"smollm2-{asset.version}-{asset.sha256[:8]}"

    def unpack(new: Path) -> None:
        packed = fetch("smollm2") / asset.files[0]
        place = {"gguf_file": packed.name, "pretrained_model_name_or_path": packed.parent}
        quiet_transformers()
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):  # not set by transformers 5.15
            del model.config.quantization_config  # its weights are plain numbers now
        model.hf_quantizer = None
        model.save_pretrained(new)
        AutoTokenizer.from_pretrained(**place).save_pretrained(new)

    return once(folder, unpack, holds="config.json")


def load_language(name: str, *, device: str = "cpu", blocks: int | None = None) -> Language:
    """A causal language model or encoder-decoder: a name in MODELS, a folder, or a hub name.

    Weights are in float32. blocks: keep only so many of its transformer blocks, the first ones: a
    small model for tests and smoke runs. Raises ValueError where none can be loaded, where weights
    are missing, and where the tokenizer has no token that ends an answer.
    """
    place = check_device(device)

    def load(source: str) -> tuple[torch.nn.Module, dict]:
        two = AutoConfig.from_pretrained(source).is_encoder_decoder
        kind = AutoModelForSeq2SeqLM if two else AutoModelForCausalLM
        return kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True)

    model, tokenizer = load_pretrained(MODELS, name, load)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} has no EOS token: no answer would ever end")
    if len(tokenizer) > (known := model.get_input_embeddings().num_embeddings):
        raise ValueError(
            f"{name!r}: the tokenizer knows {len(tokenizer)} tokens, the model {known}; load the "
            "tokenizer it was trained with"
        )
    if blocks is not None:
        model = shortened(model, blocks)
    return described(name, model.eval().to(place), tokenizer)


def described(
    name: str, model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase
) -> Language:
    """The model with its digests."""
    vocabulary = vocabulary_digest(tokenizer)
    digest = hashlib.sha256(model.config.to_json_string().encode() + vocabulary.encode())
    for key, tensor in model.named_parameters():
        plain = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        digest.update(key.encode() + plain.numpy().tobytes())
    return Language(name, model, tokenizer, vocabulary, digest.hexdigest())


def vocabulary_digest(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """A digest of a tokenizer: its tokens, how text is cut into them, and the one that ends it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    how = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for setting in ("padding", "truncation"):  # these change with use
        how.pop(setting, None)
    text = json.dumps([how, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def blocks_of(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The transformer blocks of a model, and their name in it: its first list of modules.

    Raises ValueError where it has none.
    """
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.ModuleList):
            return name, part
    raise ValueError(f"{type(model).__name__} holds no list of transformer blocks")


def shortened(model: torch.nn.Module, blocks: int) -> torch.nn.Module:
    """The model with its first `blocks` transformer blocks only."""
    _, every = blocks_of(model)
    if not 1 <= blocks <= len(every):
        raise ValueError(f"blocks must be 1..{len(every)}, got {blocks}")
    del every[blocks:]
    model.config = copy.deepcopy(model.config)
    model.config.num_hidden_layers = blocks
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:blocks]
    return model


def check_tensors(base: Language, state: Mapping[str, Tensor], who: str) -> None:
    """Raise ValueError where an expert's tensors have other names or shapes than the base's."""
    own, other = ({n: tuple(w.shape) for n, w in one.items()} for one in (base.state, state))
    wrong = sorted(name for name in own | other if own.get(name) != other.get(name))[:3]
    if wrong:
        raise ValueError(
            f"{who} differs from the base {base.name!r} in {wrong}: "
            f"{[other.get(n) for n in wrong]} instead of {[own.get(n) for n in wrong]}; merge "
            "experts of one base"
        )
