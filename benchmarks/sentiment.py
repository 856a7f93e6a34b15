"""A controlled experiment: what do best-of-n, DPO and PPO make of the same preferences, at the same distance from the start?

    python benchmarks/sentiment.py --out runs/sentiment [--model package:smollm2-135m-instruct] [--seeds 6] [--jobs 2] [--quick]
                                   [--first 100] [--set ppo_rate=3e-4 ...]

As in the DPO paper (Rafailov et al. 2023, section 6.1), what people want is replaced by something known: the log odds that a
sentence praises, by a classifier (`sentiment_gold.py`). Preferences between two continuations of a prompt are drawn from it;
a reward model, DPO and PPO learn from those draws alone, never from gold. Each seed has its own continuations, draws, reward
model and policies, and every budget is a run of the product: a `beta` of DPO, a `kl_coef` of PPO, an n of best-of-n.

What is measured of every policy is the same: on held-out prompts, gold of its own samples, and the sum over a sample of
log pi - log init, in nats. Best-of-n has no log pi: its KL is the one of `posttrain.evaluate.best_of`. Prints one JSON object;
writes it and `frontier.svg` into the folder. A seed's part that is there already is not made again. A package is measured at
the size `WHOLE` where torch sees a GPU, and uses it; the small model stays on the CPU.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import sentiment_gold as known
import torch
from standalone_svg import standalone_svg

from posttrain.artifacts import write_json, write_jsonl
from posttrain.evaluate.best_of import measure_best_of, sample_candidates
from posttrain.evaluate.stats import mean, wilson
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.models.adapter_files import Policies
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.batches import batch_logprobs, pack_trees, sum_by_row
from posttrain.pipeline import run_recipe
from posttrain.recipe import parse_recipe, to_toml
from posttrain.records import Message

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = ROOT.parent / "shared/data/sentiment/sentence_polarity.zip"
# Held-out sentences: their first words are the prompts of every measurement.
HELD_OUT = 400
# Distances at which the methods are set beside each other, nats.
DISTANCES = (0.5, 1.0, 2.0, 4.0)


class Size(NamedTuple):
    """How much of everything: new tokens, passes over how many of the start's sentences (0 is all), pairs, the budgets of DPO
    and PPO, PPO's iterations of prompts, prompts measured and best-of-n's samples of each, learning rates, and passes of the
    reward model."""

    new_tokens: int
    epochs: float
    sentences: int
    pairs: int
    betas: tuple[float, ...]
    kl_coefs: tuple[float, ...]
    iterations: int
    prompts: int
    measured: int
    samples: int
    dpo_rate: float
    ppo_rate: float
    reward_rate: float
    reward_epochs: float = 1


SMALL = Size(
    new_tokens=20, epochs=5, sentences=0, pairs=4000, betas=(0.05, 0.1, 0.2, 0.8), kl_coefs=(0.03, 0.06, 0.1, 0.3),
    iterations=24, prompts=96, measured=150, samples=32, dpo_rate=3e-3, ppo_rate=1e-3, reward_rate=2e-3,
)  # fmt: skip
PACKAGE = Size(
    new_tokens=20, epochs=1, sentences=2500, pairs=1600, betas=(0.05, 0.3), kl_coefs=(0.03, 0.15), iterations=8, prompts=48,
    measured=64, samples=16, dpo_rate=1e-4, ppo_rate=2e-4, reward_rate=2e-4, reward_epochs=2,
)  # fmt: skip
WHOLE = Size(
    new_tokens=32, epochs=2, sentences=0, pairs=3000, betas=(0.03, 0.1, 0.3, 1.0), kl_coefs=(0.02, 0.05, 0.1, 0.3),
    iterations=20, prompts=96, measured=150, samples=32, dpo_rate=2e-4, ppo_rate=2e-4, reward_rate=2e-4,
)  # fmt: skip
QUICK = Size(
    new_tokens=20, epochs=0.5, sentences=400, pairs=100, betas=(0.1,), kl_coefs=(0.05,), iterations=2, prompts=16,
    measured=16, samples=8, dpo_rate=1e-3, ppo_rate=1e-3, reward_rate=1e-3,
)  # fmt: skip


class Prompt(NamedTuple):
    """A prompt as text and as ids."""

    text: str
    ids: list[int]


def size_of(model: str, quick: bool, changed: Sequence[str] = ()) -> Size:
    """The experiment's size, with fields changed by texts such as `pairs=100`."""
    size = QUICK if quick else SMALL if model == "small" else WHOLE if device_of(model) == "cuda" else PACKAGE
    return size._replace(**{name: json.loads(value) for name, _, value in (text.partition("=") for text in changed)})


def device_of(model: str) -> str:
    """Where it is computed. The small model is faster on a CPU."""
    return "cuda" if model != "small" and torch.cuda.is_available() else "cpu"


