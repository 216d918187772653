"""Encoder-decoder experts that write: tiny T5s and data sets in the hub's own layout."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from divmerge_book.data.splits import SPLITS
from divmerge_book.evaluation.metrics import evaluate
from divmerge_book.models.language.completions import greedy, written
from divmerge_book.models.language.models import Language, load_language
from divmerge_book.models.language.reading import collate
from divmerge_book.models.language.seq2seq import encodes
from divmerge_book.published import sources, t5
from divmerge_book.published import toy_models as toys
from divmerge_book.published.sources import SOURCES, PublishedTask, rows_of
from helpers import raising
from safetensors.torch import load_file
from torch.testing import assert_close

from divmerge_core.merging.merged_model import expert_logits
from divmerge_core.methods import METHODS, options_of
from divmerge_core.methods.statistical import examples

NAMES = ("imdb", "squad")
ROWS = {"merge": 8, "validation": 8, "test": 12}
FEW = {"rows": ROWS, "max_length": 24, "max_new": 4, "progress": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[str, dict[str, PublishedTask]]:
    """A tiny base, experts and their data; only to be read."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    toys.make_toys(folder, NAMES, steps=40)
    places = {
        name: {"expert": str(folder / "experts" / name), "data": str(folder / "data" / name)}
        for name in NAMES
    }
    return str(folder / "base"), {n: replace(SOURCES[n], **own) for n, own in places.items()}


@pytest.fixture(scope="module")
def bench(made, module_cache):
    base, own = made
    return t5.prepare_t5(NAMES, base=base, sources=own, **FEW)


@pytest.fixture(scope="module")
def base(made) -> Language:
    return load_language(made[0])


def model_of(folder: str) -> torch.nn.Module:
    return transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()


# --- the forward pass -----------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(len(NAMES)))
def test_an_expert_at_coefficient_1_answers_as_transformers_does_row_by_row(bench, made, number):
    """Teacher-forced on its own answers: padding on either side changes nothing."""
    name, problem = NAMES[number], bench.problem
    model, cached = model_of(made[1][name].expert), expert_logits(problem)[number]
    for batch, kept in zip(problem.batches[number], cached, strict=True):
        found = problem.logits(problem.vectors.expert(name), number, batch)
        assert_close(kept.float(), found.log_softmax(-1), rtol=1e-2, atol=1e-2)  # bfloat16
        counts = batch.answer.sum(1)
        rows = zip(*batch.inputs.values(), found.split(counts.tolist()), strict=True)
        for ids, mask, read, seen, logits in rows:
            given = {"input_ids": ids[None, mask.bool()]}
            with torch.no_grad():
                alone = model(**given, decoder_input_ids=read[None, seen.bool()])
            assert_close(logits, alone.logits[0], rtol=1e-4, atol=1e-5)


def test_position_n_of_the_decoder_predicts_token_n_of_the_answer(base):
    pairs = [((5, 6, 1), (7, 8, 1)), ((9, 1), (1,))]
    batch, targets = collate(base, pairs)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 1], [9, 1, 0]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[0, 7, 8], [0, 0, 0]]
    assert batch.answer.tolist() == [[True, True, True], [True, False, False]]
    assert targets.tolist() == [7, 8, 1, 1]
    assert batch.weight.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_tied_embeddings_are_merged_once_and_read_three_times(bench, made, base):
    """Encoder, decoder and head: a gradient of the one leaf adds up all three uses."""
    problem = bench.problem
    read = [n for n in problem.vectors.layout.names if re.search("embed|shared|lm_head", n)]
    assert read == ["shared.weight"]
    assert set(load_file(Path(made[0]) / "model.safetensors")) == set(base.state)  # on disk, too
    leaves = problem.vectors.layout.unflatten(problem.vectors.expert("imdb").clone())
    leaf, batch = leaves["shared.weight"].requires_grad_(), problem.batches[0][0]
    problem.forward(leaves, [(0, batch)])[0].square().sum().backward()
    model = model_of(made[1]["imdb"].expert)
    model(**batch.inputs).logits[batch.answer].square().sum().backward()
    assert_close(leaf.grad, model.shared.weight.grad, rtol=1e-4, atol=1e-4)


