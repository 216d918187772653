"""What is to be computed, in numbers: a model without its weights, a fit, a fine-tuning."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

INT8 = 1 + 4 / 128  # a byte, and a float32 scale per 128 numbers
DELTAS: Mapping[str, float | int] = {  # bytes of one number of a task vector
    **{"float32": 4, "bfloat16": 2, "float16": 2, "int8": INT8},
    **{"streamed": 4, "streamed_bfloat16": 2, "low_rank": 4},
}
CACHED = ("float32", "bfloat16", "top")
PRECISIONS = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Kept:
    """What one transformer block keeps for its backward pass, per token, with fused attention.

    wide: vectors [H] that stay in float32 (what goes into norms and comes out of their first half).
    inputs: vectors [H] that enter matrices, attention's result among them; under bfloat16 every
    matrix has its own copy, so `inputs_half` counts more of them. inner: vectors [I] of the
    feed-forward part. statistics: single numbers of the norms. Besides: queries [H], keys and
    values, and one number per head. Counted by `saved_tensors_hooks` in tests/test_memory.py.
    """

    wide: int
    inputs: int
    inputs_half: int
    inner: int
    statistics: int


KINDS: Mapping[str, Kept] = {
    "gated": Kept(wide=4, inputs=3, inputs_half=6, inner=4, statistics=2),  # Llama, Qwen2
    "gelu": Kept(wide=2, inputs=3, inputs_half=5, inner=2, statistics=4),  # BERT
    "gelu_new": Kept(wide=2, inputs=3, inputs_half=3, inner=5, statistics=4),  # GPT-2
}


def first_block(module: nn.Module) -> nn.Module:
    """A model's first transformer block: the first entry of its longest list of modules."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        raise ValueError(f"{type(module).__name__} has no list of blocks; give its numbers instead")
    return max(lists, key=len)[0]


@dataclass(frozen=True)
class Model:
    """A transformer in numbers: N parameters, L layers of width H, and so on.

    parameters: N, tied tensors once. largest: numbers in its largest tensor. inner: width of the
    feed-forward part; None for 4 H. heads: None for H / 64. keys: width of keys, and of values;
    None for H. vocabulary: V, 0 for an encoder without a head. block: parameters of one layer; None
    for what is left beside the largest tensor. kind: a name in KINDS. sides: M + K summed over a
    layer's matrices [M, K], which low-rank factors grow with; None for 4 H x H and 2 H x I ones.
    tied: whether embeddings and head are one tensor, whose two gradients meet before they go.
    """

    parameters: int
    largest: int
    layers: int
    hidden: int
    vocabulary: int = 0
    inner: int | None = None
    heads: int | None = None
    keys: int | None = None
    block: int | None = None
    sides: int | None = None
    kind: str = "gelu"
    tied: bool = False
    name: str = "model"

    def __post_init__(self):
        if min(self.parameters, self.largest, self.layers, self.hidden) < 1:
            raise ValueError(
                "a model needs parameters, largest, layers and hidden of 1 or more, got "
                f"{self.parameters}, {self.largest}, {self.layers} and {self.hidden}"
            )
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        inner = self.inner or 4 * self.hidden
        derived = {
            "inner": inner,
            "heads": max(1, self.hidden // 64),
            "keys": self.hidden,
            "block": (self.parameters - self.largest) // self.layers,
            "sides": 8 * self.hidden + 2 * (self.hidden + inner),
        }
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @classmethod
    def of(cls, config: transformers.PretrainedConfig, *, head: bool = True) -> "Model":
        """From a configuration alone: the model is made without weights.

        head: with a language model's head where the architecture has one; else the bare encoder.
        Raises ValueError where transformers has no such model.
        """
        try:
            with torch.device("meta"):
                causal = head and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
                made = (AutoModelForCausalLM if causal else AutoModel).from_config(config)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"transformers makes no model of {type(config)}: {error}") from error
        sizes = [parameter.numel() for parameter in made.parameters()]
        block, hidden = first_block(made), config.hidden_size
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or hidden // heads
        activation = str(getattr(config, "hidden_act", getattr(config, "activation_function", "")))
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        return cls(
            sum(sizes),
            max(sizes),
            config.num_hidden_layers,
            hidden,
            vocabulary=config.vocab_size if causal else 0,
            inner=inner or 4 * hidden,
            heads=heads,
            keys=width * (getattr(config, "num_key_value_heads", None) or heads),
            block=sum(parameter.numel() for parameter in block.parameters()),
            sides=sum(sum(p.shape) for p in block.parameters() if p.ndim == 2),
            kind=(
                "gated"
                if hasattr(config, "rms_norm_eps")
                else "gelu_new"
                if activation == "gelu_new"
                else "gelu"
            ),
            tied=bool(causal and getattr(config, "tie_word_embeddings", False)),
            name=config.name_or_path or type(config).__name__.removesuffix("Config"),
        )

    @property
    def ends(self) -> int:
        """Parameters outside of the layers: embeddings, last norm, head."""
        return self.parameters - self.layers * self.block

    @property
    def products(self) -> int:
        """Parameters that are multiplied with tokens or answers: no embeddings, but the head."""
        return self.layers * self.block + self.vocabulary * self.hidden


@dataclass(frozen=True)
class Fit:
    """A fit of coefficients: T tasks, and B rows of S tokens of each in a step.

    deltas: a name in DELTAS; rank: of low-rank ones. gradients: `stream` or `buffer`. answers: A
    per task and step, None for one a row. classes: V, None for the model's vocabulary. cached: how
    the experts' answers are kept, `float32`, `bfloat16` or `top`, with `top` classes; inputs: of
    each task that they are kept for. ranks: how many devices share the model and the rows.
    """

    tasks: int
    rows: int = 4
    tokens: int = 128
    answers: int | None = None
    classes: int | None = None
    deltas: str = "float32"
    rank: int = 16
    gradients: str = "stream"
    precision: str = "float32"
    checkpointing: bool = False
    cached: str = "bfloat16"
    top: int = 32
    inputs: int = 200
    ranks: int = 1

    def __post_init__(self):
        counts = ("tasks", "rows", "tokens", "rank", "top", "inputs", "ranks")
        low = [name for name in counts if getattr(self, name) < 1]
        if low:
            raise ValueError(f"{', '.join(low)} must be 1 or more")
        choices = {
            "deltas": DELTAS,
            "gradients": ("stream", "buffer"),
            "precision": PRECISIONS,
            "cached": CACHED,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")

    @property
    def positions(self) -> int:
        """A: answer positions of one task in a step."""
        return self.rows if self.answers is None else self.answers


@dataclass(frozen=True)
class Training:
    """Fine-tuning of all weights with AdamW: B rows of S tokens at a time, A of them answers."""

    rows: int = 8
    tokens: int = 128
    answers: int | None = None
    classes: int | None = None
    precision: str = "float32"
    checkpointing: bool = False

    def __post_init__(self):
        if min(self.rows, self.tokens) < 1 or self.precision not in PRECISIONS:
            raise ValueError(
                f"rows and tokens must be 1 or more and precision one of {', '.join(PRECISIONS)}, "
                f"got {self.rows}, {self.tokens} and {self.precision!r}"
            )

    @property
    def positions(self) -> int:
        """A: answer positions at a time."""
        return self.rows if self.answers is None else self.answers