# --- the start, made once ---------------------------------------------------------------------------------------------


def prepare(folder: Path, model: str, size: Size) -> dict[str, Any]:
    """Gold, the start of all policies, and the prompts."""
    import sentiment_start as begin

    folder.mkdir(parents=True, exist_ok=True)
    sentences = known.read_sentences(SENTENCES)
    words = begin.commonest_words([text for text, _ in sentences.policy]) if model == "small" else None
    vocabulary = None if words is None else set(words)
    split = [(known.split_sentence(text, vocabulary), praises) for text, praises in sentences.policy]
    cut = [(parts, praises) for parts, praises in split if parts is not None]
    held_out, train = cut[:HELD_OUT], cut[HELD_OUT:]
    write_json(folder / "held-out.json", list(dict.fromkeys(prompt for (prompt, _), _ in held_out)))
    write_json(folder / "prompts.json", list(dict.fromkeys(prompt for (prompt, _), _ in train)))
    rows = begin.start_rows(train[: size.sentences or None], moods=model == "small")
    write_jsonl(folder / "sentences-train.jsonl", rows)
    suite = begin.write_suite(folder, [" ".join(parts) for parts, _ in held_out[:20]])
    base = model
    if words is not None:
        base = str(folder / "random")
        if not Path(base).exists():
            begin.make_random(Path(base), words)
    begin.train_start(folder, base, folder / "sentences-train.jsonl", suite, epochs=size.epochs, device=device_of(model))
    right = known.accuracy(known.fit_gold(sentences.gold), sentences.policy)
    return {"gold_accuracy": wilson(sum(right), len(right))._asdict(), "start_rows": len(rows)}


# --- one seed ---------------------------------------------------------------------------------------------------------


def run_seed(folder: Path, model: str, size: Size, seed: int) -> None:
    """Everything of one seed: preferences, one recipe with all stages, and the measurements. What is there is kept."""
    own = folder / f"seed-{seed}"
    own.mkdir(exist_ok=True)
    at = {"dtype": "float32" if model == "small" else "auto", "device": device_of(model)}
    gold = known.fit_gold(known.read_sentences(SENTENCES).gold)
    if not (own / "pairs.jsonl").exists():
        base = load_base(str(folder / "start"), **at)
        write_jsonl(own / "pairs.jsonl", draw_pairs(base, gold, json.loads((folder / "prompts.json").read_text()), size, seed))
    recipe = parse_recipe(recipe_of(folder, own, size, seed, at))
    run_recipe(recipe, to_toml(recipe), own / "run")
    base = load_base(str(folder / "start"), **at)
    policies = Policies(base, own / "run")
    prompts = prompt_rows(base, json.loads((folder / "held-out.json").read_text())[: size.measured])
    for stage in ("base", *(s.name for s in recipe.stage if s.kind in ("dpo", "ppo"))):
        if not (own / f"{stage}.json").exists():
            write_json(
                own / f"{stage}.json", measure_policy(base, policies.activate(stage), gold, prompts, seed, size.new_tokens)
            )
    if not (own / "best-of.json").exists():
        settings = SamplingSettings(size.new_tokens, 1.0, 1.0, 10_000 + seed)
        found = sample_candidates(
            base, "base", policies.activate("rm"), [p.ids for p in prompts], settings, samples=size.samples
        )
        answers = [[rollout.text for rollout in rollouts] for rollouts in found.rollouts]
        gold_PN = known.gold_of(gold, [row.text for row in prompts], answers)
        measured = measure_best_of(found.score_PN, gold_PN)
        together = float(numpy.corrcoef(found.score_PN.ravel(), gold_PN.ravel())[0, 1])
        write_json(own / "best-of.json", {**measured, "score_gold_correlation": together})


def draw_pairs(base: BaseModel, gold: known.Gold, prompts: Sequence[str], size: Size, seed: int) -> list[dict[str, Any]]:
    """Prompts with two continuations each, and which one a draw from gold prefers; two that are alike are left out."""
    chance = random.Random(seed)
    chosen = prompt_rows(base, chance.choices(prompts, k=size.pairs))
    settings = SamplingSettings(size.new_tokens, 1.0, 1.0, seed, False)
    answers = generate(base, [row.ids for row in chosen for _ in range(2)], settings, "base")
    found = []
    for i, row in enumerate(chosen):
        sides = [answer.text.strip() for answer in answers[2 * i : 2 * i + 2]]
        if sides[0] != sides[1] and all(sides):
            first = known.prefer(*(gold(f"{row.text} {side}") for side in sides), chance)
            found.append({"id": f"p{i}", "prompt": row.text, "chosen": sides[not first], "rejected": sides[first]})
    return found


