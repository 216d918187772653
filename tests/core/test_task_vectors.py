"""A state dict becomes one vector and comes back, and task vectors are differences."""

import pytest
import torch
from helpers import INF, NAN, layout_of, refuses
from torch.testing import assert_close

from divmerge_core.merging.task_vectors import Layout, TaskVectors


def state(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Four tensors, one of a single number and one without dimensions."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a.weight": (2, 3), "a.bias": (3,), "b.scale": (1,), "temperature": ()}
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for name, size in sizes.items()
    }


def of(base: dict, **experts: dict) -> TaskVectors:
    return TaskVectors.from_states(base, experts)


def test_tensors_lie_end_to_end_in_a_copy_whose_views_are_the_state_again():
    original = state()
    layout = Layout.of(original)
    assert layout.bounds == ((0, 6), (6, 9), (9, 10), (10, 11)) and layout.size == 11
    flat = layout.flatten(original)
    back = layout.unflatten(flat)
    assert list(back) == list(original)
    assert_close(back, original, rtol=0, atol=0)
    assert torch.equal(layout.flatten(dict(reversed(original.items()))), flat)
    back["a.bias"].fill_(7)
    assert flat[6:9].tolist() == [7, 7, 7] and flat[5] == original["a.weight"][1, 2]
    assert_close(original, state(), rtol=0, atol=0)


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_widened_to_float32_and_float64_is_kept(given):
    weights = state(dtype=given)
    wide = torch.float64 if given == torch.float64 else torch.float32
    assert Layout.of(weights).flatten(weights).dtype == wide


def test_task_vectors_are_differences_with_lengths_and_are_chosen_in_order():
    vectors = of(state(0), one=state(1), two=state(2))
    for number, task in enumerate(vectors.tasks, start=1):
        assert_close(vectors.expert(task), vectors.layout.flatten(state(number)), rtol=0, atol=1e-6)
    by_hand = [sum(x * x for x in row.tolist()) ** 0.5 for row in vectors.deltas]
    assert_close(vectors.norms(), torch.tensor(by_hand))
    chosen = vectors.select(["two", "one"])
    assert chosen.tasks == ("two", "one") and vectors.select(["two"]).deltas.shape == (1, 11)
    assert torch.equal(chosen.deltas, vectors.deltas.flip(0))
    doubled = vectors.map(lambda deltas: 2 * deltas)
    assert torch.equal(doubled.deltas, 2 * vectors.deltas) and doubled.tasks == vectors.tasks
    assert torch.equal(doubled.base, vectors.base)


COUNTS = {
    "seen": torch.tensor(2**24 + 1),
    "mask": torch.tensor([True, False]),
    "packed": torch.tensor([[17, 255]], dtype=torch.uint8),
}


def test_whole_numbers_stay_the_bases_where_all_agree():
    """They are in no vector: float32 has no 2^24 + 1, and half a truth value means nothing."""
    plain = of(state(0), one=state(1))
    counted = of({**state(0), **COUNTS}, one={**COUNTS, **state(1)})
    adapters = {"one": {"a.weight": (torch.ones(2, 1), torch.ones(1, 3))}}
    thin = TaskVectors.from_adapters({**state(0), **COUNTS}, adapters)
    assert counted.layout == thin.layout == plain.layout
    assert torch.equal(counted.deltas, plain.deltas)


@pytest.mark.parametrize("name", COUNTS)
def test_whole_numbers_that_differ_are_refused_by_name(name):
    for other in (~COUNTS[name], COUNTS[name][None]):
        expert = {**state(1), **COUNTS, name: other}
        with refuses(rf"'one': \['{name}'\] of {COUNTS[name].dtype} differ from the base's"):
            of({**state(0), **COUNTS}, one=expert)
    with refuses(rf"the base model holds whole numbers alone, \['{name}'\]: load packed"):
        of({name: COUNTS[name]}, one={name: COUNTS[name]})


def odd(value) -> torch.Tensor:
    return torch.tensor([value])


KINDS = {  # a tensor, its value, and what is said of it; of a base, whole numbers are left out
    "complex": ("a.weight", torch.zeros(2, 3, dtype=torch.complex64), "is .*; give torch.view_as"),
    "float8": ("a.weight", torch.zeros(2, 3).to(torch.float8_e4m3fn), "is .*8_e4m3fn, .*dequanti"),
    "sparse": ("a.weight", torch.eye(3)[:2].to_sparse(), r"is .* torch.sparse_coo; give tensor.to"),
    "meta": ("a.weight", torch.zeros(2, 3, device="meta"), "is on the device meta and .*; load"),
    "integer": ("a.weight", torch.zeros(2, 3, dtype=torch.int8), "is torch.int8: whole numbers"),
    **{str(value): ("b.scale", odd(value), "holds NaN or inf; .* damaged") for value in (NAN, INF)},
    "-inf": ("b.scale", odd(-INF), "holds NaN or inf"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_cannot_be_added_up_are_refused_by_name(kind):
    name, tensor, message = KINDS[kind]
    given = {**state(0), name: tensor}
    with refuses(f"expert 'one': {name} {message}"):
        of(state(0), one=given)
    for make in (lambda: of(given, one=state(1)), lambda: TaskVectors.from_adapters(given, {})):
        if kind != "integer":
            with refuses(f"the base model: {name} {message}"):
                make()


def without(name: str, **others: torch.Tensor) -> dict:
    return {key: value for key, value in {**state(1), **others}.items() if key != name}


PAIR, NAMES = layout_of(a=(2,)), "one or more distinct names, got"
UNFIT = {
    "another name": (
        lambda: of(state(0), one=without("a.bias", gain=torch.ones(3))),
        r"expert 'one' does not match .*missing \['a.bias'\], extra \['gain'\]; load",
    ),
    # the base has no place for it: left out, it would be lost without a word
    "an extra tensor": (
        lambda: of(state(0), one={**state(1), "c.weight": torch.zeros(2)}),
        r"'one' .*missing \[\], extra \['c.weight'\]; load",
    ),
    "another shape": (
        lambda: of(state(0), one={**state(1), "a.weight": torch.zeros(2, 4)}),
        r"'one': a.weight has shape \(2, 4\), the base has \(2, 3\); .* vocabulary",
    ),
    "a count without numbers": (
        lambda: of({**state(0), "seen": torch.tensor(1, device="meta")}, one=state(1)),
        "the base model: seen is on the device meta",
    ),
    "a vector's length": (lambda: PAIR.unflatten(torch.zeros(5)), r"of 2 numbers, got \(5,\)"),
    "no tensor": (lambda: Layout.of({}), "at least one tensor; the state dict given is empty"),
    "an unknown task": (
        lambda: of(state(0), one=state(1), two=state(2)).select(["one", "three"]),
        r"no task vector for \['three'\]; there are one, two",
    ),
    "no task": (lambda: TaskVectors(PAIR, (), torch.zeros(2), torch.zeros(0, 2)), NAMES),
    "a task twice": (lambda: TaskVectors(PAIR, ("a", "a"), torch.zeros(2), torch.eye(2)), NAMES),
    "another layout": (
        lambda: TaskVectors(PAIR, ("one",), torch.zeros(3), torch.zeros(1, 3)),
        r"need base \[2\] and deltas \[1, 2\], got \[3\] and \[1, 3\]",
    ),
    "no expert": (lambda: of(state(0)), "no experts given"),
}


@pytest.mark.parametrize(("make", "message"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_together_is_refused(make, message):
    with refuses(message):
        make()
