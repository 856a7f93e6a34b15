"""Set how OpenMP threads wait for each other, before the library that reads the setting is loaded.

By default the threads spin. Beside another busy process, spinning threads take processor time from those with work: LoRA
training of SmolLM2 on two cores fell from 580 to 116-248 tokens/s in four runs, and to 266 with threads that sleep. On an idle
machine both settings give the same rate. Decoding of one stream differs: sleeping threads cost it 28 % on an idle machine
(21.5 against 29.7 tokens/s) and double its rate beside a busy process (20.5 against 9.5). So the threads sleep in runs, which
train. A server and a chat use the default of the library (benchmarks/busy.py).
"""

import os
import sys

_SLEEP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def sleep_while_waiting() -> bool:
    """Let OpenMP threads sleep while they wait, in this process and its children.

    Returns whether anything was set. Nothing is set if the environment has the setting or torch is loaded.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _SLEEP):
        return False
    os.environ.update(_SLEEP)
    return True