def recipe_of(folder: Path, own: Path, size: Size, seed: int, at: dict[str, str]) -> dict[str, Any]:
    """The recipe of a seed: a reward model, and DPO and PPO at every budget, all from the start."""
    data = {"data": str(own / "pairs.jsonl"), "allow_dropped": 0.05}
    trained = {**data, "init": "base", "batch": 32, "max_tokens": 128}
    stages: list[dict[str, Any]] = [
        {
            "kind": "reward",
            "name": "rm",
            **trained,
            "batch": 16,
            "learning_rate": size.reward_rate,
            "validation": 0.1,
            "epochs": size.reward_epochs,
        }
    ]
    for beta in size.betas:
        stages.append(
            {"kind": "dpo", "name": f"dpo-{beta:g}", **trained, "beta": beta, "learning_rate": size.dpo_rate, "epochs": 1,
             "validation": 0.05}
        )  # fmt: skip
    for kl_coef in size.kl_coefs:
        stages.append(
            {"kind": "ppo", "name": f"ppo-{kl_coef:g}", "init": "base", "reward": "rm", "data": data["data"],
             "iterations": size.iterations, "prompts": size.prompts, "minibatch": size.prompts // 2, "ppo_epochs": 2,
             "max_new_tokens": size.new_tokens, "kl_coef": kl_coef, "learning_rate": size.ppo_rate, "missing_eos_penalty": 1.0}
        )  # fmt: skip
    return {
        "name": "sentiment", "seed": seed, "base": {"model": str(folder / "start"), **at},
        "adapter": {"rank": 16}, "stage": stages,
        "evaluation": {"suites": [str(folder / "sentences.toml")], "samples": ["the film is"], "sample_tokens": 24},
    }  # fmt: skip


def prompt_rows(base: BaseModel, prompts: Sequence[str]) -> list[Prompt]:
    """Prompts as ids."""
    return [Prompt(text, base.chat.encode_prompt([Message("user", text)])) for text in prompts]


@torch.no_grad()
def measure_policy(
    base: BaseModel, policy: str, gold: known.Gold, prompts: Sequence[Prompt], seed: int, new_tokens: int, *, samples: int = 4
) -> dict[str, Any]:
    """Gold and KL of a policy's own samples, with intervals over prompts."""
    asked = [row.ids for row in prompts for _ in range(samples)]
    answers = generate(base, asked, SamplingSettings(new_tokens, 1.0, 1.0, 20_000 + seed, False), policy)
    kl_PN = []
    for i, row in enumerate(prompts):
        own = [list(a.completion_ids) for a in answers[i * samples : (i + 1) * samples]]
        batch = pack_trees([(row.ids, own)], base.device)
        sums = [sum_by_row(batch_logprobs(base, batch, name).double(), batch) for name in (policy, "base")]
        kl_PN.append((sums[0] - sums[1]).tolist())
    texts = [[a.text for a in answers[i * samples : (i + 1) * samples]] for i in range(len(prompts))]
    gold_PN = known.gold_of(gold, [row.text for row in prompts], texts)
    return {
        "n": len(asked), "kl": mean(numpy.mean(kl_PN, 1).tolist())._asdict(), "gold": mean(gold_PN.mean(1).tolist())._asdict(),
        "praises": float((gold_PN > 0).mean()), "ended": sum(a.ended for a in answers) / len(answers),
        "tokens": sum(len(a.completion_ids) for a in answers) / len(answers),
        "different": len({a.text for a in answers}) / len(answers),
    }  # fmt: skip


# --- all seeds together -----------------------------------------------------------------------------------------------


def points_of(own: Path) -> dict[str, list[dict[str, Any]]]:
    """What a seed measured: of each method its budgets with KL and gold, the smallest distance first."""
    found: dict[str, list[dict[str, Any]]] = {"dpo": [], "ppo": [], "best-of-n": []}
    for path in own.glob("*-*.json"):
        method, _, budget = path.stem.partition("-")
        if method in found:
            row = json.loads(path.read_text())
            rest = {key: row[key] for key in ("praises", "ended", "tokens", "different")}
            found[method].append({"budget": float(budget), "kl": row["kl"]["value"], "gold": row["gold"]["value"], **rest})
    for row in json.loads((own / "best-of.json").read_text())["best_of"]:
        if row["n"] & (row["n"] - 1) == 0 and row["n"] > 1:
            point = {"budget": row["n"], "kl": row["kl"], "kl_bound": row["kl_bound"], "gold": row["gold"]["value"]}
            found["best-of-n"].append(point)
    return {method: sorted(points, key=lambda p: p["kl"]) for method, points in found.items()}


