"""Classifiers whose experts added, renamed or padded tokens: shared rows merge, others stay."""

import json
from pathlib import Path

import local_files
import pytest
import torch
import transformers
from divmerge_book.models.merged import load_with_head
from helpers import MARKERS, WORDS
from local_files import LABELS, averaged, changed, make_adapter, make_project, refused
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

# Toy experts move further than fine-tuning does.
pytestmark = pytest.mark.filterwarnings("ignore:task .* the task vector is:UserWarning")
SIZE = len(WORDS)


def grown(folder: Path, words: list[str], rows: int, pad: str | None = None) -> None:
    """An expert with more tokens and a longer table, as resize_token_embeddings leaves it."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = (n for n in tensors if n.endswith(("wte.weight", "word_embeddings.weight")))
    more = torch.full((rows - SIZE, tensors[name].shape[1]), 0.5)
    tensors[name] = torch.cat([tensors[name], more])
    save_file(tensors, file, metadata={"format": "pt"})
    local_files.configured(folder, vocab_size=rows)
    own = transformers.AutoTokenizer.from_pretrained(folder)
    own.add_tokens(words)
    if pad:
        own.add_special_tokens({"pad_token": pad})
        local_files.configured(folder, pad_token_id=own.pad_token_id)
    own.save_pretrained(folder)


def merged(project: Path, folder: Path):
    """The plan, the experiment, the average's parameters by name, and its folder."""
    plan, bench, found, _ = averaged(project, folder)
    flat = found.made["average"].merged
    for number, task in enumerate(plan.tasks):  # what is written answers as what was merged
        batch = bench.test[number].batches[0]
        with torch.no_grad():
            wanted = bench.problem.logits(flat, number, batch)
            assert_close(load_with_head(folder, task)(**batch.inputs).logits, wanted)
    return plan, bench, bench.problem.vectors.layout.unflatten(flat)


def test_a_padding_token_that_experts_added_is_merged_beside_the_shared_rows(tmp_path, cache):
    project = make_project(tmp_path, "gpt2")
    for name in MARKERS:
        grown(tmp_path / "experts" / name, [], SIZE + 1, pad="<pad>")
    bare = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "base")
    plan, bench, parts = merged(project, tmp_path / "merged")
    assert any("added or renamed 1 tokens (<pad>)" in note for note in plan.notes)
    table = parts["wte.weight"]
    assert table.shape[0] == SIZE + 1 and torch.equal(table[SIZE], torch.full((32,), 0.5))
    first, second = (
        load_file(tmp_path / f"experts/{name}/model.safetensors")["transformer.wte.weight"][:SIZE]
        for name in MARKERS
    )
    assert_close(table[:SIZE], (first + second) / 2)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.convert_tokens_to_ids("<pad>") == SIZE
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["vocab_size"] == SIZE + 1
    assert "<pad>" in (tmp_path / "merged/README.md").read_text()


def test_a_row_that_one_expert_added_stays_and_longer_tables_fit(tmp_path, cache):
    project = make_project(tmp_path)
    grown(tmp_path / "experts/mood", ["tooling"], SIZE + 8)
    plan, bench, parts = merged(project, tmp_path / "merged")
    assert any("'mood': its expert added or renamed 1 tokens (tooling)" in n for n in plan.notes)
    table = parts["embeddings.word_embeddings.weight"]
    assert torch.equal(table[SIZE], torch.full((32,), 0.5)), "whole, not half of it"
    assert "tooling" in (tmp_path / "merged/README.md").read_text()


def test_a_number_that_means_two_used_tokens_is_refused_by_name(tmp_path):
    project = make_project(tmp_path)
    for name, word in zip(MARKERS, ("tooling", "gadget"), strict=True):
        grown(tmp_path / "experts" / name, [word], SIZE + 1)
        file = tmp_path / "data" / f"{name}-merge.csv"
        file.write_text(file.read_text() + f"the {word} is here,{LABELS[name][0]}\n")
    refused(project, f"token {SIZE} is 'tooling' for task 'mood' and 'gadget' for task 'place'")


def test_a_tokenizer_that_knows_more_than_the_table_holds_is_refused(tmp_path):
    project = make_project(tmp_path)
    grown(tmp_path / "experts/mood", ["tooling", "gadget"], SIZE + 1)
    refused(project, f"knows {SIZE + 2} tokens and it has rows for {SIZE + 1}")


@pytest.mark.parametrize("part", ["", "modules_to_save.default."])
def test_an_adapter_with_a_resized_table_brings_its_rows(tmp_path, cache, part):
    """As PEFT's modules_to_save, and its save_embedding_layers, leave them."""
    project = make_project(tmp_path)
    words, table = transformers.AutoTokenizer.from_pretrained(tmp_path / "base"), "embeddings.word_"
    words.add_tokens(["<own>"])
    base = load_file(tmp_path / "base" / "model.safetensors")[f"{table}embeddings.weight"]
    own = torch.cat([base + 1, torch.full((1, 32), 0.5)])
    saved = {f"bert.{table}embeddings.{part}weight": own, **local_files.pooler_and_head(2)}
    query = {"bert.encoder.layer.0.attention.self.query": (32, 32)}
    make_adapter(tmp_path / "lora", query, saved=saved)
    words.save_pretrained(tmp_path / "lora")
    path = changed(project, 0, expert=str(tmp_path / "lora"), labels=LABELS["mood"])
    plan, bench, parts = merged(path, tmp_path / "merged")
    assert plan.vocabulary.rows == SIZE + 1 and set(plan.vocabulary.owners) == {SIZE}
    assert torch.equal(parts[f"{table}embeddings.weight"][SIZE], own[SIZE])
    vectors = bench.problem.vectors
    moved = vectors.layout.unflatten(vectors.deltas[0])[f"{table}embeddings.weight"]
    assert_close(moved[:SIZE], torch.ones(SIZE, 32), rtol=0, atol=1e-5)
