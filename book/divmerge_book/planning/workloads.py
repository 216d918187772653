"""What is computed, in numbers: a model without its weights, a fit, a fine-tuning."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

DELTAS: Mapping[str, float | int] = {  # bytes of one number of a task vector
    **{"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1 + 4 / 128},  # a scale per 128 numbers
    **{"streamed": 4, "streamed_bfloat16": 2, "low_rank": 4},
}
PRECISIONS = {"float32": 4, "bfloat16": 2}
CHOICES: Mapping[str, Collection[str]] = {
    **{"deltas": DELTAS, "gradients": ("stream", "buffer"), "precision": PRECISIONS},
    "cached": ("float32", "bfloat16", "top"),
}


@dataclass(frozen=True)
class Model:
    """A transformer in numbers: N parameters (tied ones once), L layers of width H, and so on.

    largest: numbers in the largest tensor. inner: width of the feed-forward part. keys: width of
    keys, and of values. block: parameters of one layer. sides: M + K summed over a layer's matrices
    [M, K]. vocabulary: V, 0 without a head. kind: a name in `memory.KINDS`. tied: whether
    embeddings and head are one tensor, with two gradients.
    """

    parameters: int
    largest: int
    layers: int
    hidden: int
    inner: int
    heads: int
    keys: int
    block: int
    sides: int
    vocabulary: int = 0
    kind: str = "gelu"
    tied: bool = False
    name: str = "model"

    @classmethod
    def of(cls, config: transformers.PretrainedConfig, *, head: bool = True) -> "Model":
        """From a configuration alone, without weights, with a language model's head if it has one.

        head: False for the bare encoder. Raises ValueError where transformers has no such model.
        """
        try:
            with torch.device("meta"):
                causal = head and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
                kind, own = AutoModelForCausalLM if causal else AutoModel, copy.deepcopy(config)
                made = kind.from_config(own)  # BART's decoder alone writes into its configuration
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"transformers makes no model of {type(config)}: {error}") from error

        sizes = [parameter.numel() for parameter in made.parameters()]
        lists = (part for part in made.modules() if isinstance(part, nn.ModuleList))
        block = list(max(lists, key=len)[0].parameters())
        hidden, heads = config.hidden_size, config.num_attention_heads
        width = getattr(config, "head_dim", None) or hidden // heads
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        new = getattr(config, "activation_function", "") == "gelu_new"
        return cls(
            parameters=sum(sizes),
            largest=max(sizes),
            layers=config.num_hidden_layers,
            hidden=hidden,
            inner=inner or 4 * hidden,
            heads=heads,
            keys=width * (getattr(config, "num_key_value_heads", None) or heads),
            block=sum(parameter.numel() for parameter in block),
            sides=sum(sum(parameter.shape) for parameter in block if parameter.ndim == 2),
            vocabulary=config.vocab_size if causal else 0,
            kind="gated" if hasattr(config, "rms_norm_eps") else "gelu_new" if new else "gelu",
            tied=bool(causal and getattr(config, "tie_word_embeddings", False)),
            name=config.name_or_path or type(config).__name__.removesuffix("Config"),
        )


@dataclass(frozen=True)
class Training:
    """Fine-tuning of all weights with AdamW: rows of `tokens` tokens at a time.

    answers: positions that are answered, None for one a row. classes: None for the vocabulary.
    """

    rows: int = 4
    tokens: int = 128
    answers: int | None = None
    classes: int | None = None
    precision: str = "float32"
    checkpointing: bool = False
    tasks = ranks = 1  # one model on one device; a Fit may have more

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in CHOICES and value not in CHOICES[name]:
                allowed = ", ".join(CHOICES[name])
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
            if type(value) is int and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")

    @property
    def positions(self) -> int:
        """A: answer positions of one task at a time."""
        return self.rows if self.answers is None else self.answers

    def num_classes(self, model: Model) -> int:
        """Classes that are answered in. Raises ValueError for an encoder without any."""
        if not (self.classes or model.vocabulary):
            raise ValueError("an encoder has no vocabulary to answer with; give classes")
        return self.classes or model.vocabulary


@dataclass(frozen=True)
class Fit(Training):
    """A step of a fit of coefficients; rows and answers are those of each of T tasks.

    deltas: a name in DELTAS; rank: of low-rank ones. gradients: `stream` or `buffer`. cached: how
    the experts' answers are kept, `float32`, `bfloat16` or `top`, with `top` classes, for so many
    inputs of each task. ranks: how many devices share the model and the rows.
    """

    tasks: int = 2
    deltas: str = "float32"
    rank: int = 16
    gradients: str = "stream"
    cached: str = "bfloat16"
    top: int = 32
    inputs: int = 200
    ranks: int = 1
