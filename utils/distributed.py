"""Several processes working on one stage, started by `torchrun`: who this process is, which rows are its own.

Without torchrun there is one process of rank 0 and every function here is the trivial one. Small things (decisions,
gathered outputs) travel through gloo on the CPU, gradients and batch statistics of CUDA devices through NCCL.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from utils.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

GRACE_S = 5.0  # that a process with nothing to say waits for the one that has
PATIENCE = timedelta(minutes=30)  # that ranks wait for each other: rank 0 may be decoding a large image folder
_store: Any = None  # what the ranks meet through, and where the first to fail says so
_n_groups = 0  # joined so far by this process


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True in the one process that writes files and prints results."""
    return rank() == 0


def refuse(script: str, instead: str) -> None:
    """Raise UserError under torchrun, for scripts that it cannot spread."""
    if world_size() > 1:
        raise UserError(f"{script}: start it without torchrun; {instead}")


def shares(n: int) -> list[slice]:
    """The ranks' parts of n consecutive items: in order, disjoint and even to one."""
    ends = [n * number // world_size() for number in range(world_size() + 1)]
    return [slice(*part) for part in itertools.pairwise(ends)]


def share(n: int) -> slice:
    """This process's part of n consecutive items."""
    return shares(n)[rank()]


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Join the other processes of this run for a block; all but rank 0 are silent inside it."""
    if world_size() == 1:
        yield
        return
    import torch
    from torch import distributed

    global _store, _n_groups
    if _store is None:
        _store = next(distributed.rendezvous("env://", timeout=PATIENCE))[0]
    _n_groups += 1
    store = distributed.PrefixStore(f"group{_n_groups}", _store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=PATIENCE)
    with contextlib.ExitStack() as silence:
        if not is_main():
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        yield
        distributed.barrier()  # nobody leaves before rank 0 has written
    distributed.destroy_process_group()


def speaks() -> bool:
    """True where this process should print its error: the first to fail prints, the others fail of the same cause.

    torchrun ends all processes as soon as one has ended, so those that leave the word to another wait for a while.
    Before the group is formed (a mistake on the command line) the first process of each machine has the word, and the
    others print only if they are still there afterwards.
    """
    if world_size() == 1:
        return True
    if _store is None:
        if local_rank() > 0:
            time.sleep(GRACE_S)
        return True
    try:
        is_first = _store.add("failed", 1) == 1
    except RuntimeError:  # the store went with the process that held it
        is_first = False
    if not is_first:
        time.sleep(GRACE_S)
    return is_first


def lost_peer(error: BaseException) -> bool:
    """True where `error` only says that another process of this run is gone."""
    words = ("closed by peer", "connection reset", "broken pipe", "remote process", "socket", "nccl", "store")
    return world_size() > 1 and isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run a block on all ranks; where it fails with UserError on one, it fails on all, with the first one's message."""
    mine = None
    try:
        yield
    except UserError as error:
        mine = str(error)
    messages = exchange(mine)
    where = [number for number, message in enumerate(messages) if message is not None]
    if where:
        raise UserError(messages[where[0]])


def exchange(value: Any) -> list:
    """`value` of every rank, in the order of the ranks; anything that pickles."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def gather_rows(part: "Tensor", n: int) -> "Tensor":
    """All ranks' `part`s as one tensor on the CPU, in row order, on every rank.

    part: (share(n), ...) on any device.  Returns (n, ...) of the same dtype.
    """
    part = part.cpu()
    if world_size() == 1:
        return part
    import torch
    from torch import distributed

    padded = part.new_zeros((-(-n // world_size()), *part.shape[1:]))  # all_gather wants parts of one size
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    distributed.all_gather(parts, padded)
    return torch.cat([p[: own.stop - own.start] for p, own in zip(parts, shares(n), strict=True)])


def sum_over_ranks(x: "Tensor") -> "Tensor":
    """The sum of every rank's `x`, without a gradient, on its device; `x` itself where there is one process."""
    if world_size() == 1:
        return x
    from torch import distributed

    total = x.detach().contiguous().clone()
    distributed.all_reduce(total)
    return total
