"""Threads of a run sleep while they wait, unless the environment says something itself."""

import os
import subprocess
import sys

import pytest

CODE = """
import os
from posttrain.waiting_threads import sleep_while_waiting
print(sleep_while_waiting(), os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""


def said(code: str, **more: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], env=clean | more, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("code", "more", "wanted"),
    [
        (CODE, {}, "True passive 0"),
        (CODE, {"OMP_WAIT_POLICY": "active"}, "False active None"),
        (CODE, {"GOMP_SPINCOUNT": "100"}, "False None 100"),
        (f"import torch\n{CODE}", {}, "False None None"),
    ],
)
def test_it_is_set_before_torch_and_never_against_the_user(code: str, more: dict[str, str], wanted: str):
    assert said(code, **more) == wanted
