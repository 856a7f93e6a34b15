"""Work beside the engine in threads that end with it.

Whatever thread once ran a parallel product keeps OpenMP's workers for as long as it lives. With more of them than processors
all of them sleep between products, and waking up takes as long as the products of one row: a stream was half as fast.
A thread of a pool would live on.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def apart(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the work returns; raises what it raises."""
    with ThreadPoolExecutor(1) as brief:
        return brief.submit(work, *args, **kwargs).result()


async def beside(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The same while the event loop goes on."""
    brief = ThreadPoolExecutor(1)
    try:
        return await asyncio.wrap_future(brief.submit(work, *args, **kwargs))
    finally:
        brief.shutdown(wait=False)
