"""GPUs as their makers describe them: memory, bandwidth, arithmetic. Nothing here was measured.

Figures are those that NVIDIA prints on each product's data sheet: dense products, without the
"with sparsity" of newer sheets, which doubles them; the link to the host is half of the sheet's sum
of both directions. What a program reaches is less.
"""

from dataclasses import dataclass

from divmerge_core.registry import Registry

GB, TERA = 10**9, 10**12
ACCELERATORS = Registry("accelerator")


@dataclass(frozen=True)
class Accelerator:
    """One GPU. memory in bytes; bandwidth and link, to the host, in bytes a second.

    half: operations a second of products in bfloat16, or float16 where bfloat16 is False, summed in
    float32. single: of those in float32, as PyTorch computes them unless told otherwise.
    """

    name: str
    memory: int
    bandwidth: float | int
    half: float | int
    single: float | int
    link: float | int
    source: str
    bfloat16: bool = True


def described(
    key: str,
    name: str,
    gigabytes: int,
    bandwidth: float | int,
    half: float | int,
    single: float | int,
    link: float | int,
    *,
    bfloat16: bool = True,
) -> None:
    """Enter a GPU: gigabytes, gigabytes a second twice, 10^12 operations a second twice."""
    sheet = f"NVIDIA {name}, data sheet"
    entry = Accelerator(
        *(name, gigabytes * GB, bandwidth * GB, half * TERA, single * TERA, link * GB, sheet),
        bfloat16,
    )
    ACCELERATORS.register(key)(entry)


described("t4", "T4", 16, 320, 65, 8.1, 16, bfloat16=False)
described("l4", "L4", 24, 300, 121, 30.3, 32)
described("a100_40", "A100 40 GB SXM", 40, 1555, 312, 19.5, 32)
described("a100_80", "A100 80 GB SXM", 80, 2039, 312, 19.5, 32)
described("h100", "H100 SXM", 80, 3350, 989, 67, 64)
described("h200", "H200 SXM", 141, 4800, 989, 67, 64)
