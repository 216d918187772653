"""Logits are the model's own in every family of causal models, or the model is refused by name."""

from dataclasses import replace

import language_toys
import pytest
import torch
from divmerge_book.evaluation.experiment import prepare_language
from divmerge_book.models.language.agreement import check_forward
from divmerge_book.models.language.completions import greedy
from divmerge_book.models.language.forward import Parts, language_forward
from divmerge_book.models.language.models import Language
from divmerge_book.models.language.reading import collate
from transformers import AutoModelForCausalLM

FAMILIES = {  # with what each does to its logits, made large enough to be seen
    **{name: {} for name in ("llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma", "phi")},
    **{name: {} for name in ("phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "falcon", "bloom")},
    **{name: {} for name in ("mpt", "opt", "stablelm", "olmo", "olmo2", "starcoder2", "smollm3")},
    "gemma2": {"final_logit_softcapping": 1.0, "sliding_window": 3},
    "gemma3_text": {"final_logit_softcapping": 1.0, "sliding_window": 3},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, "sliding_window": 3},
    "nemotron": {},
}
ROWS = [((5, 6, 7), (8, 9)), ((4,), (3,)), ((9, 8, 7, 6), (5, 4, 3))]


def toy(kind: str, **more: object) -> Language:
    """A tiny random model of a family."""
    config = language_toys.family_config(kind, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 10**6
    model.requires_grad_(False)
    return Language(kind, model, language_toys.tokenizer(), "", "")


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_the_models_own_forward_pass(kind):
    base = toy(kind, **FAMILIES[kind])
    check_forward(base)
    batch, _ = collate(base, ROWS)
    with torch.no_grad():
        found = language_forward(base.model)(base.state, [(0, batch)])[0]
        alone = [base.model(torch.tensor([[*asked, *said][:-1]])).logits[0] for asked, said in ROWS]
    wanted = [own[len(asked) - 1 :] for own, (asked, _) in zip(alone, ROWS, strict=True)]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["granite", "gemma2", "opt", "qwen2", "llama"])
def test_gradients_are_those_of_the_models_own_forward_pass(kind):
    base = toy(kind, **FAMILIES[kind])
    batch, tokens = collate(base, ROWS)
    own = {name: tensor.clone().requires_grad_() for name, tensor in base.state.items()}
    logits = language_forward(base.model)(own, [(0, batch)])[0]
    torch.nn.functional.cross_entropy(logits, tokens).backward()
    base.model.requires_grad_(True)
    whole = base.model(**batch.inputs).logits[batch.answer]
    torch.nn.functional.cross_entropy(whole, tokens).backward()
    for name, tensor in base.model.named_parameters():
        torch.testing.assert_close(own[name].grad, tensor.grad, msg=name)


@pytest.mark.parametrize("kind", ["granite", "bloom", "gpt2"])
def test_what_is_written_is_what_the_model_would_write(kind):
    base = toy(kind, **FAMILIES[kind])
    prompts, wanted = [(5, 6, 7), (9,)], []
    for prompt in prompts:
        row, most = list(prompt), len(prompt) + 4
        while len(row) < most and (len(row) == len(prompt) or row[-1] != base.stop):
            with torch.no_grad():
                row.append(base.model(torch.tensor([row])).logits[0, -1].argmax().item())
        wanted.append(tuple(row[len(prompt) :]))
    assert greedy(base, base.state, prompts, max_new=4) == wanted


def test_a_model_whose_logits_are_not_its_own_is_refused_before_anything_is_trained(
    llama_folder, glue_rows, monkeypatch
):
    base = toy("granite", **FAMILIES["granite"])

    def unscaled(self, parameters, hidden):
        return 4 * hidden @ parameters["model.embed_tokens.weight"].T

    monkeypatch.setattr(Parts, "words", unscaled)
    with pytest.raises(ValueError, match="'granite' is a GraniteForCausalLM, of which.*differ by"):
        check_forward(base)
    size = replace(language_toys.SIZE, base=str(llama_folder))
    with pytest.raises(ValueError, match="is a LlamaForCausalLM, of which.*differ by"):
        prepare_language("glue", ["sst2", "cola"], size=size, progress=False)


def test_a_family_that_works_otherwise_is_refused_by_name():
    with pytest.raises(ValueError, match="'rwkv' is a RwkvForCausalLM, of which the logits"):
        check_forward(toy("rwkv", attention_hidden_size=32))
    with pytest.raises(ValueError, match="LlamaModel has no body and output matrix of its own"):
        Parts.of(toy("llama").model.model)


def leaves(base):
    return {name: tensor.clone().requires_grad_() for name, tensor in base.state.items()}


def test_recomputed_activations_give_the_same_gradients(llama):
    batch, tokens = collate(llama, ROWS)
    found = []
    for checkpointing in (False, True):
        own = leaves(llama)
        forward = language_forward(llama.model, checkpointing=checkpointing)
        logits = forward(own, [(0, batch), (1, batch)])
        sum(torch.nn.functional.cross_entropy(one, tokens) for one in logits).backward()
        found.append([leaf.grad for leaf in own.values()])
    torch.testing.assert_close(*found)


def test_bfloat16_products_leave_logits_and_gradients_in_float32(llama):
    batch, _ = collate(llama, ROWS)
    own = leaves(llama)
    logits = language_forward(llama.model, precision="bfloat16")(own, [(0, batch)])[0]
    logits.sum().backward()
    assert logits.dtype == torch.float32
    assert {leaf.grad.dtype for leaf in own.values()} == {torch.float32}
