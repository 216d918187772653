"""Whom merging loses and whom it wins, how sure it is of itself, and what its layers still hold.

Rows are known by their number in the task's test split; no text is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from divmerge_book.data.tasks import TASKS
from divmerge_book.evaluation.experiment import Experiment, Size
from divmerge_book.evaluation.hyperparameter_search import Merges, candidates, search
from divmerge_book.evaluation.statistics import chance_error, crossed, reliability, row_means
from divmerge_book.interference.behaviour import (
    answers,
    confidence,
    flips,
    margin,
)
from divmerge_book.interference.representation import cka, common_share, hidden_states, shift
from divmerge_book.models.encoders import make_batches
from divmerge_book.studies.corrupted_experts import auc
from divmerge_book.studies.landscapes import kept, some
from divmerge_core.methods import METHODS, parse

MERGES = ("average", "task_arithmetic", "divmerge/task", "divmerge/layer")
MODELS = ("expert", "base", *MERGES)


def row_numbers(bench: Experiment, task: int) -> list[int]:
    """The place in the test split of every row of a task's test exam, in the exam's order."""
    expert = bench.experts[task]
    data = TASKS[expert.task].load("test").select(range(len(bench.test[task].gold)))
    length = expert.manifest["recipe"]["max_length"]
    return make_batches(data, bench.base, batch_size=64, max_length=length)[1].tolist()


def texts(task: str, rows: Sequence[int]) -> list[str]:
    """The inputs at these places of a task's test split, to be shown and not to be stored."""
    data = TASKS[task].load("test")
    columns = [name for name in ("text", "pair") if name in data.column_names]
    return [" / ".join(data[row][name] for name in columns) for row in rows]


@dataclass
class Witness:
    """Asks models on a bench, and compares them with the experts, whom it asks once.

    rows: of every task's test exam, on which layers are compared; answers are those of all.
    """

    bench: Experiment
    rows: int
    known: dict[int, Tensor] = field(default_factory=dict)

    def states(self, flat: Float[Tensor, " N"], task: int) -> Float[Tensor, "L B H"]:
        return hidden_states(self.bench.problem, flat, some(self.bench.test[task], self.rows))

    def layers(self, flat: Float[Tensor, " N"], task: int) -> dict[str, list[float]]:
        """cka, shift and common of every layer, embeddings first."""
        if task not in self.known:
            vectors = self.bench.problem.vectors
            self.known[task] = self.states(vectors.expert(vectors.tasks[task]), task)
        pairs = list(zip(self.known[task], self.states(flat, task), strict=True))
        measures = {"cka": cka, "shift": shift, "common": common_share}
        return {name: [round(f(x, y), 5) for x, y in pairs] for name, f in measures.items()}

    def asked(self, flat: Float[Tensor, " N"] | None) -> list[dict]:
        """A model's answers on every task; flat: None asks every task's own expert.

        A row per task, lists in the exam's order: right (0 or 1) and sure (confidence, in
        thousandths). For an expert also margin (thousandths) and row, the place in the test split;
        for others the layers' cka, shift and common.
        """
        problem, found = self.bench.problem, []
        for number, task in enumerate(problem.vectors.tasks):
            exam = self.bench.test[number]
            own = problem.vectors.expert(task) if flat is None else flat
            logits = answers(problem, own, number, exam)
            row = {"task": task, "right": (logits.argmax(-1) == exam.gold).int().tolist()}
            row["sure"] = (1000 * confidence(logits)).round().int().tolist()
            if flat is None:
                row["margin"] = (1000 * margin(logits)).round().int().tolist()
                row["row"] = row_numbers(self.bench, number)
            else:
                row |= self.layers(flat, number)
            found.append(row)
        return found


def chosen(bench: Experiment, size: Size, seed: int) -> dict[str, dict]:
    """The options of every merge, chosen on validation rows; task arithmetic tries all scales."""
    found = {}
    for spec in MERGES:
        wanted = replace(size, candidates=None) if spec == "task_arithmetic" else size
        tried = candidates(spec, wanted, seed, {}, bench.problem)
        found[spec] = tried[search(Merges(bench, spec), tried).best]
    return found


def merged(bench: Experiment, spec: str, options: Mapping) -> Float[Tensor, " N"]:
    quiet = {"progress": False} if (name := parse(spec)[0]) == "divmerge" else {}
    return METHODS[name](bench.problem, **options, **quiet)


