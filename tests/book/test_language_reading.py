"""Prompts, and rows as tokens: questions stay whole, answers are exact, weights add up to 1."""

import pytest
import torch
from divmerge_book.data.tasks import SUITES, TASKS
from divmerge_book.models.language.prompts import PROMPTS, add, table
from divmerge_book.models.language.reading import answer_tokens, ask, choices, collate

WORDED = [name for suite in SUITES.values() if suite.head == "vocabulary" for name in suite.tasks]


@pytest.mark.parametrize("name", sorted({*WORDED, *PROMPTS}))
def test_every_task_answered_in_words_has_a_prompt_that_fits_it(name):
    prompt, task = PROMPTS[name], TASKS[name]
    assert len(prompt.words) == len(task.answers)
    question = prompt.ask({"text": "ONE", "pair": "TWO"})
    assert "ONE" in question and ("TWO" in question) == task.pair
    assert question[-1] == ":"  # a word follows after a space


def test_the_seven_tasks_of_the_paper_are_a_suite():
    assert set(SUITES["glue"].tasks) == {"cola", "sst2", "qqp", "qnli", "mnli", "rte", "mrpc"}
    assert SUITES["glue"].base == "Qwen/Qwen2.5-0.5B"


def test_the_books_table_shows_all_prompts_or_those_asked_for():
    assert list(table().task) == list(PROMPTS)
    assert list(table(["headline"]).answers) == ["any text"]


def test_an_answer_is_exactly_a_word_or_it_is_other():
    read = PROMPTS["mnli"].read
    assert [read(text) for text in (" true", "Maybe.", "FALSE\n")] == [0, 1, 2]
    assert [read(text) for text in ("", "true false", "untrue")] == [3, 3, 3]


def test_a_prompt_that_does_not_fit_its_task_is_refused():
    with pytest.raises(ValueError, match="must hold {text}, and {pair}"):
        add("rte", "Only {text}:", "yes", "no")
    with pytest.raises(ValueError, match="one word for each of"):
        add("sst2", "A {text}:", "good", "Good.")


def test_a_prompt_that_is_too_long_loses_text_and_never_the_question_or_is_refused(llama):
    prompt = PROMPTS["mrpc"]
    rows = [{"text": "word " * 60, "pair": "two"}, {"text": "one", "pair": "two"}]
    asked = ask(llama, prompt, rows, 80)
    texts = [llama.tokenizer.decode(list(tokens)) for tokens in asked.prompts]
    assert asked.shortened == 1
    assert max(map(len, asked.prompts)) <= 80
    assert texts[1] == prompt.ask(rows[1])
    assert texts[0].startswith("Do these two sentences say the same?\nFirst: word word")
    assert texts[0].endswith("\nSecond: two\nSame:")
    with pytest.raises(ValueError, match="alone is .* tokens too long; raise max_length"):
        ask(llama, PROMPTS["sst2"], [{"text": "film"}], 5)


def test_an_answer_ends_in_eos_unless_it_is_cut(llama):
    whole = answer_tokens(llama, " yes")
    assert whole[-1] == llama.stop and llama.tokenizer.decode(whole[:-1]) == " yes"
    assert answer_tokens(llama, " yes", 1) == whole[:1]


def test_a_batch_by_hand_and_an_answer_without_a_token_is_refused(llama):
    batch, tokens = collate(llama, [((5, 6, 7), (8, 9)), ((4,), (llama.stop,))])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8], [4] + [llama.pad] * 3]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch.answer.nonzero().tolist() == [[0, 2], [0, 3], [1, 0]]  # A = 3
    assert tokens.tolist() == [8, 9, llama.stop]
    torch.testing.assert_close(batch.weight, torch.tensor([1 / 4, 1 / 4, 1 / 2]))
    with pytest.raises(ValueError, match="at least one token"):
        collate(llama, [((5,), ())])


def test_the_likelihood_of_a_word_is_the_product_of_its_tokens(llama):
    prompts, words = [(5, 6, 7), (9, 4)], (" yes", " yesterday", " positive", " no")
    batch = choices(llama, prompts, words)
    with torch.no_grad():
        logits = llama.model(**batch.inputs).logits[batch.answer]
        found = batch.likelihood(logits)
        for row, prompt in enumerate(prompts):
            for column, word in enumerate(words):
                answer = list(answer_tokens(llama, word)[:-1])
                ids = torch.tensor([[*prompt, *answer]])
                log_p = llama.model(ids).logits[0].log_softmax(-1)
                slow = sum(log_p[len(prompt) - 1 + n, t] for n, t in enumerate(answer))
                torch.testing.assert_close(found[row, column], slow, rtol=1e-4, atol=1e-4)


def test_words_of_one_token_share_one_row_per_prompt(llama):
    few = [word for word in (" yes", " no") if len(answer_tokens(llama, word)) == 2]
    assert len(few) == 2
    assert len(choices(llama, [(5, 6), (7,)], few).inputs["input_ids"]) == 2