# --- writing --------------------------------------------------------------------------------------
def test_greedy_answers_are_those_of_generate(made):
    expert = load_language(made[1]["imdb"].expert)
    prompts = [expert.tokenizer(text)["input_ids"] for text in ("the film", "a good long song of")]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 1}
    found = greedy(expert, expert.state, prompts, max_new=5)
    for prompt, answer in zip(prompts, found, strict=True):
        own = expert.model.generate(torch.tensor([prompt]), **options)
        assert list(answer) == own[0, 1 : 1 + len(answer)].tolist()


class Script(torch.nn.Module):
    """A model that generates given tokens, whatever the prompt."""

    def __init__(self, rows: list[list[int]]):
        super().__init__()
        self.head, self.rows = torch.nn.Linear(1, 1, bias=False), torch.tensor(rows)
        self.config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=0)
        self.generation_config = None

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def generate(self, **options) -> torch.Tensor:
        return torch.nn.functional.pad(self.rows, (1, 0))  # the start token first


def test_answers_end_at_eos_or_are_cut_and_an_empty_one_is_eos_alone(base):
    script = Script([[7, 1, 1, 1], [1, 1, 1, 1], [7, 8, 9, 7]])
    actor = replace(base, model=script)
    found = greedy(actor, {"head.weight": script.head.weight}, [(5, 1)] * 3, max_new=4)
    assert found == [(7, 1), (1,), (7, 8, 9, 7)]
    assert written(base, found[1]) == ""
    batch, targets = collate(base, [((5, 1), answer) for answer in found])
    assert targets.tolist() == [7, 1, 1, 7, 8, 9, 7]  # an unfinished answer has no EOS to learn
    assert batch.weight.sum().item() == pytest.approx(1)


def test_what_was_cut_or_empty_is_counted(bench):
    for name, found in zip(NAMES, bench.completions, strict=True):
        stop = bench.base.stop
        assert found.counts["prompts"] == ROWS["merge"] == len(found.answers), name
        assert found.counts["unfinished"] == sum(answer[-1] != stop for answer in found.answers)
        assert found.counts["positions"] == sum(map(len, found.answers))


def test_a_prompt_that_is_too_long_keeps_its_question_and_its_eos(made, module_cache):
    bench = t5.prepare_t5(NAMES, base=made[0], sources=made[1], **{**FEW, "max_length": 10})
    known = bench.completions[1]
    assert known.counts["shortened"] > 0
    words = [bench.base.tokenizer.convert_ids_to_tokens(list(p)) for p in known.prompts]
    assert all(len(row) <= 10 and row[-1] == toys.SPECIAL["eos_token"] for row in words)
    assert all(row[0] == "question:" and "context:" in row for row in words)


# --- merging --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["average", "regmean", "divmerge"])
def test_methods_merge_writers_and_what_they_write_is_scored_by_rouge(bench, name):
    quick = {"epochs": 1, "progress": False}
    taken = {key: value for key, value in quick.items() if key in options_of(name)}
    merged = METHODS[name](bench.problem, **taken)
    assert merged.shape == bench.problem.vectors.base.shape and torch.isfinite(merged).all()
    labels = {"suite": t5.SUITE, "subset": "x", "method": name, "seed": 0}
    rows = evaluate(bench.problem, merged, bench.test, **labels)
    assert list(rows.gold) == ["rouge1"] * len(NAMES)
    for grades in rows.predicted:
        assert len(grades) == ROWS["test"] and all(0 <= grade <= 1 for grade in grades)


def test_a_batch_of_writers_falls_apart_into_rows_with_all_their_positions(bench):
    """What Fisher merging asks one by one."""
    problem = bench.problem
    for number, batches in enumerate(problem.batches):
        rows = list(examples(batches))
        assert sum(float(row.weight.sum()) for row in rows) == pytest.approx(1)
        flat = problem.vectors.base
        alone = torch.cat([problem.logits(flat, number, row) for row in rows])
        together = torch.cat([problem.logits(flat, number, batch) for batch in batches])
        assert_close(alone, together, rtol=1e-4, atol=1e-5)