def ask(benches: Mapping[int, Experiment], size: Size, *, rows: int) -> pd.DataFrame:
    """Every model of MODELS asked on every bench: a row per seed, model and task.

    benches: by seed of experts. rows: test rows per task on which layers are compared. Columns:
    seed, model, task, and the lists of `Witness.asked`. Options are chosen at the first seed and
    used for all.
    """
    parts, options = [], {}
    for seed, bench in benches.items():
        witness, base = Witness(bench, rows), bench.problem.vectors.base
        options = options or chosen(bench, size, seed)
        for model in (bar := tqdm(MODELS, f"asking, seed {seed}", leave=False)):
            bar.set_postfix_str(model)
            own = {key: seed if key == "seed" else v for key, v in options.get(model, {}).items()}

            def find(model=model, own=own, bench=bench, witness=witness, base=base) -> list[dict]:
                flat = {"expert": None, "base": base}
                return witness.asked(flat[model] if model in flat else merged(bench, model, own))

            part = kept(bench, find, "answers and layers", model, own, rows)
            parts.append(part.assign(seed=seed, model=model))
    return pd.concat(parts, ignore_index=True)


def told(table: pd.DataFrame, model: str, name: str) -> list[list[Tensor]]:
    """A list column of a model, `[seed][task] -> [B]`."""
    seeds = table[table.model == model].groupby("seed", sort=False)
    return [[torch.tensor(values) for values in rows[name]] for _, rows in seeds]


def turned(table: pd.DataFrame) -> pd.DataFrame:
    """What every merge loses and gains: seed, model, task, rows, lost, gained, net, gross (shares).

    table: of `ask`. Accuracy of the merge minus the expert's is net = gained - lost.
    """
    rows, tasks = [], list(dict.fromkeys(table.task))
    seeds, experts = list(dict.fromkeys(table.seed)), told(table, "expert", "right")
    for model in (name for name in dict.fromkeys(table.model) if name != "expert"):
        for seed, own, answered in zip(seeds, experts, told(table, model, "right"), strict=True):
            for task, before, after in zip(tasks, own, answered, strict=True):
                found = flips(before.bool(), after.bool())
                row = {"seed": seed, "model": model, "task": task, "rows": len(before)}
                row |= {"lost": found.lost.double().mean().item()}
                row |= {"gained": found.gained.double().mean().item()}
                rows.append(row | {"net": found.net, "gross": found.gross})
    return pd.DataFrame(rows)


