"""Vectors: a state dict becomes one vector and comes back, and task vectors are differences."""

import pytest
import torch
from helpers import layout_of
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


@pytest.fixture
def vectors() -> TaskVectors:
    return TaskVectors.from_states(state(0), {"one": state(1), "two": state(2)})


def test_flattening_and_unflattening_give_the_state_back():
    layout = Layout.of(state())
    back = layout.unflatten(layout.flatten(state()))
    assert list(back) == list(state())
    for name, tensor in state().items():
        assert_close(back[name], tensor, rtol=0, atol=0)


def test_tensors_lie_end_to_end():
    layout = Layout.of(state())
    assert layout.bounds == ((0, 6), (6, 9), (9, 10), (10, 11))
    assert layout.size == 11


def test_views_write_into_the_vector():
    layout = Layout.of(state())
    flat = layout.flatten(state())
    layout.unflatten(flat)["a.bias"].fill_(7)
    assert flat[6:9].tolist() == [7, 7, 7]
    assert flat[5] == state()["a.weight"][1, 2]


def test_a_flat_vector_is_a_copy():
    original = state()
    Layout.of(original).flatten(original).zero_()
    assert_close(original, state(), rtol=0, atol=0)


def test_the_order_of_the_state_dict_given_is_immaterial():
    layout = Layout.of(state())
    assert_close(layout.flatten(dict(reversed(state().items()))), layout.flatten(state()))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_weights_are_widened_to_float32_and_float64_is_kept(given, expected):
    weights = state(dtype=given)
    assert Layout.of(weights).flatten(weights).dtype == expected


def test_base_plus_task_vector_is_the_expert(vectors):
    for number, task in enumerate(vectors.tasks, start=1):
        expected = vectors.layout.flatten(state(number))
        assert_close(vectors.expert(task), expected, rtol=0, atol=1e-6)


def test_lengths_are_euclidean(vectors):
    by_hand = [sum(x * x for x in row.tolist()) ** 0.5 for row in vectors.deltas]
    assert_close(vectors.norms(), torch.tensor(by_hand))


def test_tasks_are_chosen_in_the_order_asked_for(vectors):
    chosen = vectors.select(["two", "one"])
    assert chosen.tasks == ("two", "one")
    assert_close(chosen.deltas, vectors.deltas.flip(0))
    assert vectors.select(["two"]).deltas.shape == (1, 11)


def test_a_function_of_the_matrix_makes_new_task_vectors(vectors):
    doubled = vectors.map(lambda deltas: 2 * deltas)
    assert_close(doubled.deltas, 2 * vectors.deltas)
    assert doubled.tasks == vectors.tasks
    assert_close(doubled.base, vectors.base)


# --- what does not fit together -------------------------------------------------------------------


def test_missing_and_extra_tensors_are_named():
    expert = state(1)
    expert["a.gain"] = expert.pop("a.bias")
    with pytest.raises(
        ValueError,
        match=r"expert 'one' does not match .*missing \['a.bias'\], extra \['a.gain'\]; load",
    ):
        TaskVectors.from_states(state(0), {"one": expert})


def test_an_extra_tensor_alone_is_refused():
    """The base has no place for it: left out, it would be lost without a word."""
    with pytest.raises(ValueError, match=r"'one' .*missing \[\], extra \['c.weight'\]; load"):
        TaskVectors.from_states(state(0), {"one": state(1) | {"c.weight": torch.zeros(2)}})


COUNTS = {
    "seen": torch.tensor(2**24 + 1),
    "mask": torch.tensor([True, False]),
    "packed": torch.tensor([[17, 255]], dtype=torch.uint8),
}


def test_whole_numbers_stay_the_bases_where_all_agree():
    """They are in no vector: float32 has no 2^24 + 1, and half a truth value means nothing."""
    plain = TaskVectors.from_states(state(0), {"one": state(1)})
    experts = {"one": {**COUNTS, **state(1)}}
    counted = TaskVectors.from_states({**state(0), **COUNTS}, experts)
    assert counted.layout == plain.layout
    assert torch.equal(counted.deltas, plain.deltas)
    adapters = {"one": {"a.weight": (torch.ones(2, 1), torch.ones(1, 3))}}
    thin = TaskVectors.from_adapters({**state(0), **COUNTS}, adapters)
    assert thin.layout == plain.layout


