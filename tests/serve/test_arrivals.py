"""The race `served`: arrivals and percentiles against what is known of them; what becomes of requests; what is compared."""

import argparse
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from listening import BASE, listening

from posttrain.models.base_model import BaseModel
from posttrain.serve.limits import Limits

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import arrivals
import served

SETTINGS = {"max_tokens": 4, "temperature": 1.0}


def test_arrivals_are_a_poisson_process():
    """As many as the rate says, within four deviations; gaps longer than their mean are a share of 1 / e."""
    times = arrivals.arrival_times(5.0, 2000.0, seed=1)
    assert abs(len(times) - 10_000) < 4 * 10_000**0.5
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 2000
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert sum(gap > 1 / 5 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.02)
    assert times == arrivals.arrival_times(5.0, 2000.0, seed=1) != arrivals.arrival_times(5.0, 2000.0, seed=2)


@pytest.mark.parametrize(("traffic", "shares"), [("even", (1 / 3, 1 / 3, 1 / 3)), ("zipf", (6 / 11, 3 / 11, 2 / 11))])
def test_models_are_asked_by_their_weights(traffic, shares):
    counts = Counter(arrivals.choose_models(["a", "b", "c"], traffic, 20_000, seed=0))
    assert [counts[name] / 20_000 for name in "abc"] == pytest.approx(shares, abs=0.015)


def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed():
    values = [float(v) for v in range(20, 0, -1)]
    assert [arrivals.percentile(values, share) for share in (50, 95, 99, 100)] == [10, 19, 20, 20]
    assert arrivals.percentile([7.0], 50) == 7
    assert arrivals.percentile([], 50) is None


def test_a_load_is_summed_up():
    """First tokens count from when they were due; 2 and 4 tokens in 1 and 3 s; one lost, so that the load was not held."""
    answers = [
        arrivals.Answer(1.0, 1.5, "ended", "", 10, 2, (2.0, 3.0)),
        arrivals.Answer(1.0, 1.0, "ended", "", 10, 4, (5.0, 6.0, 8.0)),
        arrivals.Answer(2.0, 2.0, "turned away", "full"),
    ]
    found = arrivals.summary(answers, 4.0)
    assert (found["arrivals"], found["sent"], found["ended"], found["turned_away"], found["held"]) == (3, 2, 2, 1, False)
    assert found["first_token_ms"] == {"p50": 1000, "p95": 4000, "p99": 4000}
    assert found["per_token_ms"]["p50"] == found["per_token_ms"]["p99"] == 1000
    assert found["sent_late_ms"]["p99"] == 500
    assert (found["tokens_per_s"], found["seconds_to_the_last"], found["arrivals_per_s"]) == (0.75, 8, 0.75)
    assert arrivals.summary(answers[:2], 4.0)["held"]
    assert not arrivals.summary([], 4.0)["held"]


def test_every_arrival_is_counted_whatever_became_of_it(tiny: BaseModel):
    plan = [arrivals.Arrival(0.0, BASE, [5 + k, 6, 7]) for k in range(6)]
    unknown = arrivals.Arrival(0.0, "nobody", [5])
    with listening(tiny) as server:
        found = arrivals.under_load(server.url, [*plan, unknown], SETTINGS, seconds=1.0)
        assert (found["sent"], found["ended"], found["failed"], found["held"]) == (7, 6, 1, False)
        assert found["prompt_tokens"] == 18
        assert 6 <= found["completion_tokens"] <= 24
        (reason,) = found["reasons"]
        assert reason.startswith("404")
        few = arrivals.under_load(server.url, plan, SETTINGS, seconds=1.0, streams=2)
        assert (few["ended"], few["turned_away"]) == (2, 4)
    with listening(tiny, limits=Limits(queue_seconds=1e-9)) as server:
        assert arrivals.under_load(server.url, plan, SETTINGS, seconds=1.0)["refused"] == 6


def test_settings_are_read_and_every_side_gets_the_same_plan():
    setting = served.setting_of("4-zipf@2.5")
    assert setting == ("4-zipf@2.5", ["a0", "a1", "a2", "a3"], "zipf", 2.5)
    assert served.setting_of("0-even") == ("0-even", [served.BASE], "even", served.RATE)
    for wrong in ("65-even", "4", "4-flat", "4-even@0", "4-even@"):
        with pytest.raises(argparse.ArgumentTypeError, match="allowed"):
            served.setting_of(wrong)
    prompts = [[k] for k in range(500)]
    settings = [setting, served.setting_of("0-even@2")]
    plans = served.plans(prompts, settings, 60.0)
    assert plans == served.plans(prompts, settings, 60.0)
    used = [tuple(arrival.prompt) for plan in plans.values() for arrival in plan]
    assert len(set(used)) == len(used) > 150


def test_times_are_compared_only_where_both_sides_held_the_load():
    held = {"held": True, "tokens_per_s": 30.0, "first_token_ms": {"p50": 100.0}, "per_token_ms": {"p50": None}}
    lost = {**held, "held": False, "tokens_per_s": 60.0, "first_token_ms": {"p50": 400.0}}
    found = served.ratios(
        {"loads": {"x": held, "y": held}}, {"loads": {"x": held | {"first_token_ms": {"p50": 400.0}}, "y": lost}}
    )
    assert found["x"] == {
        "both_held": True,
        "tokens_per_s": 1.0,
        "first_token_ms": {"p50": 0.25},
        "per_token_ms": {"p50": None},
    }
    assert found["y"] == {"both_held": False, "tokens_per_s": 0.5}


def test_memory_is_that_of_a_process_and_all_below_it():
    command = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE) as process:
        while len(found := served.tree(process.pid)) < 2:
            assert process.poll() is None
        assert found[0] == process.pid
        assert all(served.resident(each) > 0 for each in found)
        process.communicate(b"\n")
    assert served.tree(process.pid) == [process.pid]
    assert served.resident(process.pid) == 0
