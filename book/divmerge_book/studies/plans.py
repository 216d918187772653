"""The studies of the chapter beyond one vector, by name: what each runs at which size."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from divmerge_book.evaluation.experiment import SIZES, Experiment, Size, prepare, task_names
from divmerge_book.studies.clustering import mixture
from divmerge_book.studies.continual_merging import arrivals
from divmerge_book.studies.corrupted_experts import pools
from divmerge_book.studies.inference_cost import fusion, storage
from divmerge_book.studies.margins import majorities, of_lists, scored
from divmerge_book.studies.searches import searches
from divmerge_core.registry import Registry

STUDIES = Registry("study")  # name -> function(Plan) -> table
SMALL = "bert_tiny"  # the encoder of studies that ask for many scores


@dataclass(frozen=True)
class Plan:
    """What the studies run on, and how much of it.

    large: the encoder that small experts steer. tasks: of the suite. seeds: of experts; arrivals,
    mixture and storage take the first. orders: of arrivals. rows: test rows per task, where a study
    scores many merges; scored: of the others. shares: of corrupted experts. policy: draws that a
    policy learns from, on `looked` validation rows per task. calls: scores per task of every search
    for paths, on `searched` validation rows; further counts of rows are searched at the first seed.
    repeats: of every timing. options: of methods that learn, in the storage study.
    """

    suite: str
    encoder: str
    large: str
    tasks: tuple[str, ...]
    size: str
    seeds: tuple[int, ...]
    orders: int
    device: str = "cpu"
    rows: int = 64
    scored: int = 100
    zetas: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, math.inf)
    sigmas: tuple[float, ...] = (0.25, 0.5)
    draws: int = 3
    shares: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    policy: int = 100
    looked: int = 25
    calls: int = 97
    searched: tuple[int, ...] = (32, 128)
    repeats: int = 7
    options: Mapping[str, Mapping] = field(default_factory=dict)

    def bench(self, seed: int, *, small: bool = False, **rows: int) -> Experiment:
        """A bench of this plan; small: of the small encoder. rows: per task, as in Size."""
        size: Size = SIZES[self.size]
        if small and self.size != "full":  # its experts are those of size smoke
            quick = SIZES["smoke"]
            size = replace(size, recipe=quick.recipe, glue_recipe=quick.glue_recipe)
        given = {"merge_rows": 32, "validation_rows": 32, "test_rows": self.rows, **rows}
        return prepare(
            self.suite,
            self.tasks,
            size=replace(size, **given),
            seed=seed,
            device=self.device,
            encoder=SMALL if small else self.encoder,
        )


LEAN = {
    "divmerge/layer": {"epochs": 2, "inputs": 16},
    "esm_pp": {"inputs": 16},
    "surgery": {"steps": 100},
    "wemoe": {"steps": 20},
    "twin": {"steps": 200},
    "dp_mixture": {"zeta": 0.1},
    "layer_evolution": {"steps": 2},
}
FULL = {
    "divmerge/layer": {"epochs": 4, "inputs": 100},
    "wemoe": {"steps": 150},
    "dp_mixture": {"zeta": 0.1},
    "layer_evolution": {"steps": 8},
}
EFFORTS: Mapping[str, Mapping] = {
    "smoke": {
        **{"orders": 2, "rows": 40, "scored": 40, "zetas": (0.0, 0.1, math.inf), "sigmas": (0.25,)},
        **{"draws": 1, "shares": (0.0, 0.4), "policy": 12, "looked": 16, "calls": 9},
        **{"searched": (16,), "repeats": 2, "options": LEAN},
    },
    "default": {
        **{"orders": 2, "rows": 40, "scored": 40, "sigmas": (0.25,), "draws": 2},
        **{"shares": (0.0, 0.4), "policy": 60, "calls": 33, "searched": (32,), "repeats": 3},
        **{"options": LEAN},
    },
    "full": {"orders": 10, "options": FULL},
}
FEW = {"smoke": 3, "default": 4}  # tasks, where none are named


def plan(
    suite: str,
    *,
    size: str = "default",
    encoder: str | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    orders: int | None = None,
    device: str = "cpu",
) -> Plan:
    """The plan of a size: the given values, and the size's own for what is None or empty.

    Where no encoder is named, all but `full` run on the small one, but for fusion's large model.
    Raises ValueError for an unknown suite, task or size.
    """
    settings, every = SIZES[size], task_names(suite, tasks or None)
    if size not in EFFORTS:
        raise ValueError(f"the studies know the sizes {', '.join(EFFORTS)}, not {size!r}")
    effort = {**EFFORTS[size], **({"orders": orders} if orders else {})}
    names = tuple(every if tasks else every[: FEW.get(size)])
    own = tuple(seeds or settings.seeds)
    large = encoder or settings.encoder
    encoder = large if encoder or size == "full" else SMALL
    return Plan(suite, encoder, large, names, size, own, device=device, **effort)


@STUDIES.register("arrivals", label="Experts that arrive one at a time")
def run_arrivals(plan: Plan) -> pd.DataFrame:
    return arrivals(plan.bench(plan.seeds[0]), count=plan.orders)


@STUDIES.register("mixture", label="Several merged models")
def run_mixture(plan: Plan) -> pd.DataFrame:
    bench = plan.bench(plan.seeds[0])
    return mixture(bench, zetas=plan.zetas, sigmas=plan.sigmas, draws=plan.draws)


@STUDIES.register("pools", label="Corrupted pools")
def run_pools(plan: Plan) -> pd.DataFrame:
    others = (*plan.seeds[1:], plan.seeds[0] if len(plan.seeds) > 1 else plan.seeds[0] + 1)
    benches = {}
    for seed, other in zip(plan.seeds, others, strict=True):
        bench = plan.bench(seed, small=True, validation_rows=plan.looked)
        benches[seed] = bench, plan.bench(other, small=True)
    return pools(benches, shares=plan.shares, steps=plan.policy)


@STUDIES.register("evolution", label="Searches for paths")
def run_evolution(plan: Plan) -> pd.DataFrame:
    first, *more = plan.searched
    keys = [(seed, first) for seed in plan.seeds] + [(plan.seeds[0], count) for count in more]
    rows = {"test_rows": plan.scored}
    benches = {key: plan.bench(key[0], small=True, validation_rows=key[1], **rows) for key in keys}
    return searches(benches, calls=plan.calls)


@STUDIES.register("fusion", label="A large model steered by small ones")
def run_fusion(plan: Plan) -> pd.DataFrame:
    tables = []
    for seed in plan.seeds:
        wide = replace(plan, encoder=plan.large).bench(seed, test_rows=plan.scored)
        pair = plan.bench(seed, small=True, test_rows=plan.scored), wide
        tables.append(fusion(*pair, repeats=plan.repeats).assign(seed=seed))
    return pd.concat(tables, ignore_index=True)


@STUDIES.register("storage", label="Bytes, time and accuracy")
def run_storage(plan: Plan) -> pd.DataFrame:
    bench = plan.bench(plan.seeds[0], merge_rows=100, test_rows=plan.scored)
    return storage(bench, options=plan.options, repeats=plan.repeats)


def facts_of(name: str, plan: Plan) -> dict:
    """What a study runs on, and how much of it."""
    plain = ("suite", "encoder", "large", "size", "orders", "device", "rows", "scored")
    facts = {key: getattr(plan, key) for key in (*plain, "policy", "looked", "calls", "repeats")}
    lists = {key: list(getattr(plan, key)) for key in ("tasks", "seeds", "searched")}
    return {"study": name, "small": SMALL, **facts, **lists}


def caption(facts: Mapping) -> str:
    """One line of provenance for a study's figure or table."""
    name, seeds = facts["study"], facts["seeds"]
    large = facts.get("large", facts["encoder"])
    encoder = {"fusion": f"{facts['small']} and {large}"}.get(name, facts["encoder"])
    encoder = facts["small"] if name in ("pools", "evolution") else encoder
    one = name in ("arrivals", "mixture", "storage")
    few = 1 if one else len(seeds)
    rows = facts["scored" if name in ("evolution", "fusion", "storage") else "rows"]
    return (
        f"{encoder}, {facts['suite']}, T = {len(facts['tasks'])}, {facts['size']} size, {few} "
        f"seed{'s' * (few > 1)} of experts, {rows} test rows a task, {facts['device']}, "
        f"{facts['machine']}, torch {facts['torch']}, measured {facts['date']}"
    )


def with_margins(name: str, table: pd.DataFrame, facts: Mapping) -> pd.DataFrame:
    """A study's table with the columns of `margins`, where it holds accuracies by task."""
    if name not in ("arrivals", "fusion"):
        return of_lists(table, [facts["tasks"]] * len(table))
    majority = majorities(facts["tasks"], facts["scored" if name == "fusion" else "rows"])
    if name == "fusion":
        own = table[table.model == "large expert"][["seed", "task", "accuracy"]]
        table = table.merge(own.rename(columns={"accuracy": "expert"}), on=["seed", "task"])
    return scored(table, majority)


def run(name: str, plan: Plan) -> dict[str, pd.DataFrame]:
    """One study's table, as `rows`."""
    study: Callable[[Plan], pd.DataFrame] = STUDIES[name]
    return {"rows": study(plan)}
