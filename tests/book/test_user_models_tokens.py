"""Tokens that experts added or renamed: merged, kept, written, or refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from divmerge_book.models.language.completions import greedy, written
from divmerge_book.user_models import check, load, read
from divmerge_book.user_models.language_tokens import Reading, agreed
from divmerge_book.user_models.weights import keep_rows
from helpers import layout_of
from language_files import make_language_project, prompt_rows, write_lines
from language_toys import tokenizer
from local_files import averaged, refused
from torch.testing import assert_close

from divmerge_core.merging.task_vectors import TaskVectors

pytestmark = pytest.mark.filterwarnings("ignore:task .* the task vector is:UserWarning")
ROWS = 316  # of the toys' tables, six more than tokens


def added(*tokens: str, base: transformers.PreTrainedTokenizerFast | None = None):
    own = base or tokenizer()
    own.add_tokens([transformers.AddedToken(token, special=True) for token in tokens])
    return own


def reading(task: str, own, *prompts: str, rows: int = ROWS, **more) -> Reading:
    return Reading(task, own, rows, prompts or ("good film",), **more)


def resized(project: Path, name: str, own, *, rows: int = ROWS, uses: str = "") -> torch.Tensor:
    """Give an expert another tokenizer, tables of so many rows, and prompts that use a text."""
    folder = project.parent / "experts" / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    if uses:
        texts = [{"prompt": uses + row["prompt"]} for row in prompt_rows(name, 4)]
        write_lines(project.parent / "data" / f"{name}-merge.jsonl", texts)
    return model.get_input_embeddings().weight.detach().clone()


# --- one table of tokens --------------------------------------------------------------------------
def test_equal_tokenizers_own_nothing():
    found = agreed(tokenizer(), ROWS, [reading("a", tokenizer()), reading("b", tokenizer())])
    assert (found.rows, found.owners, found.notes, found.stops) == (ROWS, {}, (), (0,))


def test_an_added_token_stays_with_its_expert_and_one_that_two_added_with_both():
    experts = [reading("a", added("<a>", "<both>"), "<a>good"), reading("b", tokenizer())]
    found = agreed(tokenizer(), ROWS, experts)
    assert found.owners == {310: (0,), 311: (0,)} and found.added(0) == ["<a>", "<both>"]
    assert found.tokenizer("<a>")["input_ids"] == [310]
    assert "added or renamed 2 tokens (<a>, <both>)" in found.notes[0]
    both = [reading(name, added("<a>"), "<a>good") for name in "ab"]
    assert agreed(tokenizer(), ROWS, both).owners == {310: (0, 1)}


def test_longer_tables_give_rows_to_all():
    experts = [reading("a", added("<a>"), rows=320), reading("b", tokenizer())]
    assert agreed(tokenizer(), ROWS, experts).rows == 320


def test_one_number_with_two_meanings_is_refused_where_texts_use_both():
    experts = [reading("a", added("<a>"), "<a>good"), reading("b", added("<b>"), "<b>bad")]
    with pytest.raises(ValueError, match="token 310 is '<a>' for task 'a' and '<b>' for task 'b'"):
        agreed(tokenizer(), ROWS, experts)
    experts[1] = reading("b", added("<b>"), "bad")  # it does not use its own
    found = agreed(tokenizer(), ROWS, experts)
    assert found.owners == {310: (0,)} and found.tokenizer("<a>")["input_ids"] == [310]
    experts[0] = reading("a", added("<a>"), "good")
    found = agreed(tokenizer(), ROWS, experts)
    assert found.owners == {} and "310 have other names in one expert" in found.notes[0]


def test_without_texts_every_token_of_its_own_counts_as_used():
    experts = [Reading("a", added("<a>"), ROWS, ()), Reading("b", added("<b>"), ROWS, ())]
    with pytest.raises(ValueError, match="one row cannot be both"):
        agreed(tokenizer(), ROWS, experts)


def test_a_moved_token_is_refused_where_texts_use_it():
    moved = tokenizer("entirely other words")
    with pytest.raises(ValueError, match="task 'a': .* of the base, and its texts use it"):
        agreed(tokenizer(), ROWS, [reading("a", moved, "positive film"), reading("b", tokenizer())])


def test_tokens_that_no_tokenizer_holds_are_added_in_order():
    one, two = added("<a>"), added("<x>", "<b>")
    experts = [reading("a", one, "<a>good"), reading("b", two, "<b>bad")]
    found = agreed(tokenizer(), ROWS, experts)  # nobody uses <x>, whose number is <a>'s
    assert [found.tokenizer(text)["input_ids"] for text in ("<a>", "<b>")] == [[310], [311]]
    gap = [reading("a", tokenizer()), reading("b", added("<x>", "<b>"), "<b>bad")]
    assert agreed(tokenizer(), ROWS, gap).owners == {310: (1,), 311: (1,)}


def test_a_tokenizer_that_begins_texts_otherwise_is_refused():
    begins = tokenizer()
    from tokenizers import processors

    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    experts = [reading("a", begins), reading("b", tokenizer())]
    with pytest.raises(ValueError, match="task 'a': its expert's tokenizer cuts up 'good film'"):
        agreed(tokenizer(), ROWS, experts)
    silent = [Reading(one.task, one.tokenizer, ROWS, ()) for one in experts]
    with pytest.raises(ValueError, match="task 'a': its expert's tokenizer cuts up 'Which of"):
        agreed(tokenizer(), ROWS, silent)  # without rows too
    found = agreed(tokenizer(), ROWS, [silent[0], reading("b", begins)]).tokenizer
    assert found("good")["input_ids"][0] == 0, "what both experts do is kept, the base's is not"


def test_answers_that_end_differently_are_said_and_both_end_them():
    other = added("<end>")
    other.eos_token = "<end>"
    found = agreed(tokenizer(), ROWS, [reading("a", tokenizer(), ends=(71,)), reading("b", other)])
    assert found.stops == (0, 71, 310)
    assert any("a with '<eos>' or 'g', b with '<end>'" in note for note in found.notes)


def test_templates_of_several_names_are_kept_with_those_of_others():
    own = tokenizer()
    own.chat_template = {"default": "one", "tools": "two"}
    experts = [reading("a", own), reading("b", own)]
    assert agreed(tokenizer(), ROWS, experts).tokenizer.chat_template == own.chat_template
    other = tokenizer()
    other.chat_template = "three"
    found = agreed(tokenizer(), ROWS, [experts[0], reading("b", other)])
    named = {"a": "one", "b": "three"}
    assert found.templates == named and "chat templates differ" in found.notes[0]
    assert found.tokenizer.chat_template == own.chat_template | named


def test_rows_stay_with_their_owners_in_every_merge():
    layout = layout_of(table=(3, 2), other=(2,))
    base, deltas = torch.arange(8.0), torch.arange(16.0).view(2, 8) + 1
    experts = base + deltas
    vectors = TaskVectors(layout, ("a", "b"), base.clone(), deltas.clone())
    keep_rows(vectors, {"table"}, {1: (1,), 2: (0, 1)})
    merged = layout.unflatten(vectors.merge([0.3, 0.9]))["table"]
    theirs = [layout.unflatten(row)["table"] for row in experts]
    assert_close(merged[1], theirs[1][1])
    mean = (theirs[0][2] + theirs[1][2]) / 2
    assert_close(merged[2], mean + 0.3 * (theirs[0][2] - mean) + 0.9 * (theirs[1][2] - mean))
    assert_close(merged[0], base[:2] + 0.3 * deltas[0, :2] + 0.9 * deltas[1, :2])
    for name, row in zip("ab", experts, strict=True):
        own = layout.unflatten(vectors.expert(name))["table"]
        assert_close(own[[0, 2]], layout.unflatten(row)["table"][[0, 2]])


# --- from folder to folder ------------------------------------------------------------------------
def test_an_added_token_and_longer_tables_reach_the_merged_folder(tmp_path, cache):
    project = make_language_project(tmp_path)
    own = resized(project, "mood", added("<mood>"), rows=330, uses="<mood>")
    plan, bench, found, folder = averaged(project, tmp_path / "merged")
    assert "'mood': its expert added or renamed 1 tokens (<mood>)" in plan.notes[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    table = model.get_input_embeddings().weight
    assert len(table) == 330 == model.config.vocab_size
    assert_close(table[310], own[310], rtol=0, atol=1e-6)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "experts" / "same")
    mean = (own[:310] + other.get_input_embeddings().weight[:310]) / 2
    assert_close(table[:310], mean, rtol=0, atol=1e-6)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert words("<mood>")["input_ids"] == [310] and "<mood>" in (folder / "README.md").read_text()


def test_an_expert_gives_no_probability_to_rows_that_it_has_not(tmp_path, cache):
    project = make_language_project(tmp_path)
    resized(project, "mood", added("<mood>"), rows=330, uses="<mood>")
    bench = load(check(read(project)))
    for batch in bench.problem.batches[1]:
        rest = batch.expert.float()[:, ROWS:].exp()
        assert batch.expert.shape[1] == 330 and rest.max() < 1e-12
    for batch in bench.problem.batches[0]:
        assert batch.expert.float()[:, ROWS:].exp().min() > 1e-12


def test_answers_end_where_each_expert_ends_them(tmp_path, cache):
    project = make_language_project(tmp_path)
    other = tokenizer()
    other.eos_token = other.convert_ids_to_tokens(71)
    resized(project, "same", other)
    settings = tmp_path / "experts" / "mood" / "generation_config.json"
    settings.write_text('{"eos_token_id": [72, 0, 10000]}')  # an instruct model's
    plan, bench, found, folder = averaged(project, tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [0, 72, 71] == model.config.eos_token_id
    for exam, stops in zip(bench.test, ((0, 72), (71, 0)), strict=True):
        assert exam.base.stops == stops
        asked = exam.prompts[0][:2]
        said = greedy(exam.base, exam.base.state, asked, max_new=3)
        assert all({*stops}.isdisjoint(answer[:-1]) for answer in said)
        ended = replace(exam.base, ends=(said[0][0],))
        assert greedy(ended, ended.state, asked, max_new=3)[0] == said[0][:1]
        assert written(ended, said[0][:1]) == ""


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path):
    project = make_language_project(tmp_path)
    added(*(f"<{n}>" for n in range(9))).save_pretrained(tmp_path / "experts" / "mood")
    refused(project, "knows 319 tokens, its expert has rows for 316")


@pytest.mark.parametrize("folder, words", [("base", "base /"), ("experts/mood", "task 'mood'")])
def test_a_tokenizer_without_eos_is_refused(tmp_path, folder, words):
    project, own = make_language_project(tmp_path), tokenizer()
    own.eos_token = None
    own.save_pretrained(tmp_path / folder)
    refused(project, words, "its tokenizer has no EOS token")
