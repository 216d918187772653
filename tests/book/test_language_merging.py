"""Completions, and merging over a vocabulary: identities, kept parts, and fits that are killed."""

from dataclasses import replace

import pytest
import torch
from divmerge_book import TASKS, Report, compare_language, prepare, prepare_language
from divmerge_book.data.splits import SPLITS
from divmerge_book.models.language import completions as module
from divmerge_book.models.language.completions import completions, counted, greedy, written
from divmerge_book.models.language.prompts import PROMPTS
from divmerge_book.models.language.reading import collate
from language_toys import SIZE

from divmerge_core import DIVERGENCES, METHODS
from divmerge_core.kernels.expert_cache import TopKLogProbs, cache_expert
from divmerge_core.merging.merged_model import expert_logits, objective_against

PROMPT_TOKENS = [(5, 6, 7, 8, 9), (4,), (9, 8)]


def slow_answer(base, prompt, max_new: int) -> tuple[int, ...]:
    """One prompt, without padding and without memory."""
    ids = list(prompt)
    for _ in range(max_new):
        with torch.no_grad():
            ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == base.stop:
            break
    return tuple(ids[len(prompt) :])


def test_answers_are_those_of_one_prompt_at_a_time(llama, monkeypatch):
    """With the parameters given, not the model's, and whatever its generation settings are."""
    monkeypatch.setattr(llama.model.generation_config, "repetition_penalty", 9.0)
    expected = [slow_answer(llama, prompt, 5) for prompt in PROMPT_TOKENS]
    assert greedy(llama, llama.state, PROMPT_TOKENS, max_new=5) == expected
    other = {name: -tensor for name, tensor in llama.state.items()}
    assert greedy(llama, other, PROMPT_TOKENS, max_new=5) != expected
    head = llama.model.get_output_embeddings()
    assert "forward" not in vars(head) and llama.model.generation_config.repetition_penalty == 9.0


def test_an_empty_completion_is_an_answer_of_eos_alone(qwen):
    state = {name: tensor.clone() for name, tensor in qwen.state.items()}
    state["lm_head.weight"].zero_()  # all logits equal: the first token, EOS, is taken
    found = greedy(qwen, state, PROMPT_TOKENS, max_new=5)
    assert found == [(qwen.stop,)] * 3
    counts = counted(qwen, 0, found)
    assert counts == {**counts, "prompts": 3, "empty": 3, "unfinished": 0, "positions": 3}
    batch, _ = collate(qwen, list(zip(PROMPT_TOKENS, found, strict=True)))
    assert batch.answer.sum() == 3  # one position each: there the expert ends


def test_an_answer_that_never_ends_is_kept_as_far_as_it_goes(llama):
    found = greedy(llama, llama.state, PROMPT_TOKENS, max_new=2)
    assert counted(llama, 1, found)["unfinished"] == sum(0 not in answer for answer in found) > 0
    assert max(map(len, found)) == 2
    assert llama.tokenizer.eos_token not in written(llama, (5, llama.stop))


def ask_for(llama, **options):
    rows = [{"text": f"film {n}"} for n in range(20)]
    settings = {"key": ["expert"], "max_length": 48, "max_new": 4, "progress": False, **options}
    return completions(llama, llama.state, PROMPTS["sst2"], rows, **settings)


def test_the_kept_distributions_are_the_experts_at_its_own_answers(llama, cache):
    found = ask_for(llama)
    assert sum(len(batch.weight) for batch in found.batches) == found.counts["positions"]
    assert sum(len(batch.inputs["input_ids"]) for batch in found.batches) == 20
    for batch in found.batches:
        logits = llama.model(**batch.inputs).logits[batch.answer]
        assert batch.expert.dtype == torch.bfloat16
        torch.testing.assert_close(batch.expert, cache_expert(logits))
        torch.testing.assert_close(batch.weight.sum(), torch.tensor(1.0))


def test_finished_parts_are_not_made_again(llama, cache, monkeypatch):
    """A run that is stopped after its first part goes on with the second."""
    calls = []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return greedy(*arguments, **options)

    monkeypatch.setattr(module, "greedy", stopping)
    with pytest.raises(KeyboardInterrupt):
        ask_for(llama)
    found = ask_for(llama)
    assert len(calls) == 3  # two parts; the second was asked for twice
    assert [path for path in cache.rglob(".*") if path.is_file()] == []
    again = ask_for(llama)
    assert len(calls) == 3 and again.answers == found.answers


