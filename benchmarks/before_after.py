"""Whether a change costs speed: two checkouts of this repository, in turn, on the same work.

    git worktree add /tmp/before COMMIT
    python benchmarks/before_after.py /tmp/before . --runs 3

Each run is a separate process that uses the code of its checkout. The output has the units per second of each run and the ratio
of the medians, after : before. The work is SFT steps, rollouts, and requests over 16 adapters, with SmolLM2-135M.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The workload's script with its arguments, then the timed side's.
WORK = {
    "sft": (("workload.py", "sft", "FOLDER", "DATA", "5", "4", "512"), ("ours.py", "sft", "FOLDER", "DTYPE")),
    "rollouts": (("rollouts.py", "prepare", "FOLDER", "DATA"), ("rollouts.py", "posttrain", "FOLDER")),
    "adapters": (("adapters.py", "prepare", "FOLDER", "DATA"), ("adapters.py", "posttrain", "FOLDER", "16")),
}
WARM_UP = {"sft": 1, "rollouts": 0, "adapters": 0}


def run(checkout: Path, arguments: tuple[str, ...], words: dict[str, str]) -> str:
    """One process with a checkout's code; its last line."""
    command = [sys.executable, str(checkout / "benchmarks" / arguments[0]), *(words.get(a, a) for a in arguments[1:])]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def rate(line: str, warm_up: int) -> float:
    """Units a second of a run's timed steps."""
    found = json.loads(line)
    return float(sum(found["units"][warm_up:]) / sum(found["seconds"][warm_up:]))


def shorten(path: Path, prompts: int, new_tokens: int) -> None:
    """Leave so many prompts and new tokens of a prepared workload of rollouts."""
    if path.exists():
        work = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**work, "prompts": work["prompts"][:prompts], "new_tokens": new_tokens}), encoding="utf-8")


def main() -> None:
    """Run every kind of work and print a JSON object a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", nargs="*", default=list(WORK), choices=list(WORK))
    parser.add_argument("--dtype", default="auto", help="of the sft steps: auto, bfloat16 or float32")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of rollouts and adapters")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest answer of rollouts and adapters, in tokens")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the public data sets")
    options = parser.parse_args()
    sides = {"before": options.before.resolve(), "after": options.after.resolve()}
    for work in options.work:
        prepare, timed = WORK[work]
        with tempfile.TemporaryDirectory() as folder:
            words = {"FOLDER": folder, "DATA": str(options.data), "DTYPE": options.dtype}
            run(sides["before"], prepare, words)
            shorten(Path(folder) / "rollouts.json", options.prompts, options.new_tokens)
            rates: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(options.runs):
                for side, checkout in sides.items():
                    # Each run gets a copy: a second one would find the checkpoint and the metrics of the first.
                    with tempfile.TemporaryDirectory() as copy:
                        shutil.copytree(folder, copy, dirs_exist_ok=True)
                        line = run(checkout, timed, {**words, "FOLDER": copy})
                    rates[side].append(round(rate(line, WARM_UP[work]), 2))
        ratio = statistics.median(rates["after"]) / statistics.median(rates["before"])
        print(json.dumps({"work": work, **rates, "ratio": round(ratio, 3)}), flush=True)


if __name__ == "__main__":
    main()
