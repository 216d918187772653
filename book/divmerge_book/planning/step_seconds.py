"""Seconds that a step of a fit takes at best on each GPU, from bytes, operations and data sheets.

Merging moves (T + 2) N numbers and its gradient (T + 1) N; the model multiplies each weight with
each token once forwards and twice backwards, 2 operations a time; a divergence reads and writes
logits 3 times (fused) to 7 times (plain). None of this has been run on these GPUs: it is what a
step cannot be faster than, and real ones are slower.
"""

from collections.abc import Sequence

import pandas as pd

from divmerge_book.planning.gpu_specs import ACCELERATORS, Accelerator
from divmerge_book.planning.memory import plan
from divmerge_book.planning.workloads import DELTAS, PRECISIONS, Fit, Model

FUSED, PLAIN = 3, 7  # passes of a divergence over [A, V]


def merge_bytes(model: Model, fit: Fit) -> tuple[float | int, float | int]:
    """Bytes that a merge and its gradient move on the device, and over the link to the host."""
    deltas = 2 * fit.tasks * DELTAS[fit.deltas] * model.parameters
    if fit.deltas == "low_rank":
        deltas = 2 * fit.tasks * 4 * fit.rank * model.layers * model.sides
    whole = (3 * 4 * model.parameters + deltas) / fit.ranks
    return whole, deltas / fit.ranks if fit.deltas.startswith("streamed") else 0.0


def operations(model: Model, fit: Fit) -> float | int:
    """Operations of forward and backward pass: layers on all tokens, the head on answers.

    Attention's own products are 4 S H a token and layer forwards (no half is spared for masks).
    """
    tokens, answers = fit.tasks * fit.rows * fit.tokens, fit.tasks * fit.positions
    passes = 4 if fit.checkpointing else 3
    body = 2 * model.layers * model.block + 4 * fit.tokens * model.hidden * model.layers
    head = 3 * 2 * model.hidden * (fit.classes or model.vocabulary) * answers
    return (passes * tokens * body + head) / fit.ranks


def step_seconds(model: Model, fit: Fit, gpu: Accelerator) -> dict[str, float | int]:
    """Seconds by part: merge, model, divergence; and their sum. Devices' own talk is not in it."""
    moved, streamed = merge_bytes(model, fit)
    rate = gpu.half if fit.precision == "bfloat16" else gpu.single
    logits = fit.tasks * fit.positions * (fit.classes or model.vocabulary) / fit.ranks
    parts = {
        "merge": max(moved / gpu.bandwidth, streamed / gpu.link),
        "model": operations(model, fit) / rate,
        "divergence": FUSED * logits * PRECISIONS[fit.precision] / gpu.bandwidth,
    }
    plain = PLAIN * logits * PRECISIONS[fit.precision] / gpu.bandwidth
    return {**parts, "step": sum(parts.values()), "divergence, plain": plain}


def forecast(model: Model, fit: Fit, gpus: Sequence[str] = tuple(ACCELERATORS)) -> pd.DataFrame:
    """A row per GPU: bytes planned, whether they fit, seconds by part, and what to change first.

    half: the half precision that the GPU has; a T4 has no bfloat16 and is counted with float16.
    """
    rows = []
    for key in gpus:
        gpu, planned = ACCELERATORS[key], plan(model, fit, key)
        rows.append(
            {"gpu": gpu.name, "gigabytes": planned.total / 1e9, "fits": planned.fits}
            | step_seconds(model, fit, gpu)
            | {"half": "bfloat16" if gpu.bfloat16 else "float16"}
            | {"advice": planned.advice[0].what if planned.advice else ""}
            | {"source": gpu.source}
        )
    return pd.DataFrame(rows)
