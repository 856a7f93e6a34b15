"""The races of posttrain against what a user would run instead: `python benchmarks/run.py RACE`.

Each race prints one JSON object. Both sides are processes of their own, so that peak memory is each side's own; the peer runs
in `.venv-peers` (`make bench-setup`). Both get the same token ids in the same order, the same initial adapter (ours, written in
PEFT's format), the same learning rate. Losses must agree within 1 % over the first ten steps, else the race does not count.
Absolute seconds on a shared CPU mean little; the ratio of one run is the figure.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = ROOT / ".venv-peers/bin/python"
# Peers that need other versions have an environment of their own.
PPO_PEER, VLLM = ROOT / ".venv-peers-ppo/bin/python", ROOT / ".venv-peers-vllm/bin/python"
# The peer's settings that are tried; the first is the one whose losses are compared step by step.
SETTINGS = {
    "sft": ("bf16-padded", "bf16-grouped", "bf16-packed", "fp32-grouped"),
    "dpo": ("bf16-precomputed", "bf16", "fp32-precomputed"),
    "reward": ("bf16-grouped", "bf16-padded", "fp32-padded"),
}
PPO_SETTINGS = ("bf16", "bf16-micro4")
WARM_UP = 2


def side(python: Path | str, script: str, *arguments: str) -> dict[str, Any]:
    """Run one side and read the JSON object on its last line."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run([str(python), str(HERE / script), *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def speed(found: dict[str, Any], warm_up: int = WARM_UP) -> dict[str, Any]:
    """Units a second after the warm-up: median, and the slowest and fastest step."""
    rates = [u / s for u, s in zip(found["units"][warm_up:], found["seconds"][warm_up:], strict=True)]
    total = sum(found["units"][warm_up:]) / sum(found["seconds"][warm_up:])
    return {
        "per_second": round(total, 4), "min": round(min(rates), 4), "median": round(statistics.median(rates), 4),
        "max": round(max(rates), 4), "steps": len(rates), "peak_gib": round(found["peak_gib"], 2), "setting": found["setting"],
    }  # fmt: skip


def against_trl(race: str, steps: int, data: Path, rows: int, settings: tuple[str, ...]) -> dict[str, Any]:
    """One training race against TRL, in every setting that we found for it."""
    need(PEERS)
    with tempfile.TemporaryDirectory() as folder:
        side(sys.executable, "workload.py", race, folder, str(data), str(steps), str(rows), "1024")
        ours = side(sys.executable, "ours.py", race, folder, "auto")
        peers = []
        for index, setting in enumerate(settings):
            # a slow setting shows itself in few steps
            count = min(steps, WARM_UP + 3) if index and "fp32" in setting else steps
            peers.append(side(PEERS, "trl_peer.py", race, folder, setting, str(count)))
            print(json.dumps(speed(peers[-1])), file=sys.stderr)
    agreement = compare(ours, peers[0]) if race == "sft" else agree_in_float32(race, data)
    our_speed, their_speeds = speed(ours), [speed(p) for p in peers]
    best = max(their_speeds, key=lambda s: float(s["per_second"]))
    return {
        "race": race, "unit": "tokens" if race == "sft" else "pairs", "ours": our_speed, "peer": best,
        "ratio": round(our_speed["per_second"] / best["per_second"], 2),
        "memory_ratio": round(our_speed["peak_gib"] / best["peak_gib"], 3),
        **agreement, "peer_settings": their_speeds, "runs": 1,
        "versions": {"ours": ours["versions"], "peer": peers[0]["versions"]},
    }  # fmt: skip


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Whether the losses of the first ten steps agree within 1 %."""
    pairs = list(zip(ours["losses"][:10], peer["losses"][:10], strict=True))
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    return {
        "losses_agree": worst <= 0.01, "largest_loss_difference": round(worst, 5), "compared_steps": len(pairs),
        "losses": {"ours": [a for a, _ in pairs], "peer": [b for _, b in pairs]},
    }  # fmt: skip


def agree_in_float32(race: str, data: Path, steps: int = 10, rows: int = 2) -> dict[str, Any]:
    """Ten small steps of short rows of both sides in float32.

    A margin is a difference of sums over hundreds of tokens; bfloat16 moves each by a hundredth of a nat, on both sides and not
    alike, so that the losses of a few pairs differ by several percent whoever is right.
    """
    with tempfile.TemporaryDirectory() as folder:
        side(sys.executable, "workload.py", race, folder, str(data), str(steps), str(rows), "384")
        ours = side(sys.executable, "ours.py", race, folder, "float32")
        setting = "fp32-precomputed" if race == "dpo" else "fp32-padded"
        return compare(ours, side(PEERS, "trl_peer.py", race, folder, setting, str(steps)))


def rollouts(data: Path) -> dict[str, Any]:
    """Sampling with each engine; every side warms up by itself."""
    with tempfile.TemporaryDirectory() as folder:
        side(sys.executable, "rollouts.py", "prepare", folder, str(data))
        ours = side(sys.executable, "rollouts.py", "posttrain", folder)
        peers = {"generate": side(need(PEERS), "rollouts.py", "generate", folder)}
        peers["vllm"] = side(need(VLLM), "rollouts.py", "vllm", folder)
    return race_of("rollouts", "tokens", ours, peers, warm_up=0)


def adapters(data: Path) -> dict[str, Any]:
    """The same requests on the base alone and over 16 adapters mixed; peers with the adapters."""
    with tempfile.TemporaryDirectory() as folder:
        side(sys.executable, "adapters.py", "prepare", folder, str(data))
        alone = side(sys.executable, "adapters.py", "posttrain", folder, "0")
        ours = side(sys.executable, "adapters.py", "posttrain", folder, "16")
        peers = {"no adapter": alone, "peft": side(need(PEERS), "adapters.py", "peft", folder, "16")}
        peers["vllm"] = side(need(VLLM), "adapters.py", "vllm", folder, "16")
    return race_of("adapters", "tokens", ours, peers, warm_up=0)


def ppo(data: Path, settings: tuple[str, ...]) -> dict[str, Any]:
    """One whole PPO iteration: it takes minutes, and what warms up in it seconds."""
    with tempfile.TemporaryDirectory() as folder:
        side(sys.executable, "ppo.py", "prepare", folder, str(data))
        ours = side(sys.executable, "ppo.py", "posttrain", folder)
        peers = {setting: side(need(PPO_PEER), "ppo.py", "trl", folder, setting) for setting in settings}
    return race_of("ppo", "prompts", ours, peers, warm_up=0)


def need(python: Path) -> Path:
    """The peer's environment, or the end."""
    if not python.exists():
        raise SystemExit(f"{python.parent.parent.name} is not installed: make bench-setup")
    return python


