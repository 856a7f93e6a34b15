"""Rates and rows by hand: what step s sees and how fast it learns."""

from math import cos, isclose, pi

import pytest
from loop_settings import settings

from posttrain.train.schedule import (
    epochs_seen,
    learning_rate,
    run_order,
    step_rows,
    total_steps,
    validation_interval,
)


def test_warm_up_rises_in_equal_steps_to_the_peak():
    found = [learning_rate(s, 20, settings(warmup=0.2, schedule="constant", learning_rate=0.8)) for s in range(6)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_the_rate_never_starts_at_zero_and_one_step_of_warm_up_is_the_peak():
    assert learning_rate(0, 10, settings(warmup=0.01)) == 1.0


def test_linear_falls_to_a_tenth():  # 4 steps, no warm-up: 0.1 + 0.9 (1 - s / 4)
    found = [learning_rate(s, 4, settings(schedule="linear")) for s in range(4)]
    assert found == pytest.approx([1.0, 0.775, 0.55, 0.325])
    assert learning_rate(999_999, 1_000_000, settings(schedule="linear")) == pytest.approx(0.1, abs=1e-6)


def test_cosine_falls_to_a_tenth():  # 0.1 + 0.9 (1 + cos(pi s / 4)) / 2
    found = [learning_rate(s, 4, settings()) for s in range(4)]
    assert found == pytest.approx([1.0, 0.1 + 0.45 * (1 + cos(pi / 4)), 0.55, 0.1 + 0.45 * (1 + cos(3 * pi / 4))])


def test_cosine_begins_at_the_peak_after_the_warm_up():
    found = [learning_rate(s, 10, settings(warmup=0.2)) for s in (1, 2, 6)]
    assert found == pytest.approx([1.0, 1.0, 0.55])


def test_seven_percent_of_100_steps_are_seven_steps():  # 100 * 0.07 is 7.000000000000001
    rates = [learning_rate(s, 100, settings(warmup=0.07)) for s in range(8)]
    assert isclose(rates[0], 1 / 7)
    assert rates[6] == rates[7] == 1.0


@pytest.mark.parametrize(
    ("rows", "epochs", "batch", "steps"),
    [(8, 1.0, 4, 2), (9, 1.0, 4, 3), (9, 2.0, 4, 5), (30, 0.1, 1, 3), (3, 1.0, 16, 1), (10, 0.01, 4, 1), (7, 1.5, 4, 3)],
)
def test_steps_of_a_run(rows: int, epochs: float, batch: int, steps: int):
    assert total_steps(rows, settings(epochs=epochs, batch=batch)) == steps


def test_every_row_once_an_epoch_and_a_short_last_step():
    found = list(run_order(7, settings(epochs=3, batch=4)))
    assert [len(step) for step in found] == [4, 4, 4, 4, 4, 1]
    flat = [row for step in found for row in step]
    epochs = [flat[:7], flat[7:14], flat[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3  # shuffled anew


def test_a_fraction_of_an_epoch_is_the_beginning_of_the_whole():
    whole = [row for step in run_order(40, settings(batch=4)) for row in step]
    assert [row for step in run_order(40, settings(batch=4, epochs=0.25)) for row in step] == whole[:10]


def test_a_step_is_known_without_the_steps_before():
    order = list(run_order(11, settings(epochs=5, batch=3)))
    for step in (17, 0, 9, 18):
        assert step_rows(step, 11, settings(epochs=5, batch=3)) == order[step]


def test_the_order_follows_the_seed():
    assert list(run_order(20, settings(seed=1))) == list(run_order(20, settings(seed=1)))
    assert list(run_order(20, settings(seed=1))) != list(run_order(20, settings(seed=2)))


def test_a_batch_larger_than_the_data_repeats_it_over_the_epochs():
    (first, second) = run_order(3, settings(epochs=2, batch=5))
    assert sorted(first[:3]) == [0, 1, 2]
    assert sorted(first[3:] + second) == [0, 1, 2]


def test_epochs_are_counted_in_rows_that_were_seen():
    found = [epochs_seen(step, 7, settings(epochs=1.5, batch=4)) for step in (1, 2, 3)]
    assert found == pytest.approx([4 / 7, 8 / 7, 11 / 7])  # 1.5 epochs of 7 rows are 11 rows


@pytest.mark.parametrize(
    ("changes", "every"),
    [({}, 0), ({"validate_every": 7}, 7), ({"patience": 1}, 5), ({"keep": "best"}, 5), ({"keep": "best", "batch": 64}, 1)],
)
def test_how_often_validation_is_due(changes: dict[str, object], every: int):
    assert validation_interval(80, settings(**changes)) == every
