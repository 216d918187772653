"""Fine-tuning: on answers alone, in any number of parts, and from where it was killed."""

from dataclasses import replace

import pytest
import torch
from divmerge_book.data.tasks import TASKS
from divmerge_book.models import finetuning
from divmerge_book.models.finetuning import rate
from divmerge_book.models.language import training as module
from divmerge_book.models.language.finetuning import language_expert, load_language_expert
from divmerge_book.models.language.forward import Parts
from divmerge_book.models.language.models import load_language
from divmerge_book.models.language.reading import collate
from language_toys import RECIPE, save_model

PAIRS = [((5, 6, 7 + n), (8, 9, 0)) if n % 2 else ((4, n), (n, 0)) for n in range(1, 13)]


def equal(one, other) -> bool:
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


def killed(path, llama, monkeypatch, pairs=PAIRS, recipe=RECIPE, seed=0) -> None:
    """A training that dies after its first checkpoint, at step 2 of 3."""
    save = module.save

    def save_and_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            module.fine_tuned(llama, pairs, recipe, seed=seed, checkpoint=path, progress=False)


def test_a_killed_training_resumes_to_the_same_weights(llama, tmp_path, monkeypatch):
    path, steps = tmp_path / "training.pt", []
    whole = module.fine_tuned(llama, PAIRS, RECIPE, progress=False)
    killed(path, llama, monkeypatch)
    monkeypatch.setattr(finetuning, "rate", lambda *given: steps.append(given[0]) or rate(*given))
    resumed = module.fine_tuned(llama, PAIRS, RECIPE, checkpoint=path, progress=False)
    assert steps == [2]  # of three: the first two are not taken again
    assert not path.exists() and equal(resumed, whole)


@pytest.mark.parametrize("changed", ["base", "rows", "recipe", "seed"])
def test_a_checkpoint_of_another_training_is_refused(llama, tmp_path, monkeypatch, changed):
    path, other = tmp_path / "training.pt", {"seed": 0, "recipe": RECIPE, "pairs": PAIRS}
    killed(path, llama, monkeypatch)
    base = replace(llama, digest="other") if changed == "base" else llama
    other |= {
        "rows": {"pairs": PAIRS[::-1]},
        "recipe": {"recipe": replace(RECIPE, lr=1e-5)},
        "seed": {"seed": 1},
    }.get(changed, {})
    with pytest.raises(ValueError, match="another training; delete it"):
        module.fine_tuned(base, **other, checkpoint=path, progress=False)


def test_the_loss_is_on_answers_alone(llama):
    """As transformers works it out with the labels of all other positions left out."""
    pairs = [pair for pair in PAIRS if len(pair[1]) == 3]  # answers of one length: no weights
    batch, _ = collate(llama, pairs)
    whole, _ = collate(llama, [(prompt, (*answer, 0)) for prompt, answer in pairs])
    ids = whole.inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = torch.where(batch.answer, ids[:, 1:], -100)
    with torch.no_grad():
        slow = llama.model(**whole.inputs, labels=labels).loss
        (fast,) = module.losses(llama, llama.model, Parts.of(llama.model), pairs, RECIPE)
    torch.testing.assert_close(fast, slow)


def test_parts_of_a_batch_add_up_to_it(llama):
    parts = Parts.of(llama.model)
    with torch.no_grad():
        (whole,) = module.losses(llama, llama.model, parts, PAIRS[:7], RECIPE)
        few = list(module.losses(llama, llama.model, parts, PAIRS[:7], replace(RECIPE, micro=3)))
    assert len(few) == 3
    torch.testing.assert_close(sum(few), whole)


def test_recomputed_activations_train_the_same(llama):
    plain = module.fine_tuned(llama, PAIRS, RECIPE, progress=False)
    again = module.fine_tuned(llama, PAIRS, replace(RECIPE, checkpointing=True), progress=False)
    torch.testing.assert_close(plain, again)


def test_training_lowers_the_loss_and_leaves_the_base_alone(llama):
    before = {name: tensor.clone() for name, tensor in llama.state.items()}
    tuned = module.fine_tuned(llama, PAIRS, replace(RECIPE, epochs=4), progress=False)
    assert equal(before, llama.state)
    parts, found = Parts.of(llama.model), []
    for state in (before, tuned):
        batch, tokens = collate(llama, PAIRS)
        hidden = module.answer_states(parts, state, batch)
        found.append(torch.nn.functional.cross_entropy(parts.words(state, hidden), tokens).item())
    assert found[1] < found[0]


def test_the_upper_blocks_alone_are_trained_and_kept(llama, glue_rows):
    expert = language_expert(llama, TASKS["sst2"], replace(RECIPE, trains="top:1"), progress=False)
    moved = [name for name in llama.state if not torch.equal(expert.state[name], llama.state[name])]
    assert moved and all(name.startswith(("model.layers.1.", "model.norm")) for name in moved)
    assert set(expert.state) == set(llama.state)


def test_lora_moves_the_matrices_of_the_blocks_by_its_rank(llama, tmp_path, monkeypatch):
    recipe, path = replace(RECIPE, trains="lora:2"), tmp_path / "training.pt"
    tuned = module.fine_tuned(llama, PAIRS, recipe, progress=False)
    assert len(tuned) == 2 * 7 and all(name.endswith("proj.weight") for name in tuned)
    for name, matrix in tuned.items():
        numbers = torch.linalg.svdvals(matrix - llama.state[name])
        assert numbers[1] > 1e-6 and (numbers[2:] < 1e-6).all(), name
    killed(path, llama, monkeypatch, recipe=recipe)
    assert equal(module.fine_tuned(llama, PAIRS, recipe, checkpoint=path, progress=False), tuned)
    with pytest.raises(ValueError, match="or lora:RANK, got 'lora:0'"):
        replace(RECIPE, trains="lora:0").on(llama)


def test_experts_are_kept_by_content(llama, glue_rows, monkeypatch):
    first = language_expert(llama, TASKS["sst2"], RECIPE, progress=False)
    monkeypatch.setattr("divmerge_book.models.language.finetuning.fine_tuned", None)
    assert equal(language_expert(llama, TASKS["sst2"], RECIPE, progress=False).state, first.state)
    with pytest.raises(TypeError):  # another recipe is another expert: it would be trained
        language_expert(llama, TASKS["sst2"], replace(RECIPE, lr=1e-5), progress=False)


def test_an_expert_of_another_base_is_refused(llama, glue_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("DIVMERGE_CACHE", str(tmp_path / "cache"))
    language_expert(llama, TASKS["sst2"], RECIPE, progress=False)
    (folder,) = (tmp_path / "cache" / "experts").glob("lm-sst2-*")
    other = load_language(str(save_model(tmp_path, seed=1)))
    for base in (other, replace(llama, vocabulary="other")):
        with pytest.raises(ValueError, match="with other weights or another vocabulary than"):
            load_language_expert(base, folder)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": 0.0}, {"micro": -1}, {"rows": -3}])
def test_recipes_out_of_range_are_refused(llama, wrong):
    with pytest.raises(ValueError, match="1 or more and lr above 0"):
        replace(RECIPE, **wrong).on(llama)
