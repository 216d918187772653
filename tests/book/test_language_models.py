"""Causal models, and their forward pass: only answer positions, tied weights once."""

import json
import shutil

import pytest
from divmerge_book.models.language import models
from divmerge_book.models.language.forward import Parts
from divmerge_book.models.language.models import MODELS, load_language, vocabulary_digest
from divmerge_book.models.language.training import trained
from language_toys import save_model, tokenizer


def test_tied_weights_are_one_tensor_and_others_two(llama, qwen):
    assert "lm_head.weight" not in llama.state and "model.embed_tokens.weight" in llama.state
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(qwen.state)
    assert Parts.of(llama.model).names == {"lm_head.weight": "model.embed_tokens.weight"}
    assert Parts.of(qwen.model).names == {"lm_head.weight": "lm_head.weight"}


def test_the_digest_follows_weights_and_the_vocabularys_does_not(llama, llama_folder, tmp_path):
    other = load_language(str(save_model(tmp_path, seed=1)))
    assert load_language(str(llama_folder)).digest == llama.digest != other.digest
    assert other.vocabulary == llama.vocabulary


def test_other_tokens_or_another_end_are_another_vocabulary():
    own, other = tokenizer(), tokenizer("entirely other words")
    assert vocabulary_digest(own) == vocabulary_digest(tokenizer()) != vocabulary_digest(other)
    before = vocabulary_digest(own)
    own("text", truncation=True, max_length=2)  # its state, not its words
    assert vocabulary_digest(own) == before
    own.eos_token = "a"
    assert vocabulary_digest(own) != before


def test_a_model_that_cannot_be_loaded_is_answered_with_the_packaged_ones(tmp_path):
    with pytest.raises(ValueError, match="cannot load language model .*smollm2.*folder or a hub"):
        load_language(str(tmp_path / "nothing"))
    assert "smollm2" in MODELS


def test_a_tokenizer_that_ends_no_answer_is_refused(llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "endless")
    path = tmp_path / "endless" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    with pytest.raises(ValueError, match="no EOS token"):
        load_language(str(tmp_path / "endless"))


def test_the_first_blocks_alone_are_a_smaller_model(llama_folder, llama):
    small = load_language(str(llama_folder), blocks=1)
    assert set(small.state) < set(llama.state) and small.digest != llama.digest
    with pytest.raises(ValueError, match=r"blocks must be 1\.\.2, got 3"):
        load_language(str(llama_folder), blocks=3)


def test_the_upper_blocks_are_what_they_say(llama, qwen):
    top = trained(llama.model, "top:1")
    assert {name.rsplit(".layers.", 1)[-1][0] for name in top if ".layers." in name} == {"1"}
    assert "model.norm.weight" in top and "model.embed_tokens.weight" not in top
    assert "lm_head.weight" in trained(qwen.model, "top:1")
    assert trained(llama.model, "all") == list(llama.state)
    with pytest.raises(ValueError, match=r"all, top:1 \.\. top:2, or lora:RANK, got 'top:3'"):
        trained(llama.model, "top:3")


def test_other_tensors_than_the_bases_are_refused(llama, qwen):
    with pytest.raises(ValueError, match=r"expert differs from .* in \['lm_head.weight'"):
        models.check_tensors(llama, qwen.state, "expert")
