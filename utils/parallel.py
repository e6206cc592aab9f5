"""Calls of one function spread over processes of this machine (joblib), or over the workers of a Dask cluster."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from utils.config import UserError

CONNECT_SECONDS = 5  # to wait for the Dask scheduler


def n_processes(n_jobs: int, n_calls: int) -> int:
    """`cluster.n_jobs` as a number of processes: 0 = one a core that this process may use; never more than calls."""
    from joblib import cpu_count

    return max(1, min(n_jobs or cpu_count(), n_calls))


def in_processes(function: Callable, calls: Iterable[tuple], n_jobs: int) -> Iterator[Any]:
    """Results of `function(*call)` as they are done, from `n_jobs` processes with one thread each.

    Calls are drawn from `calls` as processes become free, n_jobs at a time, so that 2 n_jobs are held at most. Memory
    maps among the arguments are sent as a path, other arrays by value.  An exception of `function` is raised here;
    UserError where a process was killed. Whatever ends this generator also ends the processes.
    """
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky import get_reusable_executor

    with parallel_config(backend="loky", inner_max_num_threads=1):
        parallel = Parallel(n_jobs, return_as="generator_unordered", pre_dispatch=n_jobs, batch_size=1, max_nbytes=None)
    results = parallel(delayed(function)(*call) for call in calls)
    try:
        yield from results
    except BrokenProcessPool:
        raise UserError(
            f"cluster.n_jobs: one of {n_jobs} processes was killed, most likely because memory ran out; "
            f"use cluster.n_jobs={max(1, n_jobs // 2)}"
        ) from None
    finally:
        with contextlib.suppress(BaseException):  # what joblib says of calls that it drops on the way out
            results.close()
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


def on_dask(function: Callable, calls: Iterable[tuple], n_jobs: int, scheduler: str) -> Iterator[Any]:
    """Results of `function(*call)` as they are done, from the workers of the Dask scheduler at `scheduler`.

    n_jobs: calls under way at once; 0 = one a thread of the cluster. No more are held here or there. The workers must
    be able to import what `function` needs: start them in this checkout, or with it on PYTHONPATH.
    Raises UserError where `distributed` is not installed, the scheduler does not answer or has no workers, and where a
    worker was killed again and again.
    """
    try:
        import distributed
    except ImportError:
        raise UserError("cluster.joblib_backend: dask needs the package distributed: pip install distributed") from None
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError):
        raise UserError(
            f"cluster.dask_scheduler: no Dask scheduler answers at {scheduler} within {CONNECT_SECONDS} s"
        ) from None
    with client:
        n_threads = sum(client.ncores().values())
        if not n_threads:
            raise UserError(f"cluster.dask_scheduler: {scheduler} has no workers; start some with `dask worker`")
        # Not through joblib, whose Dask backend (1.6.0) waits for ever where a worker was killed.
        submitted = (client.submit(_apply, function, client.scatter([call], hash=False)) for call in calls)
        first = itertools.islice(submitted, min(n_jobs, n_threads) or n_threads)
        running = distributed.as_completed(first, loop=client.loop)
        try:
            for done in running:
                yield done.result()
                running.update(itertools.islice(submitted, 1))
        except distributed.KilledWorker:
            raise UserError(
                "cluster.dask_scheduler: a worker was killed, most likely because memory ran out; "
                "give the workers more memory or lower cluster.n_jobs"
            ) from None


def _apply(function: Callable, call: list[tuple]) -> Any:
    return function(*call[0])
