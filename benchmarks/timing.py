"""Interleaved timing: a machine's speed drifts, so only a ratio of two runs side by side means something."""

import statistics
import time
from collections.abc import Callable


def seconds_of(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(
    ours: Callable[[], object], peer: Callable[[], object], amount: float, unit: str, repeats: int, warmup: int = 1
) -> dict:
    """Time A B A B ... and return one figure.

    amount: what one call does, in `unit` without its `/s`; unit: of the rates, such as 'images/s'.
    'ours' and 'peer' are median rates, 'ratio' the median over pairs of ours / peer, 'ratios' all of them in order.
    """
    for _ in range(warmup):
        ours()
        peer()
    pairs = [(amount / seconds_of(ours), amount / seconds_of(peer)) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return {"ratio": statistics.median(ratios), "ours": medians[0], "peer": medians[1], "unit": unit, "ratios": ratios}
