"""GPUs by their makers' data sheets: memory, bandwidth, arithmetic. Nothing here was measured.

Figures are NVIDIA's for dense products ("with sparsity" doubles them on newer sheets); the link to
the host is half of the sheet's sum of both directions. Programs reach less.
"""

from dataclasses import dataclass

from divmerge_core.registry import Registry

GB, TERA = 10**9, 10**12
ACCELERATORS = Registry("accelerator")


@dataclass(frozen=True)
class Accelerator:
    """One GPU: bytes of memory; bytes per second of its memory and of its link to the host.

    half: operations per second of products in bfloat16 (float16 where bfloat16 is False), summed in
    float32; single: of those in float32, as PyTorch computes them by default.
    """

    name: str
    memory: float | int
    bandwidth: float | int
    half: float | int
    single: float | int
    link: float | int
    bfloat16: bool = True


# key, name, GB, GB/s, 10^12 operations/s in half and in single precision, GB/s to the host
for key, name, *numbers in (
    ("t4", "T4", 16, 320, 65, 8.1, 16),
    ("l4", "L4", 24, 300, 121, 30.3, 32),
    ("a100_40", "A100 40 GB SXM", 40, 1555, 312, 19.5, 32),
    ("a100_80", "A100 80 GB SXM", 80, 2039, 312, 19.5, 32),
    ("h100", "H100 SXM", 80, 3350, 989, 67, 64),
    ("h200", "H200 SXM", 141, 4800, 989, 67, 64),
):
    sizes = [n * unit for n, unit in zip(numbers, (GB, GB, TERA, TERA, GB), strict=True)]
    ACCELERATORS.register(key)(Accelerator(name, *sizes, bfloat16=key != "t4"))
