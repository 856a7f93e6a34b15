"""How threads of a parallel product wait for each other, set before the library that reads it is loaded.

By default they spin. Beside another busy process they then compute their waiting: LoRA training of SmolLM2 on two cores fell
from 580 to 116-248 tokens/s in four runs, and to 266 with threads that sleep; on a quiet machine both give the same. One stream
of text differs: threads that sleep cost it 28 % on a quiet machine (21.5 against 29.7 tokens/s) and double its rate beside a
busy process (20.5 against 9.5). So runs, which train, sleep;
a server and a chat keep the library's default (benchmarks/busy.py).
"""

import os
import sys

_SLEEP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def sleep_while_waiting() -> bool:
    """Let OpenMP's threads sleep while they wait, in this process and those that it starts.

    Returns whether anything was set: nothing is where the environment says something itself, or torch is loaded already.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _SLEEP):
        return False
    os.environ.update(_SLEEP)
    return True
