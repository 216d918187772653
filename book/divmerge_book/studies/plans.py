"""The studies of the chapter beyond one vector, by name, and what each runs at which size."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd

from divmerge_book.evaluation.experiment import SIZES, Experiment, prepare, task_names
from divmerge_book.studies.clustering import mixture
from divmerge_book.studies.continual_merging import continual_merging
from divmerge_book.studies.corrupted_experts import corrupted_pools
from divmerge_book.studies.inference_cost import inference_cost, proxy_tuning
from divmerge_book.studies.margins import majorities, of_lists, scored
from divmerge_book.studies.searches import compare_searches
from divmerge_book.studies.sizes import settings
from divmerge_core.registry import Registry

STUDIES = Registry("study")  # name -> function(plan) -> table
SMALL = "bert_tiny"  # the encoder of studies that need many scores


def plan(
    suite: str,
    *,
    size: str = "default",
    encoder: str | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    device: str = "cpu",
    **own: object,
) -> SimpleNamespace:
    """What the studies run on: suite, encoder, tasks, seeds and the `beyond` settings of a size.

    own: settings that replace the size's where they are not empty. large: the encoder that small
    experts steer. Where no encoder is named, all studies but that one use the small encoder, except
    at size `full`. Raises ValueError for an unknown suite, task or size.
    """
    found, every = settings("beyond", size, **own), task_names(suite, tasks or None)
    found.suite, found.size, found.device = suite, size, device
    found.tasks = tuple(every if tasks else every[: found.few])
    found.seeds = tuple(seeds or SIZES[size].seeds)
    found.large = encoder or SIZES[size].encoder
    found.encoder = found.large if encoder or size == "full" else SMALL
    return found


def experiment(
    plan: SimpleNamespace, seed: int, encoder: str | None = None, **rows: int
) -> Experiment:
    """An experiment of this plan. rows: per task, as in Size.

    encoder: the plan's if not given; the small encoder's experts have size smoke, except at full.
    """
    size = SIZES[plan.size]
    if encoder == SMALL and plan.size != "full":
        quick = SIZES["smoke"]
        size = replace(size, recipe=quick.recipe, glue_recipe=quick.glue_recipe)
    given = {"merge_rows": 32, "validation_rows": 32, "test_rows": plan.rows, **rows}
    return prepare(
        plan.suite,
        plan.tasks,
        size=replace(size, **given),
        seed=seed,
        device=plan.device,
        encoder=encoder or plan.encoder,
    )


@STUDIES.register("arrivals", label="Experts that arrive one at a time")
def run_arrivals(plan: SimpleNamespace) -> pd.DataFrame:
    return continual_merging(experiment(plan, plan.seeds[0]), count=plan.orders)


@STUDIES.register("mixture", label="Several merged models")
def run_mixture(plan: SimpleNamespace) -> pd.DataFrame:
    one = experiment(plan, plan.seeds[0])
    return mixture(one, zetas=plan.zetas, sigmas=plan.sigmas, draws=plan.draws)


@STUDIES.register("pools", label="Corrupted pools")
def run_pools(plan: SimpleNamespace) -> pd.DataFrame:
    others = (*plan.seeds[1:], plan.seeds[0] if len(plan.seeds) > 1 else plan.seeds[0] + 1)
    pairs = {
        seed: (
            experiment(plan, seed, SMALL, validation_rows=plan.looked),
            experiment(plan, other, SMALL),
        )
        for seed, other in zip(plan.seeds, others, strict=True)
    }
    return corrupted_pools(pairs, shares=plan.shares, steps=plan.policy)


@STUDIES.register("evolution", label="Searches for paths")
def run_evolution(plan: SimpleNamespace) -> pd.DataFrame:
    first, *more = plan.searched
    keys = [(seed, first) for seed in plan.seeds] + [(plan.seeds[0], count) for count in more]
    experiments = {
        (seed, count): experiment(plan, seed, SMALL, validation_rows=count, test_rows=plan.scored)
        for seed, count in keys
    }
    return compare_searches(experiments, calls=plan.calls)


@STUDIES.register("fusion", label="A large model steered by small ones")
def run_fusion(plan: SimpleNamespace) -> pd.DataFrame:
    tables = []
    for seed in plan.seeds:
        pair = (experiment(plan, seed, name, test_rows=plan.scored) for name in (SMALL, plan.large))
        tables.append(proxy_tuning(*pair, seed=seed, repeats=plan.repeats))
    return pd.concat(tables, ignore_index=True)


@STUDIES.register("storage", label="Bytes, time and accuracy")
def run_storage(plan: SimpleNamespace) -> pd.DataFrame:
    one = experiment(plan, plan.seeds[0], merge_rows=100, test_rows=plan.scored)
    return inference_cost(one, options=plan.options, repeats=plan.repeats)


def facts_of(name: str, plan: SimpleNamespace) -> dict:
    """What a study runs on, and how much of it."""
    plain = ("suite", "encoder", "large", "size", "orders", "device", "rows", "scored")
    facts = {key: getattr(plan, key) for key in (*plain, "policy", "looked", "calls", "repeats")}
    lists = {key: list(getattr(plan, key)) for key in ("tasks", "seeds", "searched")}
    return {"study": name, "small": SMALL, **facts, **lists}


def used(facts: Mapping) -> dict:
    """The encoder and the seeds that a study used of those that its run had."""
    name, large = facts["study"], facts.get("large", facts["encoder"])
    encoder = {
        "fusion": f"{facts['small']} and {large}",
        **dict.fromkeys(("pools", "evolution"), facts["small"]),
    }.get(name, facts["encoder"])
    few = 1 if name in ("arrivals", "mixture", "storage") else None
    return {"encoder": encoder, "seeds": facts["seeds"][:few]}


def caption(facts: Mapping) -> str:
    """One line of provenance for a study's figure or table."""
    name, (encoder, seeds) = facts["study"], used(facts).values()
    few = len(seeds)
    rows = facts["scored" if name in ("evolution", "fusion", "storage") else "rows"]
    return (
        f"{encoder}, {facts['suite']}, T = {len(facts['tasks'])}, {facts['size']} size, {few} "
        f"seed{'s' * (few > 1)} of experts, {rows} test rows a task, {facts['device']}, "
        f"{facts['machine']}, torch {facts['torch']}, measured {facts['date']}"
    )


def with_margins(name: str, table: pd.DataFrame, facts: Mapping) -> pd.DataFrame:
    """A study's table with the columns of `margins`, where it has accuracies by task."""
    if name not in ("arrivals", "fusion"):
        return of_lists(table, [facts["tasks"]] * len(table))
    majority = majorities(facts["tasks"], facts["scored" if name == "fusion" else "rows"])
    if name == "fusion":
        own = table[table.model == "large expert"][["seed", "task", "accuracy"]]
        table = table.merge(own.rename(columns={"accuracy": "expert"}), on=["seed", "task"])
    return scored(table, majority)


def run(name: str, plan: SimpleNamespace) -> dict[str, pd.DataFrame]:
    """One study's table, as `rows`."""
    return {"rows": STUDIES[name](plan)}
