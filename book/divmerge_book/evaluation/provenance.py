"""Where numbers come from: versions, machine, device, commit and date."""

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
    """Where numbers come from: versions, machine, date, and the facts given (device: its name)."""
    return {
        **facts,
        "date": datetime.date.today().isoformat(),
        "device": device_name(str(facts.get("device", "cpu"))),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "divmerge_core": importlib.metadata.version("divmerge-core"),
        **checkout(),
    }


def device_name(device: str) -> str:
    """`cpu`, or the name of the GPU. Raises ValueError where this machine has none of that name."""
    place = check_device(device)
    return torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"


@cache
def checkout() -> dict[str, str]:
    """The commit of the git checkout that this package lies in, with `-dirty` where files differ.

    Empty where the package is installed elsewhere, or git is missing.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return {}
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return {}
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}
