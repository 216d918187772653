"""Processes that share one fit: who each is, sums over all, and one error when any of them fails.

`torchrun` starts them. On GPUs they speak over NCCL, one GPU a process; on CPUs over gloo. The CPU
is what the tests run; no machine with several GPUs was at hand, so NCCL has not been run by us.
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
FAILED = "failed"  # under this name the first process that fails leaves its reason


class Stopped(RuntimeError):
    """Another process of the fit failed or is gone; says which and why where it is known."""


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes, and the ways to the others.

    Numbers that are summed are the same, bit for bit, on every rank afterwards.
    """

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh = field(repr=False)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over ranks, in place of these numbers."""
        dist.all_reduce(numbers)
        return numbers

    def require_same(self, numbers: Tensor, what: str) -> None:
        """Raise RuntimeError, on every rank, unless all ranks hold these very numbers."""
        first = numbers.detach().to(self.device).clone()
        dist.broadcast(first, src=0)
        differ = (first != numbers.detach().to(self.device)).sum().float()
        if self.total(differ).item():
            raise RuntimeError(f"the ranks ended with different {what}; start the fit again")


def chosen_device(device: str, environment: Mapping[str, str]) -> torch.device:
    """This process's own device. Raises ValueError where there is none for it."""
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


def checked_world(environment: Mapping[str, str], world: int | None) -> tuple[int, int]:
    """(rank, number of ranks). Raises ValueError where torchrun did not start this, or not so."""
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


def told(error: Exception, rank: int, store: dist.Store) -> Exception:
    """What a process raises: its own error, or the first one's where it only lost the others."""
    own = f"rank {rank}: {type(error).__name__}: {error}"
    try:
        first = store.compare_set(FAILED, "", own).decode()
    except RuntimeError:  # the store went with the process that held it
        first = own
    if first != own and not isinstance(error, ValueError):
        return Stopped(f"rank {rank} stops with the others. First failed {first}")
    if "peer" in str(error).lower() and isinstance(error, RuntimeError):
        return Stopped(
            f"rank {rank} stops: another rank is gone without a word, killed perhaps for want of "
            f"memory; torchrun's own report names it ({error})"
        )
    return error


@contextmanager
def ranks(
    device: str = "cpu", *, world: int | None = None, timeout: float = 600.0
) -> Iterator[Ranks]:
    """This process as one of those that torchrun started; all stop when one of them fails.

    device: `cpu`, or `cuda` for the GPU of this process's number on its machine. world: how many
    processes there have to be; None takes any number. timeout: seconds that a process waits for
    the others. Raises ValueError, before anything is loaded, where torchrun did not start this
    process, or there is no device for it; and Stopped where another process failed.
    """
    rank, found = checked_world(os.environ, world)
    place = chosen_device(device, os.environ)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    limit = timedelta(seconds=timeout)
    store, *_ = next(dist.rendezvous("env://", timeout=limit))
    dist.init_process_group(
        BACKENDS[device], store=store, rank=rank, world_size=found, timeout=limit
    )
    notes = dist.PrefixStore("divmerge", store)
    try:
        yield Ranks(rank, found, place, init_device_mesh(device, (found,)))
    except Exception as error:
        raised = told(error, rank, notes)
        if raised is error:
            raise
        raise raised from error
    finally:
        dist.destroy_process_group()  # who waits for this process hears that it is gone
