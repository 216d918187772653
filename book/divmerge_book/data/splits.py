"""Four disjoint splits of labelled texts, for single texts and for pairs that share texts."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

SPLITS = ("train", "validation", "merge", "test")
ROWS = {"test": 500, "validation": 300, "merge": 400}  # at most; train takes the rest

Row = tuple[str, str | None, str]  # text, second text of a pair task, answer
Splits = dict[str, list[Row]]


def normal(text: str) -> str:
    """A text with case and spacing removed: what counts as the same text."""
    return " ".join(text.lower().split())


def components(rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers in groups: rows that share a text, directly or through others, are together."""
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        while parent.setdefault(text, text) != text:
            parent[text] = text = parent[parent[text]]
        return text

    for first, second, _ in rows:
        if second is not None:
            parent[root(normal(first))] = root(normal(second))
    groups = defaultdict(list)
    for number, (first, *_) in enumerate(rows):
        groups[root(normal(first))].append(number)
    return list(groups.values())


def deal_texts(rows: Sequence[Row], generator: random.Random) -> Splits:
    """Deal every text to a split and keep the rows whose two texts were dealt to the same one.

    A split's share of texts is the square root of its share of rows, as a row needs both its texts.
    """
    texts = sorted({normal(text) for row in rows for text in row[:2]})
    shares = {split: (1.1 * size / len(rows)) ** 0.5 for split, size in ROWS.items()}
    shares["train"] = max(0.0, 1 - sum(shares.values()))
    dealt = generator.choices(list(shares), list(shares.values()), k=len(texts))
    hand = dict(zip(texts, dealt, strict=True))
    splits: Splits = {split: [] for split in SPLITS}
    for row in rows:
        if hand[normal(row[0])] == hand[normal(row[1])]:
            splits[hand[normal(row[0])]].append(row)
    return splits


def split_rows(rows: Iterable[Row], held_out: Iterable[Row] = (), *, seed: int = 0) -> Splits:
    """Deterministic, disjoint splits of ROWS' sizes; duplicates and contradictions are dropped.

    Rows that share a text stay together; where that ties most rows to each other, texts are dealt
    out instead (`deal_texts`). Where `held_out` rows are given, test is drawn from them, and other
    rows that share a text with them are dropped.
    """
    kept: dict[tuple, tuple[Row, bool]] = {}
    clash = set()
    for is_held, source in ((True, held_out), (False, rows)):
        for row in source:
            key = (normal(row[0]), row[1] and normal(row[1]))  # the same texts, in any case
            if key in kept and kept[key][0][2] != row[2]:
                clash.add(key)
            kept.setdefault(key, (row, is_held))
    flagged = [entry for key, entry in kept.items() if key not in clash]
    every = [row for row, _ in flagged]
    generator = random.Random(seed)
    splits: Splits = {split: [] for split in SPLITS}
    groups, room = [], dict(ROWS)
    for group in components(every):
        tested = [every[number] for number in group if flagged[number][1]]
        splits["test"] += tested
        if not tested:
            groups.append(group)
    if splits["test"]:
        del room["test"]
    generator.shuffle(groups)
    if max(map(len, groups), default=0) > max(1, len(every) / 4):
        held = splits["test"]
        free = [every[number] for group in groups for number in group] if held else every
        splits, groups = deal_texts(free, generator), []
        splits["test"] = held or splits["test"]
    for group in groups:
        wanted = (split for split, size in room.items() if len(splits[split]) < size)
        splits[next(wanted, "train")] += [every[number] for number in group]
    for split, chosen in splits.items():
        generator.shuffle(chosen)
        splits[split] = chosen[: ROWS.get(split)]
    return splits