def resampled(table: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean over tasks of lost, gained and net, with 95 % intervals: model, what, value, low, high.

    table: of `ask`. Each draw resamples every task's rows, the same ones for all seeds and models;
    see `statistics.crossed`. With one seed only rows vary. Raises ValueError where seeds asked
    about different rows.
    """
    generator, models = np.random.default_rng(seed), [*dict.fromkeys(table.model)]
    models.remove("expert")
    asked = told(table, "expert", "row")
    if any(not torch.equal(a, b) for own in asked for a, b in zip(own, asked[0], strict=True)):
        raise ValueError(
            "seeds were asked about different rows; give a table of the same test rows"
        )
    stacked = {model: told(table, model, "right") for model in ["expert", *models]}
    tasks, total = [], 0
    for task in range(len(asked[0])):
        gaps = torch.stack(
            [
                own[task] - before[task]
                for model in models
                for own, before in zip(stacked[model], stacked["expert"], strict=True)
            ],
            dim=1,
        ).numpy()  # [B, models x seeds]
        columns = np.concatenate([gaps < 0, gaps > 0, gaps], axis=1).astype(float)
        means = row_means(columns, draws, generator)
        tasks.append(means.reshape(1 + draws, 3, len(models), len(asked)))
        total += len(gaps)
    found = np.moveaxis(np.mean(tasks, axis=0), -1, 0)  # [S, 1 + draws, 3, M]
    every = crossed(found[:, 0], found[:, 1:], total - len(tasks))
    low, high = every.interval()
    return pd.DataFrame(
        [
            {"model": model, "what": what, "value": every.value[k, n]}
            | {"low": low[k, n], "high": high[k, n]}
            for n, model in enumerate(models)
            for k, what in enumerate(("lost", "gained", "net"))
        ]
    )


def by_margin(table: pd.DataFrame, *, parts: int = 5) -> pd.DataFrame:
    """Who is lost, by how sure the expert was: model, part, margin, lost; and auc per model.

    Of the rows that the expert gets right, those of every seed and task are put into `parts` equal
    parts by margin (part 1: the least sure). lost: share of a part, mean over seeds and tasks. auc:
    the chance that a row that is kept has a larger margin than one that is lost, over all tasks.
    """
    rows = []
    right, margins = told(table, "expert", "right"), told(table, "expert", "margin")
    for model in (name for name in dict.fromkeys(table.model) if name != "expert"):
        shares, means, ranks = [], [], []
        for own, sure, after in zip(right, margins, told(table, model, "right"), strict=True):
            known = [
                (m[b == 1] / 1000, a[b == 1] == 0) for b, m, a in zip(own, sure, after, strict=True)
            ]
            ranks.append(auc(torch.cat([m for m, _ in known]), torch.cat([x for _, x in known])))
            for value, bad in known:
                groups = value.argsort(stable=True).tensor_split(parts)
                shares.append([bad[group].double().mean().item() for group in groups])
                means.append([value[group].double().mean().item() for group in groups])
        for part in range(parts):
            row = {"model": model, "part": part + 1, "auc": float(np.nanmean(ranks))}
            row["margin"] = float(np.nanmean([one[part] for one in means]))
            rows.append({**row, "lost": float(np.nanmean([one[part] for one in shares]))})
    return pd.DataFrame(rows)


def examples(table: pd.DataFrame, model: str, task: str) -> pd.DataFrame:
    """A task's rows that a merge turned, at the first seed: row, kind (lost or gained), margin.

    row: the place in the task's test split. Those that the expert was surest of come first.
    """
    first = table[(table.seed == table.seed.iloc[0]) & (table.task == task)].set_index("model")
    expert, after = first.loc["expert"], first.loc[model, "right"]
    rows = [
        {"row": int(row), "kind": "lost" if before else "gained", "margin": margin / 1000}
        for row, before, now, margin in zip(
            expert["row"], expert["right"], after, expert["margin"], strict=True
        )
        if before != now
    ]
    found = pd.DataFrame(rows, columns=["row", "kind", "margin"])
    return found.sort_values("margin", ascending=False, ignore_index=True)


def pooled(table: pd.DataFrame, model: str, number: int) -> tuple[Tensor, Tensor]:
    """Confidence and right or wrong of a model at the number-th seed, all tasks' rows together."""
    sure, right = told(table, model, "sure")[number], told(table, model, "right")[number]
    return torch.cat(sure).double() / 1000, torch.cat(right).bool()


def calibrated(table: pd.DataFrame, *, bins: int = 10, draws: int = 200) -> pd.DataFrame:
    """Confidence beside accuracy: seed, model, accuracy, confidence, gap, uneven, ece, chance.

    table: of `ask`; all tasks' rows together. gap: confidence minus accuracy. uneven: the mean over
    tasks of the gap's size, which needs no bins. ece: the expected calibration error. chance: what
    it would be if every confidence were exactly right.
    """
    rows = []
    for number, seed in enumerate(dict.fromkeys(table.seed)):
        for model in dict.fromkeys(table.model):
            sure, right = pooled(table, model, number)
            usual, level = sure.mean().item(), right.double().mean().item()
            row = {"seed": seed, "model": model, "accuracy": level, "confidence": usual}
            own = [told(table, model, name)[number] for name in ("sure", "right")]
            gaps = [abs((s / 1000 - r).double().mean().item()) for s, r in zip(*own, strict=True)]
            row |= {"gap": usual - level, "uneven": sum(gaps) / len(gaps)}
            row["ece"] = reliability(sure, right, bins=bins).error
            rows.append({**row, "chance": chance_error(sure, bins=bins, draws=draws)})
    return pd.DataFrame(rows)


def diagram(table: pd.DataFrame, *, bins: int = 10) -> pd.DataFrame:
    """The reliability diagram of every model, rows of all tasks and seeds together.

    Columns: model, bin, count, confidence, accuracy; bins without rows are left out.
    """
    rows = []
    for model in dict.fromkeys(table.model):
        each = [pooled(table, model, n) for n in range(table.seed.nunique())]
        found = reliability(*(torch.cat(part) for part in zip(*each, strict=True)), bins=bins)
        for k in found.count.nonzero().flatten().tolist():
            means = {"confidence": found.confidence[k], "accuracy": found.accuracy[k]}
            means = {name: mean.item() for name, mean in means.items()}
            rows.append({"model": model, "bin": k, "count": int(found.count[k]), **means})
    return pd.DataFrame(rows)


def depths(table: pd.DataFrame) -> pd.DataFrame:
    """cka, shift and common of every layer in rows: seed, model, task, layer (0: embeddings)."""
    rows = []
    for row in table[table.model != "expert"].itertuples():
        found = zip(row.cka, row.shift, row.common, strict=True)
        for layer, (alike, moved, common) in enumerate(found):
            label = {"seed": row.seed, "model": row.model, "task": row.task, "layer": layer}
            rows.append({**label, "cka": alike, "shift": moved, "common": common})
    return pd.DataFrame(rows)
