"""Several processes working on one stage, started by `torchrun`: who this process is and which rows are its own.

Without torchrun there is one process of rank 0, and nothing here imports torch.
"""

import os


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def share(n: int) -> slice:
    """This process's part of n consecutive items; the parts of all ranks are in order, disjoint and even to one."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())
