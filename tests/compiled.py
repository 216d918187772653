"""Compile Triton kernels ahead of time for several GPUs, and read the compilers' reports.

A kernel that spills registers, or that reads two bytes at a time, is correct and slow; no test that
runs it would notice. Compilation happens in a process of its own, since this one may interpret.
"""

import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

# name -> backend, architecture and threads per warp
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


@dataclass(frozen=True)
class Case:
    """One compilation. Pointers and integers among the arguments count as multiples of 16."""

    kernel: str  # "module:function"
    types: dict[str, str]  # argument -> "*bf16", "i32", "fp32", ...
    constants: dict[str, Any]  # every other argument
    num_warps: int
    target: str  # a key of TARGETS


@dataclass(frozen=True)
class Report:
    """What the compiler made; accesses to global memory are counted by their width in bits."""

    registers: int  # a thread
    spills: int  # bytes of stack a thread on NVIDIA, registers on AMD
    loads: dict[int, int]
    stores: dict[int, int]


class Unavailable(Exception):
    """This Triton, or its absence, does not allow to compile ahead of time."""


def reports_or_skip(cases: dict[Any, Case]) -> dict[Any, Report]:
    """A report for every case, by its key; skips the test where Triton cannot compile ahead."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # compiled, without a GPU
    given = json.dumps([asdict(case) for case in cases.values()])
    options = {"env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, __file__], input=given, **options)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if isinstance(answer, str):
        pytest.skip(f"machine code is not checked: {answer}")

    def by_width(counts: dict[str, int]) -> dict[int, int]:
        return {int(width): count for width, count in counts.items()}

    found = [
        Report(one["registers"], one["spills"], by_width(one["loads"]), by_width(one["stores"]))
        for one in answer
    ]
    return dict(zip(cases, found, strict=True))


# --- in the process that compiles -----------------------------------------------------------------
def compile_case(case: Case) -> Report:
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise Unavailable(f"no Triton that compiles ahead of time: {error}") from error

    module, name = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature = {arg: case.types.get(arg, "constexpr") for arg in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith(("*", "i"))
    }
    source = ASTSource(kernel, signature, case.constants, aligned)
    target = GPUTarget(*TARGETS[case.target])
    assembly = triton.compile(source, target=target, options={"num_warps": case.num_warps}).asm
    return read_amdgcn(assembly["amdgcn"]) if target.backend == "hip" else read_cubin(assembly)


def read_cubin(assembly: dict[str, Any]) -> Report:
    """Registers and stack from the binary, accesses from the PTX."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        raise Unavailable(f"this Triton brings no {tool.name} to read its binaries with")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pattern = r"\b(ld|st)\.global(?:\.(?!v\d|b\d)[\w:]+)*(?:\.v(\d))?\.b(\d+)"
    accesses = [
        (direction == "ld", int(lanes or 1) * int(bits))
        for direction, lanes, bits in re.findall(pattern, assembly["ptx"])
    ]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Report(int(registers), int(stack), *by_width(accesses))


def read_amdgcn(text: str) -> Report:
    """Everything from the assembly, whose metadata count registers and spills."""
    bits = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    pattern = r"\b(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dwordx\d|dword)"
    accesses = [(way == "load", bits[size]) for way, size in re.findall(pattern, text)]
    counts = dict(re.findall(r"\.(\w+_count):\s+(\d+)", text))
    spills = int(counts["vgpr_spill_count"]) + int(counts["sgpr_spill_count"])
    return Report(int(counts["vgpr_count"]), spills, *by_width(accesses))


def by_width(accesses: list[tuple[bool, int]]) -> tuple[dict[int, int], dict[int, int]]:
    """Loads, then stores: how many of each width."""
    return tuple(
        dict(collections.Counter(width for load, width in accesses if load is wanted))
        for wanted in (True, False)
    )


def main() -> None:
    """Cases as JSON come in; reports, or the reason why there are none, go out."""
    cases = [Case(**fields) for fields in json.load(sys.stdin)]
    try:
        answer = [asdict(compile_case(case)) for case in cases]
    except Unavailable as error:
        answer = str(error)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
