"""Tiny random language models with a tokenizer of their own, saved as the hub keeps them."""

from pathlib import Path

import tokenizers
import torch
import transformers
from divmerge_book.evaluation.sizes import LanguageSize
from divmerge_book.models.language.training import LanguageRecipe
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXTS = [
    "Is this review positive or negative?\nReview: a good film\nAnswer: positive negative",
    "Does this sentence read as correct English?\nSentence: the cat sat\nCorrect: yes no",
    "Do these two sentences say the same?\nFirst: one\nSecond: two\nSame: yes no maybe",
]
RECIPE = LanguageRecipe(
    rows=24, lr=3e-3, batch_size=4, max_length=64, max_new=6, precision="float32", save_every=2
)
SIZE = LanguageSize(
    RECIPE, merge_rows=6, validation_rows=8, test_rows=10, batch_size=2, precision="float32"
)

SMALL = {
    **{"vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2},
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_layers": 2},
    **{"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 8, "ffn_dim": 48},
    **{"word_embed_proj_dim": 16, "d_model": 32, "n_heads": 2, "n_layers": 2, "num_heads": 2},
    **{"attention_types": [[["global", "local"], 1]], "max_seq_len": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def family_config(kind: str, **more: object) -> transformers.PretrainedConfig:
    """A tiny model's configuration, of any family."""
    standard = transformers.AutoConfig.for_model(kind)
    known = {name: value for name, value in SMALL.items() if hasattr(standard, name)}
    known = {**known, **more}
    if kind in ("gpt_neo", "falcon"):  # their names for these are properties of others
        known.pop("head_dim", None)
    return type(standard)(**known)


def tokenizer(extra: str = "") -> transformers.PreTrainedTokenizerFast:
    """Byte pairs learned from TEXTS: knows every text, in one token or several a word."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*TEXTS, extra * 5], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def save_model(folder: Path, kind: str = "llama", *, seed: int = 0, tied: bool = True) -> Path:
    """A random two-block model and its tokenizer in a folder."""
    own = tokenizer()
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    sizes |= {"vocab_size": len(own) + 6, "initializer_range": 0.2}  # more rows than tokens
    sizes |= {"tie_word_embeddings": tied, "eos_token_id": own.eos_token_id}
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder
