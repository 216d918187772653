"""Splits: disjoint by text, deterministic, of the right sizes, for single texts and for pairs."""

import random

import pytest
from divmerge_book.data import splits
from hypothesis import given, settings
from hypothesis import strategies as st

SMALL = {"test": 6, "validation": 4, "merge": 5}


@pytest.fixture(autouse=True, scope="module")
def small_sizes():
    """A few rows per split, so that small examples fill them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "ROWS", SMALL)
        yield


texts = st.sampled_from([f"{case} {n}" for case in ("a", "A", " a ") for n in range(40)])
answers = st.sampled_from(["yes", "no"])
singles = st.lists(st.tuples(texts, st.none(), answers), max_size=80)
pairs = st.lists(st.tuples(texts, texts, answers), max_size=80)


def owners(found: splits.Splits) -> dict[str, set[str]]:
    """Which splits each text stands in."""
    places: dict[str, set[str]] = {}
    for split, rows in found.items():
        for first, second, _ in rows:
            for text in filter(None, (first, second)):
                places.setdefault(splits.normal(text), set()).add(split)
    return places


def keys(rows) -> list[tuple]:
    return [(splits.normal(first), second and splits.normal(second)) for first, second, _ in rows]


def pair_rows(count: int, *, shared: int = 1) -> list[splits.Row]:
    """Pairs in which every first text meets `shared` second texts of its own."""
    return [
        (f"question {n}", f"passage {n} {k}", ("yes", "no")[k % 2])
        for n in range(count // shared)
        for k in range(shared)
    ]


def contradictory(rows: list[splits.Row]) -> set[tuple]:
    """Keys of texts that come with two answers."""
    first: dict[tuple, str] = {}
    return {
        key
        for key, (*_, answer) in zip(keys(rows), rows, strict=True)
        if first.setdefault(key, answer) != answer
    }


@settings(deadline=None, max_examples=40)
@given(rows=st.one_of(singles, pairs), seed=st.integers(0, 3))
def test_no_text_stands_in_two_splits_no_row_twice_and_contradictions_are_dropped(rows, seed):
    found = splits.split_rows(rows, seed=seed)
    assert tuple(found) == splits.SPLITS
    assert all(len(places) == 1 for places in owners(found).values())
    every = [row for chosen in found.values() for row in chosen]
    assert set(every) <= set(rows)
    assert len(keys(every)) == len(set(keys(every)))
    assert not set(keys(every)) & contradictory(rows)


@settings(deadline=None, max_examples=30)
@given(rows=st.one_of(singles, pairs), held=st.one_of(singles, pairs))
def test_held_out_rows_are_tested_and_never_trained_on(rows, held):
    found = splits.split_rows(rows, held)
    assert all(len(places) == 1 for places in owners(found).values())
    if set(keys(held)) - contradictory([*held, *rows]):
        assert set(keys(found["test"])) <= set(keys(held))
    for split in ("train", "validation", "merge"):
        assert not set(keys(found[split])) & set(keys(held))


def test_splits_are_filled_to_their_size_and_depend_on_the_seed():
    rows = [(f"text {n}", None, ("yes", "no")[n % 2]) for n in range(60)]
    found = splits.split_rows(rows)
    assert found == splits.split_rows(rows) != splits.split_rows(rows, seed=1)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 45, **SMALL}
    shared = splits.split_rows(pair_rows(120, shared=2))  # rows that share a text stay together
    assert {split: len(shared[split]) for split in SMALL} == SMALL
    assert all(len(places) == 1 for places in owners(shared).values())


def test_case_and_spacing_make_no_new_text():
    found = splits.split_rows([("Good  film", None, "yes"), ("good film", None, "yes")] * 3)
    assert sum(map(len, found.values())) == 1


def test_components_follow_chains_of_shared_texts():
    rows = [(*pair.split(), "yes") for pair in ("a b", "c d", "D e", "b f", "g h")]
    assert sorted(map(sorted, splits.components(rows))) == [[0, 3], [1, 2], [4]]


def tangle(count: int = 400) -> list[splits.Row]:
    """Pairs over few texts: all hang together."""
    generator = random.Random(0)
    drawn = {(generator.randrange(60), generator.randrange(60)) for _ in range(count)}
    return [(f"q {a}", f"p {b}", ("yes", "no")[(a + b) % 2]) for a, b in sorted(drawn)]


def test_where_all_rows_hang_together_texts_are_dealt_out_and_stay_disjoint():
    rows = tangle()
    assert len(splits.components(rows)) == 1
    found = splits.split_rows(rows)
    assert found == splits.split_rows(rows)
    assert all(found[split] for split in splits.SPLITS)
    assert all(len(found[split]) <= size for split, size in SMALL.items())
    assert all(len(places) == 1 for places in owners(found).values())
    dealt = splits.deal_texts(rows, random.Random(0))
    assert sum(map(len, dealt.values())) < len(rows)
    assert all(len(places) == 1 for places in owners(dealt).values())


def test_held_out_rows_alone_are_tested_even_where_all_other_rows_hang_together():
    held = pair_rows(5)
    found = splits.split_rows(tangle(), held)
    assert sorted(found["test"]) == sorted(held)
    assert not set(keys(held)) & set(keys([*found["train"], *found["merge"], *found["validation"]]))
    assert found["train"] and found["merge"]


def test_rows_that_share_a_text_with_a_held_out_row_are_dropped():
    rows = [*pair_rows(30), ("question held", "passage 3 0", "yes")]
    found = splits.split_rows(rows, [("question held", "passage held", "no")])
    assert found["test"] == [("question held", "passage held", "no")]
    assert "passage 3 0" not in owners(found) and owners(found)["question held"] == {"test"}


@pytest.mark.parametrize("count", range(4))
def test_a_handful_of_rows_is_split_without_complaint(count):
    found = splits.split_rows([(f"text {n}", None, "yes") for n in range(count)])
    assert len(found["test"]) == count