def frontier(seeds: Sequence[dict[str, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    """Of each method and budget the means over seeds with their intervals."""
    found = {}
    for method in seeds[0]:
        budgets = sorted({p["budget"] for p in seeds[0][method]}, reverse=method != "best-of-n")
        rows = []
        for budget in budgets:
            own = [p for seed in seeds for p in seed[method] if p["budget"] == budget]
            rows.append({"budget": budget, **{k: mean([p[k] for p in own])._asdict() for k in own[0] if k != "budget"}})
        found[method] = rows
    return found


def at_distance(points: Sequence[dict[str, Any]], start: float, distance: float) -> float | None:
    """Gold of a method at a KL, on lines between the start and its budgets that are straight in sqrt(KL), as gold is near the
    start (Gao et al. 2023); None beyond the furthest."""
    if not points or points[-1]["kl"] < distance:
        return None
    return float(numpy.interp(distance**0.5, [0.0, *(p["kl"] ** 0.5 for p in points)], [start, *(p["gold"] for p in points)]))


def compare(seeds: Sequence[dict[str, list[dict[str, Any]]]], starts: Sequence[float]) -> list[dict[str, Any]]:
    """Differences of the methods at equal distances, paired by seed; a method that does not reach one is left out there."""
    rows = []
    for distance in DISTANCES:
        for a, b in (("ppo", "dpo"), ("ppo", "best-of-n"), ("dpo", "best-of-n")):
            both = [
                (at_distance(s[a], g, distance), at_distance(s[b], g, distance)) for s, g in zip(seeds, starts, strict=True)
            ]
            differences = [x - y for x, y in both if x is not None and y is not None]
            if differences:
                rows.append({"kl": distance, "first": a, "second": b, "gold_difference": mean(differences)._asdict()})
    return rows


def summarise(folder: Path, seeds: Sequence[int], about: dict[str, Any]) -> dict[str, Any]:
    """The result over all seeds, and its drawing."""
    from posttrain.report.plots import FrontierLine, FrontierPoint, frontier_chart

    own = [folder / f"seed-{seed}" for seed in seeds]
    starts = [json.loads((one / "base.json").read_text())["gold"]["value"] for one in own]
    points = [points_of(one) for one in own]
    rewards = [json.loads((one / "run/evaluate/rm/reward.json").read_text()) for one in own]
    lines = frontier(points)
    result = {
        **about, "seeds": list(seeds), "start_gold": mean(starts)._asdict(),
        "reward_accuracy": mean([r["accuracy"]["value"] for r in rewards])._asdict(),
        "score_gold_correlation": mean(
            [json.loads((one / "best-of.json").read_text())["score_gold_correlation"] for one in own]
        )._asdict(),
        "frontier": lines, "at_equal_kl": compare(points, starts),
    }  # fmt: skip
    drawn = [
        FrontierLine(
            {"dpo": "DPO", "ppo": "PPO"}.get(method, method), colour,
            [FrontierPoint(f"{row['budget']:g}", *(tuple(row[k][p] for p in ("value", "low", "high")) for k in ("kl", "gold")))
             for row in rows],
        )
        for colour, (method, rows) in enumerate(lines.items(), 1)
    ]  # fmt: skip
    chart = frontier_chart(
        drawn, x_label="KL from the start, nats a completion", y_label="gold, log odds", start=mean(starts).value
    )
    (folder / "frontier.svg").write_text(standalone_svg(chart), encoding="utf-8")
    write_json(folder / "result.json", result)
    return result


def work(options: argparse.Namespace, seeds: Sequence[int]) -> None:
    """Seeds in processes of their own, one thread each: tiny models are slower on two."""
    waiting, running = list(seeds), []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            command = [sys.executable, __file__, *sys.argv[1:], "--seed", str(waiting.pop(0))]
            threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
            environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            running.append(subprocess.Popen(command, env=environment))
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            if process.returncode:
                for other in running:
                    other.terminate()
                raise SystemExit(f"a seed ended with exit code {process.returncode}")
        time.sleep(0.5)


def main() -> None:
    """Run the experiment and print its JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="small, or a base such as package:smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/sentiment", help="folder of everything that is made")
    parser.add_argument("--seeds", type=int, help="how many (default: 6; of a package 2; quick 1)")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at once")
    parser.add_argument("--quick", action="store_true", help="everything once and small: whether it runs, not what comes out")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other sizes, such as pairs=100")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = size_of(options.model, options.quick, options.set)
    if options.seed is not None:
        run_seed(options.out, options.model, size, options.seed)
        return
    started = time.monotonic()
    about = {
        "experiment": "sentiment",
        "model": options.model,
        "quick": options.quick,
        **prepare(options.out, options.model, size),
    }
    count = options.seeds or (1 if options.quick else 6 if options.model == "small" else 2)
    seeds = range(options.first, options.first + count)
    work(options, seeds)
    result = summarise(options.out, seeds, {**about, "size": size._asdict()})
    print(json.dumps({**result, "minutes": round((time.monotonic() - started) / 60, 1)}, indent=2))


if __name__ == "__main__":
    main()
