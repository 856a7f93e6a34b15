"""Charts, curves and the pipeline's picture: what is drawn, in the page's colours, each number once."""

import re
from pathlib import Path

from pages import Page
from written_runs import scores, write_run

from posttrain.report import formatting, plots
from posttrain.report.picture import nodes_of, picture
from posttrain.report.run import RunRecord, StageRecord, load_run
from posttrain.report.training import charts_of, per_iteration, read_series, training
from posttrain.stages import KINDS

BASE = scores("base", follows=4, facts=20)


def test_a_chart_has_the_pages_colours_and_its_own_ids():
    first, second = (plots.curves([plots.Series("training", 1, range(5), ys)]) for ys in ([3, 2, 1, 1, 2], [1, 1, 1, 1, 1]))
    assert set(re.findall(r"var\((--\w+)\)", first)) <= {"--ink", "--soft", "--line", "--better", "--font"} | {
        f"--c{i}" for i in range(8)
    }
    assert not re.findall(r"#[0-9a-f]{6}\b", first)
    ids = [set(re.findall(r'id="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_labels_of_small_numbers_keep_their_digits():
    svg = plots.curves([plots.Series("last", 1, range(4), [0.0, 0.00005, 0.0001, 0.0002])])
    assert "0.00005" in Page(svg).text or "0.00010" in Page(svg).text


def test_every_point_of_a_short_line_can_be_read_by_hovering():
    titles = re.findall(r"<title>(.*?)</title>", plots.curves([plots.Series("training", 1, (1, 2, 3), (0.5, 0.25, 0.125))]))
    assert titles == ["training · step 1: 0.5", "training · step 2: 0.25", "training · step 3: 0.125"]


def test_the_tax_chart_names_stages_until_they_crowd():
    def drawn(count: int) -> str:
        points = [plots.Point(f"s{i}", i, "base", (i, i - 1, i + 1), (0.1, -1, 1)) for i in range(1, count + 1)]
        return Page(plots.capability_and_gain(points, base="base", labels=("g", "c"))).text

    assert all(f" s{i} " in f" {drawn(3)} " for i in (1, 2, 3))
    assert " s5 " not in drawn(6).split("·")[0]


def test_each_metric_is_drawn_once_and_validation_beside_training():
    rows = [
        {"step": 1, "dpo/loss": 0.7, "dpo/chosen_log_ratio": 0.0, "dpo/rejected_log_ratio": 0.0, "train/learning_rate": 1e-4,
         "train/epoch": 0.1, "time/step": 2.0, "dpo/other": 1.0, "dpo/validation_other": 1.0, "dpo/nothing": None},
        {"step": 2, "dpo/loss": 0.6, "dpo/validation_loss": 0.65},
    ]  # fmt: skip
    found = read_series(rows)
    charts = charts_of(found, KINDS["dpo"].charts)
    drawn = [name for chart in charts for name in chart.names]
    assert sorted(drawn) == sorted(found) == sorted(set(drawn))
    assert "dpo/nothing" not in found
    assert "train/epoch" not in found
    assert charts[0].names == ("dpo/loss", "dpo/validation_loss")
    assert ("dpo/chosen_log_ratio", "dpo/rejected_log_ratio") in [chart.names for chart in charts]
    assert ("dpo/other", "dpo/validation_other") in [chart.names for chart in charts]
    assert [chart.title for chart in charts if not chart.open] == ["learning rate"]


def test_a_kl_is_named_by_what_it_is_counted_over():
    titles = {}
    for kind in ("dpo", "ppo"):
        (chart,) = charts_of(read_series([{"step": 1, f"{kind}/kl": 0.5}]), KINDS[kind].charts)
        titles[kind] = chart.title
    assert titles == {"dpo": "KL to the reference, nats per token", "ppo": "KL to the reference, nats per completion"}


def test_the_picture_shows_what_every_stage_comes_from(tmp_path: Path):
    stages = [
        {"name": "sft", "data": "d.jsonl"},
        {"name": "rm", "kind": "reward", "init": "sft", "data": [{"path": "d.jsonl", "weight": 2.0}, {"path": "e.jsonl"}]},
        {
            "name": "ppo",
            "kind": "ppo",
            "init": "sft",
            "reward": "rm",
            "manifest": {"inputs": {"sft": "print-sft", "rm": "print-rm"}},
        },
    ]
    run = load_run(write_run(tmp_path / "run", {"base": BASE}, stages))
    nodes = {node.name: node for node in nodes_of(run)}
    assert (nodes["sft"].depth, nodes["sft"].lane) == (1, 0)
    assert (nodes["rm"].depth, nodes["rm"].lane) == (2, 0)
    assert (nodes["ppo"].depth, nodes["ppo"].lane) == (2, 1)
    assert nodes["ppo"].inputs == (("reward", "rm"),)
    assert nodes["rm"].data == (("d.jsonl", "7 rows · h"), ("e.jsonl", "not read yet"))
    page = Page(picture(run))
    assert "rm (reward) from sft; ppo (ppo) from sft" in page.having("svg")[0]["aria-label"]
    assert len(page.having("path", **{"class": "edge dashed"})) == 1


def test_no_label_stands_on_a_line(tmp_path: Path):
    """What an input is there stands in the box that it leads to, in both forms of the picture."""
    stages = [
        {"name": "sft"}, {"name": "dpo", "init": "sft"}, {"name": "rm", "kind": "reward", "init": "sft"},
        {"name": "ppo", "kind": "ppo", "init": "sft", "reward": [{"models": ["rm"]}], "gold_compare": ["dpo"],
         "manifest": {"inputs": {"sft": "s", "rm": "r", "dpo": "d"}}},
    ]  # fmt: skip
    run = load_run(write_run(tmp_path / "run", {"base": BASE}, stages))
    html = str(picture(run))
    assert html.count(">reward: rm<") == html.count(">gold_compare: dpo<") == 2
    across = html.split('class="picture across"')[1].split("</svg>")[0]
    boxes = [tuple(map(float, found)) for found in re.findall(
        r'<rect class="box[^"]*" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', across)]  # fmt: skip
    texts = [tuple(map(float, found)) for found in re.findall(r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)"', across)]
    assert len(texts) > 12
    for x, y in texts:
        assert any(left < x < left + wide and top < y < top + high for left, top, wide, high in boxes), (x, y)
    assert "middle" not in across


def test_what_is_measured_once_an_iteration_is_drawn_over_iterations():
    rows = [
        {"step": step, "ppo/loss": step / 10, "ppo/score": float(step // 3), "ppo/kl": 0.1 * (step // 3), "ppo/score/rm": 1.0}
        for step in range(6)
    ]
    rows[2]["ppo/gold"], rows[5]["ppo/gold"] = 0.5, 0.7
    found = per_iteration(rows, KINDS["ppo"].iterations)
    assert found == {
        "ppo/score": [(1.0, 0.0), (2.0, 1.0)], "ppo/kl": [(1.0, 0.0), (2.0, 0.1)], "ppo/score/rm": [(1.0, 1.0), (2.0, 1.0)],
        "ppo/gold": [(1.0, 0.5), (2.0, 0.7)],
    }  # fmt: skip
    stage = StageRecord("ppo", "ppo", "sft", (), {}, tuple(rows), None, "finished")
    page = Page(training(RunRecord("r", {}, "", {}, (stage,), (), ())))
    titles = [label["aria-label"] for label in page.having("svg")]
    assert "ppo, score: training" in titles
    assert "training · iteration 2: 1" in page.text
    assert "training · step 5: 0.5" in page.text
    assert "training · step 5: 1" not in page.text


def test_numbers_as_words():
    assert formatting.measured(0.4526, "share") == "45.3\u202f%"
    assert formatting.signed(-0.061, "share") == "−6.1"
    assert formatting.signed(-0.0001, "share") == "0.0"
    assert formatting.signed(0.13249, "nats") == "+0.132"
    assert formatting.span({"low": -0.5, "high": 0.25}, "share") == "−50.0 to 25.0"
    assert [formatting.duration(s) for s in (2.34, 59.99, 245, 11_520, None)] == [
        "2.3 s",
        "60.0 s",
        "4 min 05 s",
        "3 h 12 min",
        "–",
    ]
    assert formatting.shorten("abcdefghij", 7) == "abc…hij"
    assert formatting.shorten("abcdefg", 7) == "abcdefg"
    assert formatting.aligned([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d"
