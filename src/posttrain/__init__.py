"""posttrain: a pretrained base model in, an aligned assistant and the measured cost of alignment out.

The Python interface (`api.py`, documented in docs/python.md) is imported at its first use: modules of the package import each
other without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.api import Change, Comparison, Estimate, Run, Stage, open_run, run

__version__ = "0.1.0"
__all__ = ["Change", "Comparison", "Estimate", "Run", "Stage", "open_run", "run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("posttrain.api"), name)
    raise AttributeError(f"module 'posttrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