# --- data -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SOURCES)
def test_the_default_columns_read_the_hubs_rows(name, module_cache, tmp_path):
    folder = tmp_path / name
    toys.save_data(folder, name)
    source = replace(SOURCES[name], data=str(folder))
    task = sources.task_of(name, source)
    rows = {split: task.load(split) for split in SPLITS}
    assert "answer" not in rows["merge"].column_names
    second = "pair" if task.pair else "text"
    asked = [set(zip(part["text"], part[second], strict=True)) for part in rows.values()]
    assert sum(map(len, asked)) == len(set.union(*asked)), "splits are disjoint"
    words = {"imdb": {"negative", "positive"}, "squad": set(toys.PLACES), "qasc": set(toys.THINGS)}
    answers = set(rows["test"]["answer"])
    assert answers and answers <= words.get(name, answers)


def test_rows_without_an_answer_and_second_answers_are_left_out():
    given = ("a", ["x"]), ("a", ["y"]), ("b", [])
    table = datasets.Dataset.from_list(
        [{"question": asked, "context": "c", "answers": {"text": said}} for asked, said in given]
    )
    ((text, pair, answer),) = rows_of("squad", SOURCES["squad"], table)
    assert (text, pair) == ("a", "c") and answer in ("x", "y")


def test_an_unknown_column_is_told_which_there_are():
    table = datasets.Dataset.from_list([{"review": "good", "label": 1}])
    with pytest.raises(ValueError, match="no column 'text'.*it has review, label"):
        rows_of("imdb", SOURCES["imdb"], table)
    with pytest.raises(ValueError, match="no column 'target'"):
        rows_of("own", PublishedTask("e", "d", "{review}", "{target}"), table)


def test_without_hub_and_folder_it_is_said(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", raising(ConnectionError("no route to host")))
    monkeypatch.setattr(sources, "hub_revision", lambda name: None)
    with pytest.raises(ValueError, match="cannot read the data of 'squad'.*Give a folder"):
        sources.tables("squad", SOURCES["squad"])


# --- what does not belong together ----------------------------------------------------------------
def swap_words(folder: Path) -> None:
    words = toys.t5_words()
    words[5], words[6] = words[6], words[5]
    toys.word_tokenizer(words, ends=True, **toys.SPECIAL).save_pretrained(folder)


def end_no_text(folder: Path) -> None:
    toys.word_tokenizer(toys.t5_words(), **toys.SPECIAL).save_pretrained(folder)


def shrink(folder: Path) -> None:
    config = toys.t5_config(len(toys.t5_words()))
    config.num_layers = 1
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_words, "vocabulary differs from the base's in 2 tokens"),
        (end_no_text, "cuts up 'the film' in another way"),
        (shrink, "differs from the base .* in .'encoder.block.1"),
    ],
)
def test_an_expert_that_reads_or_computes_otherwise_is_refused(made, base, tmp_path, change, words):
    source = made[1]["squad"]
    shutil.copytree(source.expert, tmp_path / "expert")
    change(tmp_path / "expert")
    other = replace(source, expert=str(tmp_path / "expert"))
    with pytest.raises(ValueError, match=words):
        t5.read_expert(base, "squad", other, ["the film"])


def test_a_model_without_a_start_token_is_refused(made, tmp_path):
    folder = tmp_path / "startless"
    shutil.copytree(made[0], folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('start_token_id": 0', 'start_token_id": null'))
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="names no decoder_start_token_id"):
        collate(load_language(str(folder)), [((5, 1), (1,))])


def test_a_causal_model_is_none_and_t5_is_one(base):
    assert encodes(base.model)
    small = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=5, n_positions=4)
    assert not encodes(transformers.GPT2LMHeadModel(small))
