"""Seconds that a step of a fit takes at best on a GPU, by bytes, operations and its data sheet.

Merging moves (T + 2) N numbers and its gradient (T + 1) N; the model multiplies each weight with
each token once forwards and twice backwards, 2 operations a time; a divergence reads and writes
logits 3 times (fused) to 7 times (plain). Lower bounds, not measured: real steps are slower.
"""

from divmerge_book.planning.gpu_specs import Accelerator
from divmerge_book.planning.workloads import DELTAS, PRECISIONS, Fit, Model

FUSED, PLAIN = 3, 7  # passes of a divergence over [A, V]


def merge_bytes(model: Model, fit: Fit) -> tuple[float | int, float | int]:
    """Bytes that a merge and its gradient move on the device, and over the link to the host."""
    deltas = 2 * fit.tasks * DELTAS[fit.deltas] * model.parameters
    if fit.deltas == "low_rank":
        deltas = 2 * fit.tasks * 4 * fit.rank * model.layers * model.sides
    moved = (3 * 4 * model.parameters + deltas) / fit.ranks
    return moved, deltas / fit.ranks if fit.deltas.startswith("streamed") else 0.0


def operations(model: Model, fit: Fit) -> float | int:
    """Operations of forward and backward pass: layers on all tokens, the head on answers.

    Attention's own products are 4 S H per token and layer forwards (masks save nothing).
    """
    tokens, answers = fit.tasks * fit.rows * fit.tokens, fit.tasks * fit.positions
    passes = 4 if fit.checkpointing else 3
    body = 2 * model.layers * model.block + 4 * fit.tokens * model.hidden * model.layers
    head = 3 * 2 * model.hidden * fit.num_classes(model) * answers
    return (passes * tokens * body + head) / fit.ranks


def step_seconds(model: Model, fit: Fit, gpu: Accelerator) -> dict[str, float | int]:
    """Seconds of merge, model, divergence, and their sum; communication is not counted."""
    moved, streamed = merge_bytes(model, fit)
    logits = fit.tasks * fit.positions * fit.num_classes(model) / fit.ranks
    a_pass = logits * PRECISIONS[fit.precision] / gpu.bandwidth
    parts = {
        "merge": max(moved / gpu.bandwidth, streamed / gpu.link),
        "model": operations(model, fit) / (gpu.half if fit.precision == "bfloat16" else gpu.single),
        "divergence": FUSED * a_pass,
    }
    return {**parts, "step": sum(parts.values()), "divergence, plain": PLAIN * a_pass}
