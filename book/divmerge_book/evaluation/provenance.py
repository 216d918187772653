"""Provenance of numbers: versions, machine, device, commit and date."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import datasets
import torch
import transformers

from divmerge_book.models.encoders import check_device


def origin(**facts: object) -> dict:
    """Versions, machine, date, and the given facts; a given `device` is replaced by its name."""
    return {
        **facts,
        "date": datetime.date.today().isoformat(),
        "device": device_name(str(facts.get("device", "cpu"))),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in (torch, transformers, datasets)},
        "divmerge_core": importlib.metadata.version("divmerge-core"),
        **checkout(),
    }


def device_name(device: str) -> str:
    """`cpu`, or the name of the GPU. Raises ValueError for a device that is not there."""
    place = check_device(device)
    return torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"


@cache
def checkout() -> dict[str, str]:
    """The commit of this package's git checkout, with `-dirty` for changed files; else empty."""
    root = Path(__file__).resolve().parents[3]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return {}
    known = (root / ".git").exists() and done.returncode == 0
    return {"commit": done.stdout.strip()} if known else {}