def race_of(race: str, unit: str, ours: dict[str, Any], peers: dict[str, dict[str, Any]], *, warm_up: int) -> dict[str, Any]:
    """A race without losses to compare: what is sampled is each side's own."""
    our_speed, their_speeds = speed(ours, warm_up), {name: speed(peer, warm_up) for name, peer in peers.items()}
    best = max(their_speeds.values(), key=lambda s: float(s["per_second"]))
    return {
        "race": race, "unit": unit, "ours": our_speed, "peer": best,
        "ratio": round(our_speed["per_second"] / best["per_second"], 2),
        "ratios": {name: round(our_speed["per_second"] / s["per_second"], 2) for name, s in their_speeds.items()},
        "memory_ratio": round(our_speed["peak_gib"] / best["peak_gib"], 3), "losses_agree": None, "peers": their_speeds,
        "last": {"ours": ours.get("last"), **{name: peer.get("last") for name, peer in peers.items()}}, "runs": 1,
        "versions": {"ours": ours["versions"], **{name: peer["versions"] for name, peer in peers.items()}},
    }  # fmt: skip


def quickstart(recipe: Path) -> dict[str, Any]:
    """The whole quickstart from an empty run folder, the base already in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        found = side(sys.executable, "ours.py", "quickstart", folder, str(recipe))
    return {
        "race": "quickstart", "ours": found, "peer": None, "ratio": None, "memory_ratio": None, "losses_agree": None,
        "bar": {"minutes": 10, "gib": 4}, "versions": {"ours": found["versions"]},
    }  # fmt: skip


def main() -> None:
    """Run one race and print its JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "race", choices=[*SETTINGS, "ppo", "rollouts", "adapters", "served", "growth", "quickstart", "gpu-sft", "gpu-lora"]
    )
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps a side, the first two are warm-up")
    parser.add_argument("--rows", type=int, default=0, help="rows a step (default: 16 for sft, 8 pairs for dpo)")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the public data sets")
    parser.add_argument(
        "--settings", help="the peer's settings to try, comma separated (default: all; the first is compared step by step)"
    )
    parser.add_argument("--model", help="another model to race with: a package, or a folder in the Hugging Face layout")
    parser.add_argument("--recompute", action="store_true", help="compute activations again in the backward (gpu races)")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/quickstart.toml")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    if options.model:
        os.environ["RACE_MODEL"] = options.model
    if options.race in SETTINGS:
        rows = options.rows or (16 if options.race == "sft" else 8)
        settings = tuple(options.settings.split(",")) if options.settings else SETTINGS[options.race]
        result = against_trl(options.race, options.steps, options.data, rows, settings)
    elif options.race == "rollouts":
        result = rollouts(options.data)
    elif options.race == "adapters":
        result = adapters(options.data)
    elif options.race == "ppo":
        result = ppo(options.data, tuple(options.settings.split(",")) if options.settings else PPO_SETTINGS)
    elif options.race == "served":
        result = side(sys.executable, "served.py", "--data", str(options.data))
    elif options.race == "growth":
        result = side(sys.executable, "growth.py")
    elif options.race.startswith("gpu"):
        result = side(sys.executable, "gpu.py", options.race, str(options.steps), *["recompute"] * options.recompute)
    else:
        result = quickstart(options.recipe)
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