def test_fewer_words_are_less_memory_and_never_more_divergence(llama, qwen, cache):
    whole, few = ask_for(llama), ask_for(llama, top=8)
    assert few.nbytes < whole.nbytes / 5
    for batch, own in zip(whole.batches, few.batches, strict=True):
        assert isinstance(own.expert, TopKLogProbs)
        logits = qwen.model(**batch.inputs).logits[batch.answer].detach()
        for name in ("js", "kl"):
            exact = objective_against(batch.expert, logits, DIVERGENCES[name])
            assert (objective_against(own.expert, logits, DIVERGENCES[name]) <= exact + 1e-2).all()


def test_one_expert_at_coefficient_one_diverges_from_nobody(language_experiment):
    problem, base = language_experiment.problem, language_experiment.base
    for number, name in enumerate(problem.vectors.tasks):
        expert = problem.vectors.expert(name)
        for batch in problem.batches[number]:
            with torch.no_grad():
                logits = problem.logits(expert, number, batch)
            # the cache is rounded to bfloat16: js is off by 1.1 L / 256 at most
            largest = batch.expert.float().abs().max().item()
            assert DIVERGENCES["js"](batch.expert, logits).max() <= 1.1 * largest / 256
            assert DIVERGENCES["js"](logits, logits).abs().max() < 1e-6
        known = language_experiment.completions[number]
        state = problem.vectors.layout.unflatten(expert)
        assert greedy(base, state, known.prompts, max_new=6) == list(known.answers)


def test_kept_answers_are_the_targets(language_experiment):
    kept = expert_logits(language_experiment.problem)
    assert kept[1][0] is language_experiment.problem.batches[1][0].expert


def test_top_answers_are_merged_towards_as_well(llama_folder, glue_rows):
    size = replace(SIZE, base=str(llama_folder), top=16)
    bench = prepare_language("glue", ["sst2", "cola"], size=size, progress=False)
    seen = []
    METHODS["divmerge"](bench.problem, epochs=1, callback=seen.append, progress=False)
    assert all(step.loss >= 0 for step in seen[:-1])


def test_a_comparison_scores_words_and_writing(llama_folder, glue_rows, shared_cache):
    recipe = replace(SIZE.recipe, max_length=160)
    size = replace(SIZE, base=str(llama_folder), epochs=1, recipe=recipe)
    methods = ["average", "tsv_m", "adamerging/layer", "divmerge/task", "divmerge+"]
    found = compare_language("glue_lm", ["sst2", "mnli"], methods=methods, size=size)
    assert list(found.counts.task) == ["sst2", "mnli"] and (found.counts.prompts == 6).all()
    for report in (found.likelihood, found.written):
        assert isinstance(report, Report)
        assert set(report.rows.method) == {"expert", "base", *methods}
        assert {len(gold) for gold in report.rows.gold} == {10}
    assert not list((shared_cache / "unfinished").glob("*"))


def toy_rows(name: str):
    """A packaged task with made-up rows in its place."""
    answers = TASKS[name].answers
    splits = {}
    for split in SPLITS:
        right = [answers[n % 2] if answers else f"{split} number {n}" for n in range(24)]
        splits[split] = [(f"{split} text {n}", None, one) for n, one in enumerate(right)]
    return replace(TASKS[name], read=lambda: splits, origin=lambda: "toy")


def test_free_text_is_written_once_and_graded_beside_words(llama_folder, glue_rows, monkeypatch):
    for name in ("movie", "headline"):
        monkeypatch.setitem(TASKS, name, toy_rows(name))
    size = replace(SIZE, base=str(llama_folder))
    found = compare_language("embedded_lm", ["movie", "headline"], methods=["ties"], size=size)
    words, texts = found.likelihood.rows, found.written.rows
    kept = [rows[rows.task == "headline"].predicted.tolist() for rows in (words, texts)]
    assert kept[0] == kept[1] and set(words[words.task == "headline"].gold) == {"rouge1"}
    assert all(len(grades) == 10 and 0 <= min(grades) <= max(grades) <= 1 for grades in kept[0])
    metrics = found.likelihood.metrics()
    assert set(metrics[metrics.task == "headline"].metric) == {"rouge1", "ratio", "kept_margin"}


def test_a_suite_is_prepared_by_what_its_answers_are():
    with pytest.raises(ValueError, match="answered in words: use .*prepare_language"):
        prepare("glue")
    with pytest.raises(ValueError, match="answered in classes: use divmerge_book.prepare"):
        prepare_language("embedded")
    with pytest.raises(ValueError, match="unknown size of a language suite 'glue/huge'"):
        prepare_language("glue", size="huge")
    with pytest.raises(ValueError, match="merges two or more distinct tasks"):
        prepare_language("glue", ["sst2"], size="smoke")