@pytest.mark.parametrize("name", COUNTS)
def test_whole_numbers_that_differ_are_refused_by_name(name):
    other = {**state(1), **COUNTS, name: ~COUNTS[name]}
    message = rf"expert 'one': \['{name}'\] of {COUNTS[name].dtype} differ from the base's"
    with pytest.raises(ValueError, match=message):
        TaskVectors.from_states({**state(0), **COUNTS}, {"one": other})
    with pytest.raises(ValueError, match=message):
        TaskVectors.from_states(
            {**state(0), **COUNTS}, {"one": {**other, name: COUNTS[name][None]}}
        )


KINDS = {
    "complex": (torch.zeros(2, 3, dtype=torch.complex64), "is torch.complex64; give torch.view_as"),
    "float8": (torch.zeros(2, 3).to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, .*dequantise"),
    "sparse": (torch.eye(3)[:2].to_sparse(), r"is stored as torch.sparse_coo; give tensor.to_d"),
    "meta": (torch.zeros(2, 3, device="meta"), "is on the device meta and holds no numbers; load"),
    "integer": (torch.zeros(2, 3, dtype=torch.int8), "is torch.int8: whole numbers are no weights"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors_that_cannot_be_added_up_are_refused_by_name(kind):
    tensor, message = KINDS[kind]
    odd = state(0) | {"a.weight": tensor}
    with pytest.raises(ValueError, match=f"expert 'one': a.weight {message}"):
        TaskVectors.from_states(state(0), {"one": odd})
    if kind != "integer":  # of a base, whole numbers are left out
        with pytest.raises(ValueError, match=f"the base model: a.weight {message}"):
            TaskVectors.from_states(odd, {"one": state(1)})
        with pytest.raises(ValueError, match=f"the base model: a.weight {message}"):
            TaskVectors.from_adapters(odd, {"one": {}})


def test_counts_without_numbers_are_refused_by_name():
    base = {**state(0), "seen": torch.tensor(1, device="meta")}
    with pytest.raises(ValueError, match="the base model: seen is on the device meta"):
        TaskVectors.from_states(base, {"one": state(1)})


def test_another_shape_is_named_with_both_shapes():
    expert = state(1) | {"a.weight": torch.zeros(2, 4)}
    with pytest.raises(
        ValueError,
        match=r"'one': a.weight has shape \(2, 4\), the base has \(2, 3\); .* vocabulary",
    ):
        TaskVectors.from_states(state(0), {"one": expert})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_refused(value):
    broken = state(1)
    broken["b.scale"][0] = value
    with pytest.raises(ValueError, match="expert 'one': b.scale holds NaN or inf; .* is damaged"):
        TaskVectors.from_states(state(0), {"one": broken})
    with pytest.raises(ValueError, match="the base model: b.scale holds NaN or inf"):
        TaskVectors.from_states(broken, {"one": state(1)})


def test_a_vector_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"expected a vector of 4 numbers, got \(5,\)"):
        layout_of(a=(2, 2)).unflatten(torch.zeros(5))


def test_an_empty_state_dict_is_refused():
    with pytest.raises(ValueError, match="at least one tensor; the state dict given is empty"):
        Layout.of({})


def test_an_unknown_task_is_answered_with_the_choices(vectors):
    with pytest.raises(ValueError, match=r"no task vector for \['three'\]; there are one, two"):
        vectors.select(["one", "three"])


@pytest.mark.parametrize("tasks", [(), ("one", "one")])
def test_tasks_must_be_distinct_and_at_least_one(tasks):
    layout = layout_of(a=(2,))
    with pytest.raises(ValueError, match="one or more distinct names, got"):
        TaskVectors(layout, tasks, torch.zeros(2), torch.zeros(len(tasks), 2))


def test_a_matrix_that_does_not_fit_the_layout_is_refused():
    layout = layout_of(a=(2,))
    with pytest.raises(
        ValueError, match=r"need base \[2\] and deltas \[1, 2\], got \[3\] and \[1, 3\]"
    ):
        TaskVectors(layout, ("one",), torch.zeros(3), torch.zeros(1, 3))
