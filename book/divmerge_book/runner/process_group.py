"""torch.distributed for a fit: set-up, all-reduce, and error propagation.

`torchrun` starts the processes. They use NCCL on GPUs, one GPU per process, and gloo on CPUs. Only
gloo has been tested.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

COMMAND = "torchrun --nproc-per-node 2 -m divmerge_book.runner.distributed --help"
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
FAILED = "failed"  # key of the store where the first process that fails writes its error


class PeerFailed(RuntimeError):
    """Another process of the fit failed or was killed."""


@dataclass(frozen=True)
class ProcessGroup:
    """One of `world` processes, with its device and the mesh of all devices."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh = field(repr=False)

    def total(self, numbers: Tensor) -> Tensor:
        """All-reduce: the sum over ranks, in place, with the same bits on every rank."""
        dist.all_reduce(numbers)
        return numbers

    def require_same(self, numbers: Tensor, what: str) -> None:
        """Raise RuntimeError on every rank unless the numbers are identical on all ranks."""
        first = numbers.detach().to(self.device).clone()
        dist.broadcast(first, src=0)
        differ = (first != numbers.detach().to(self.device)).sum().float()
        if self.total(differ).item():
            raise RuntimeError(f"the ranks ended with different {what}; start the fit again")


def process_device(device: str, environment: Mapping[str, str]) -> torch.device:
    """The device of this process. Raises ValueError where there is none."""
    if device not in BACKENDS:
        raise ValueError(
            f"device must be one of {', '.join(BACKENDS)}, got {device!r}; every process on a "
            "machine takes the GPU of its own number"
        )
    if device == "cpu":
        return torch.device("cpu")
    count, local = torch.cuda.device_count(), int(environment.get("LOCAL_RANK", 0))
    if local >= count:
        raise ValueError(
            f"process {local} of this machine has no GPU: there are {count}; start torchrun with "
            f"--nproc-per-node {count}" + ("" if count else ", or say device='cpu'")
        )
    return torch.device("cuda", local)


def validate_world(environment: Mapping[str, str], world: int | None) -> tuple[int, int]:
    """(rank, world size). Raises ValueError outside torchrun, and for another world size."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in environment]
    if missing:
        raise ValueError(
            f"a fit on several devices is started by torchrun ({', '.join(missing)} not set): "
            f"{COMMAND}"
        )
    rank, found = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if world not in (None, found):
        raise ValueError(
            f"{world} processes are wanted, torchrun started {found}; say --nproc-per-node {world}"
        )
    return rank, found


def first_error(error: Exception, rank: int, store: dist.Store) -> Exception:
    """The error of this process, or of the first that failed if this one lost the connection."""
    own = f"rank {rank}: {type(error).__name__}: {error}"
    try:
        first = store.compare_set(FAILED, "", own).decode()
    except RuntimeError:  # the store went with the process that held it
        first = own
    if first != own and not isinstance(error, ValueError):
        return PeerFailed(f"rank {rank} stops with the others. First failed {first}")
    if "peer" in str(error).lower() and isinstance(error, RuntimeError):
        return PeerFailed(
            f"rank {rank} stops: another rank is gone without a word, killed perhaps for want of "
            f"memory; torchrun's own report names it ({error})"
        )
    return error


@contextmanager
def process_group(
    device: str = "cpu", *, world: int | None = None, timeout: float = 600.0
) -> Iterator[ProcessGroup]:
    """This process in the group that torchrun started; all processes stop when one fails.

    device: `cpu`, or `cuda` for the GPU with this process's local rank. world: the expected world
    size; None for any. timeout: of collectives, in seconds. Raises ValueError outside torchrun and
    where there is no device, and PeerFailed where another process failed.
    """
    rank, found = validate_world(os.environ, world)
    place = process_device(device, os.environ)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    limit = timedelta(seconds=timeout)
    store, *_ = next(dist.rendezvous("env://", timeout=limit))
    dist.init_process_group(
        BACKENDS[device], store=store, rank=rank, world_size=found, timeout=limit
    )
    errors = dist.PrefixStore("divmerge", store)
    try:
        yield ProcessGroup(rank, found, place, init_device_mesh(device, (found,)))
    except Exception as error:
        raised = first_error(error, rank, errors)
        if raised is error:
            raise
        raise raised from error
    finally:
        dist.destroy_process_group()
