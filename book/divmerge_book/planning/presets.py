"""The suite and the size that fit a device, and the reasons."""

from dataclasses import dataclass, replace

import torch
from huggingface_hub import HfApi, try_to_load_from_cache

from divmerge_book.data.tasks import SUITES
from divmerge_book.evaluation.sizes import LanguageSize, size_of
from divmerge_book.models.encoders import check_device, resolve

ENOUGH = 20e9  # bytes of a GPU on which the sizes of `glue` run as they are


@dataclass(frozen=True)
class Preset:
    """A suite, a device, and a size: the name that was asked for, or a smaller size, and why."""

    suite: str
    size: LanguageSize | str
    label: str
    device: str
    why: str


def preset(suite: str = "auto", size: str = "default", device: str = "auto") -> Preset:
    """What fits: `glue` where there is a GPU and the hub, else `embedded_lm`; smaller on a T4.

    suite: `auto`, `glue` or `embedded_lm`. size: a name in LANGUAGE_SIZES for the suite. device:
    `auto`, `cpu` or `cuda`. Raises ValueError for other names.
    """
    place, base, why, label = check_device(device), SUITES["glue"].base, [], size
    if suite == "auto":
        suite, reason = "glue", f"a GPU, and {base} is available"
        if place.type == "cpu":
            suite, reason = "embedded_lm", "no GPU"
        elif not reachable(base):
            suite, reason = "embedded_lm", f"{base} is neither cached nor reachable on the hub"
        why.append(f"suite {suite}: {reason}")
    wanted = size_of(suite, size)
    if suite == "glue":
        small = "a CPU"
        if place.type != "cpu":
            memory = torch.cuda.get_device_properties(place).total_memory
            small = too_small(memory, resolve("auto", place) == "bfloat16")
        if small:
            label, size = f"{label}, smaller", smaller(wanted)
            why.append(f"a smaller preset: {small}")
    return Preset(suite, size, label, str(place), "; ".join(why) or "as asked for")


def reachable(name: str) -> bool:
    """Whether a model is in the hub's cache here or on the hub; no token is sent."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return True
    try:
        HfApi(token=False).model_info(name, timeout=10)
    except Exception:  # no network, no such model, an account needed: all the same here
        return False
    return True


def too_small(memory: float | int, bfloat16: bool) -> str:
    """Why a GPU cannot take the sizes of `glue` as they are; empty where it can."""
    if memory < ENOUGH:
        return f"{memory / 1e9:.0f} GB"
    return "" if bfloat16 else "no bfloat16"


def smaller(size: LanguageSize) -> LanguageSize:
    """The same for a GPU like the T4: fewer rows, int8 task vectors, no emulated bfloat16."""
    rows = min(size.recipe.rows or 1000, 1000)
    recipe = replace(size.recipe, rows=rows, epochs=1, micro=4, precision="auto")
    most = {"merge_rows": 32, "validation_rows": 32, "test_rows": 100}
    fewer = {name: min(getattr(size, name) or limit, limit) for name, limit in most.items()}
    fixed = {"batch_size": 2, "storage": "int8", "precision": "auto", "seeds": (0,)}
    return replace(size, recipe=recipe, **fewer, **fixed)
