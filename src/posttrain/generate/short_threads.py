"""Run a function in a short-lived thread, so that OpenMP workers do not outlive it.

A thread that ran a parallel operation keeps its OpenMP workers for as long as it lives. With more workers than processors, all
of them sleep between operations, and waking them takes as long as the products of one row: a stream ran at half speed. A thread
of a pool would stay alive.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def run_in_short_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run the work in a short-lived thread and return its result."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *args, **kwargs).result()


async def await_in_short_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The same without blocking the event loop."""
    pool = ThreadPoolExecutor(1)
    try:
        return await asyncio.wrap_future(pool.submit(work, *args, **kwargs))
    finally:
        pool.shutdown(wait=False)
