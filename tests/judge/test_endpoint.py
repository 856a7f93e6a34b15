"""Judges behind a server: what is read from its replies, what is asked again, and what is never asked twice."""

import json
import math
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chat_server import ChatServer, Fault, chat_server
from posttrain.cli import main
from posttrain.errors import EndpointError, Interrupted, RecipeError
from posttrain.generate import remote as remote_file
from posttrain.generate.chat_reply import RemoteChoice, RemoteReply
from posttrain.judge import endpoint as endpoint_file
from posttrain.judge.endpoint import SAMPLES
from posttrain.judge.open import JudgeContext, open_judge
from posttrain.judge.verdict import ComparisonRequest, GradingRequest, PairwiseJudge
from posttrain.stages.judge_settings import JudgeSettings
from posttrain.stop import StopSignal

PAIRS = [
    ComparisonRequest("Name a colour.", "Red.", "A colour is a property of light.", "Which answer is longer?"),
    ComparisonRequest("What is 2 + 2?", "It is four, as everybody knows.", "4", "Which answer is longer?"),
    ComparisonRequest("Say hi.", "Hi!", "Hi!", "Which answer is longer?"),
]
WANTED = [0.15, 0.85, 0.5]  # (0.2 + 1 - 0.9) / 2, (0.9 + 1 - 0.2) / 2, and one half in both orders
SECRET = "a-key-that-nobody-may-see"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_file, "FIRST_WAIT", 0.01)


@contextmanager
def judging(server: ChatServer, folder: Path, stop: StopSignal | None = None, **more: object) -> Iterator[PairwiseJudge]:
    """The judge of a recipe that names the server."""
    settings = JudgeSettings.model_validate({"name": server.url, "model": "judge", "key": "TEST_KEY", "retries": 2, **more})
    with open_judge(settings, JudgeContext(None, None, folder, stop, where='stage "labels"')) as judge:
        yield judge


def probabilities(judge: PairwiseJudge) -> list[float | None]:
    return [verdict.probability for verdict in judge.compare(PAIRS)]


def test_a_verdict_is_the_normalised_probability_of_the_two_options_in_both_orders(tmp_path: Path) -> None:
    with chat_server(ChatServer()) as server, judging(server, tmp_path) as judge:
        assert probabilities(judge) == pytest.approx(WANTED)
        assert len(server.asked) == 5, "six prompts, and both orders of two equal answers are the same one"
        grades = judge.grade([GradingRequest("p", "short", "Is it long?"), GradingRequest("p", "long " * 9, "Is it long?")])
        assert [grade.probability for grade in grades] == pytest.approx([0.2, 0.9])
    assert all(body["max_tokens"] == 1 and body["temperature"] == 0 for body in server.asked)
    assert server.keys == {""}


@pytest.mark.parametrize("refuses", [True, False])
def test_a_server_without_log_probabilities_is_asked_for_samples(tmp_path: Path, refuses: bool) -> None:
    """Whether it refuses to give them or leaves them out. The first request alone shows it."""
    server = ChatServer(logprobs=not refuses)
    if not refuses:
        answer = server.answer
        server.answer = lambda body: answer({**body, "logprobs": False})  # type: ignore[method-assign]
    with chat_server(server), judging(server, tmp_path) as judge:
        # Of 8 samples round(0.9 * 8) = 7 and round(0.2 * 8) = 2 choose A.
        assert probabilities(judge) == pytest.approx([(2 / 8 + 1 - 7 / 8) / 2, (7 / 8 + 1 - 2 / 8) / 2, 0.5])
        probes = [body for body in server.asked if body.get("logprobs")]
        assert (len(probes), len(server.asked)) == (1, 6)
        assert {body["n"] for body in server.asked if not body.get("logprobs")} == {SAMPLES}


def test_a_server_that_gives_one_sample_at_a_time_is_asked_until_there_are_enough(tmp_path: Path) -> None:
    server = ChatServer(lambda first, second: 1.0 if len(first) > len(second) else 0.0, logprobs=False)
    server.most_choices = 1
    with chat_server(server), judging(server, tmp_path) as judge:
        assert judge.compare(PAIRS[:1])[0].probability == 0.0
        assert len(server.asked) == 1 + 2 * SAMPLES
        assert len({body["seed"] for body in server.asked[1:]}) == SAMPLES


def test_reasoning_is_sampled_and_only_then_limited(tmp_path: Path) -> None:
    with chat_server(ChatServer()) as server:
        with judging(server, tmp_path, reasoning=10) as judge:
            verdicts = judge.compare(PAIRS)
        # Shares are 0.2 and 0.9 of ten samples, asked for in requests of eight and two: 2 + 0 and 7 + 2 choose A.
        assert [v.probability for v in verdicts] == [0.4, 0.6, 0.5]
        assert (verdicts[1].first, verdicts[1].second) == pytest.approx((0.9, 0.8))
        assert all("step by step" in body["messages"][-1]["content"] for body in server.asked)
        with judging(server, tmp_path, reasoning=10, clamp=0.0) as judge:
            assert probabilities(judge) == pytest.approx([0.15, 0.85, 0.5])
        with judging(server, tmp_path) as judge:
            assert probabilities(judge) == pytest.approx(WANTED), "these are not limited"


def test_an_answer_that_is_neither_option_and_one_that_does_not_fit_abstain(tmp_path: Path) -> None:
    server = ChatServer(lambda first, second: 0.01 if "noise" in first + second else 0.9)
    answer = server.answer

    def mumbling(body: dict) -> tuple[int, dict]:
        status, reply = answer(body)
        if "noise" in body["messages"][-1]["content"]:
            reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = [{"token": "Well", "logprob": -0.01}]
        return status, reply

    server.answer, server.context = mumbling, 2_000  # type: ignore[method-assign]
    with chat_server(server), judging(server, tmp_path) as judge:
        asked = [PAIRS[0]._replace(a="long " * 500), PAIRS[0]._replace(a="noise"), PAIRS[0]]
        whys = [verdict.why for verdict in judge.compare(asked)]
        assert whys[0] == "does not fit the context of the server"
        assert whys[1] == "its reply would be neither of the two options"
        count = len(server.asked)
        judge.compare(asked)
        assert len(server.asked) == count, "a prompt that does not fit is not sent again"


@pytest.mark.parametrize(
    ("first", "options", "probability"),
    [
        ({"A": 0.6, "B": 0.2, "C": 0.1}, ("A", "B"), 0.75),
        ({"A": 0.3, " A": 0.3, "B ": 0.2}, ("A", "B"), 0.75),
        ({"A": 0.9, "The": 0.06, "I": 0.03}, ("A", "B"), 0.9 / 0.91),  # the rest is 0.01
        ({"The": 0.5, "B": 0.1, "I": 0.02}, ("A", "B"), 0.02 / 0.12),  # no more than the least likely one
        ({"A": 1.0}, ("A", "B"), 1.0),
        ({"Yes": 0.3, "Y": 0.3, "No": 0.3}, ("Yes", "No"), 0.5),  # a beginning counts only where nothing is whole
        ({"Y": 0.3, "N": 0.1, "": 0.5}, ("Yes", "No"), 0.75),
        ({"The": 0.9, "A": 0.04}, ("A", "B"), None),
        ({}, ("A", "B"), None),
    ],
)
def test_likeliest_tokens_are_read(first: dict[str, float], options: tuple[str, str], probability: float | None) -> None:
    tokens = tuple((token, math.log(p)) for token, p in first.items())
    found = endpoint_file._read(RemoteReply((RemoteChoice("", True, tokens),), 1), options).probability
    assert found == (None if probability is None else pytest.approx(probability))


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429, headers=(("retry-after", "0"),)), Fault(500), Fault(503), Fault(200, b"<html>down</html>"), Fault(),
        Fault(200, b'{"choices": []}'), Fault(200, b'{"choices": [{"message": 3}]}'), Fault(200, b"[1"),
        Fault(200, b'{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": [1]}]}}]}'),
        Fault(200, b"{}", seconds=1.0),
    ],
)  # fmt: skip
def test_a_failure_that_passes_is_asked_again(tmp_path: Path, fault: Fault) -> None:
    with chat_server(ChatServer()) as server, judging(server, tmp_path, timeout=0.5) as judge:
        server.faults = [fault, fault]
        assert probabilities(judge) == pytest.approx(WANTED)
        assert len(server.asked) == 5 + 2
        assert len(set(server.answered)) == len(server.answered) == 5


@pytest.mark.parametrize(
    "fault, found",
    [
        (Fault(429), r"answered with status 429, tried 3 times · lower concurrency or raise retries"),
        (Fault(500), r"answered with status 500, tried 3 times"),
        (Fault(200, b"not JSON"), r"answered with something that is no chat completion, tried 3 times"),
        (Fault(), r"closed the connection .*, tried 3 times"),
        (Fault(200, b"{}", seconds=1.0), r"took longer than timeout = 0.5 seconds, tried 3 times · raise timeout"),
        (Fault(401), r"status 401, and the environment variable TEST_KEY has a key that the server does not accept"),
        (Fault(403), r"status 403, and the environment variable TEST_KEY"),
        (Fault(404), r'has no model "judge", or no /chat/completions'),
        (Fault(302), r"answered with status 302 · 200 · correct the address"),
        (Fault(429, headers=(("retry-after", "7200"),)), r"asks to wait 7,200 seconds"),
        (Fault(400, b'{"error": {"message": "a strange parameter"}}'), r"refused a request: a strange parameter"),
    ],
)  # fmt: skip
def test_a_failure_that_stays_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, found: str
) -> None:
    monkeypatch.setenv("TEST_KEY", SECRET)
    with chat_server(ChatServer()) as server, judging(server, tmp_path, timeout=0.5, concurrency=1) as judge:
        server.faults = [fault] * 20
        with pytest.raises(EndpointError, match=found) as error:
            judge.compare(PAIRS)
    assert 'stage "labels"' in str(error.value)
    assert not any(text in str(error.value) for text in (SECRET, "colour"))
    assert server.keys == {f"Bearer {SECRET}"}


def test_a_message_that_repeats_the_prompt_or_the_key_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", SECRET)
    for text in ("cannot read: A colour is a property of light.", f"bad key {SECRET}"):
        with chat_server(ChatServer()) as server, judging(server, tmp_path) as judge:
            server.faults = [Fault(400, json.dumps({"error": {"message": text}}).encode())] * 20
            with pytest.raises(EndpointError, match="its message repeats the request"):
                judge.compare(PAIRS)


def test_a_wait_that_the_server_asks_for_is_kept_by_all(tmp_path: Path) -> None:
    with chat_server(ChatServer()) as server, judging(server, tmp_path, concurrency=1) as judge:
        server.faults = [Fault(429, headers=(("retry-after", "0.3"),))]
        judge.compare(PAIRS)
    assert server.times[1] - server.times[0] >= 0.3
    assert len(server.asked) == 6


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(tmp_path: Path, concurrency: int) -> None:
    server = ChatServer()
    server.seconds = 0.03
    with chat_server(server), judging(server, tmp_path, concurrency=concurrency) as judge:
        judge.compare([PAIRS[0]._replace(prompt=f"Prompt {n}") for n in range(8)])
    assert (server.most_active, len(server.asked)) == (concurrency, 16)


def test_the_command_audits_a_server_and_a_new_audit_asks_again(capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server(ChatServer()) as server:
        command = ["judge", "audit", server.url, "--model", "judge", "--limit", "2", "--json"]
        code = main(command)
        found = json.loads(capsys.readouterr().out)
        assert (found["judge"]["kind"], found["judge"]["model"], found["pairs"]) == ("endpoint", "judge", 2)
        count = len(server.asked)
        assert (main(command), len(server.asked)) == (code, 2 * count)
        assert main(["judge", "audit", server.url]) == 2
        assert "without the name of a model" in capsys.readouterr().err
        assert main([*command[:4], "other"]) == 2
        assert 'has no model "other"' in capsys.readouterr().err


def test_nobody_listens_and_no_such_host(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    server = ChatServer()
    for address, found in ((nobody, "cannot be reached .*refused"), ("http://no-such-host.invalid/v1", "cannot be reached")):
        server.url = address
        with judging(server, tmp_path, retries=1) as judge, pytest.raises(EndpointError, match=f"{found}.*tried 2 times"):
            judge.compare(PAIRS)


@pytest.mark.parametrize(
    "address", ["http://name:word@host/v1", "http:///v1", "https://host/v1?key=abc", "http://host:port/v1"]
)
def test_an_address_with_a_key_or_without_a_host_is_refused(tmp_path: Path, address: str) -> None:
    server = ChatServer()
    server.url = address
    with pytest.raises(EndpointError) as error, judging(server, tmp_path):
        pass
    assert "word" not in str(error.value)
    assert "abc" not in str(error.value)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with chat_server(ChatServer()) as server:
        with pytest.raises(EndpointError, match=r'httpx is not installed · pip install "posttrain\[endpoints\]"'):
            with judging(server, tmp_path):
                pass


def test_a_server_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="without the name of a model"):
        with open_judge(JudgeSettings(name="http://127.0.0.1:1/v1"), JudgeContext(None, None, tmp_path)):
            pass


def test_nothing_is_asked_twice_after_an_interruption(tmp_path: Path) -> None:
    """Of 40 prompts a server answers 11 and goes down; the second process asks for the other 29, the third for none."""
    pairs = [PAIRS[0]._replace(prompt=f"Prompt {n}") for n in range(20)]
    with chat_server(ChatServer()) as server:
        with judging(server, tmp_path, retries=0, concurrency=1) as judge:
            judge.compare(pairs[:1])
        answer, count = server.answer, len(server.asked)
        server.answer = lambda body: answer(body) if len(server.asked) <= 11 else (500, {})  # type: ignore[method-assign]
        with judging(server, tmp_path, retries=0, concurrency=1) as judge:
            with pytest.raises(EndpointError, match="replies of this call are kept; run the same command to go on"):
                judge.compare(pairs)
        server.answer = answer  # type: ignore[method-assign]
        assert (count, len(server.answered)) == (2, 11)
        with judging(server, tmp_path) as judge:
            verdicts = judge.compare(pairs)
        assert len(server.answered) == len(set(server.answered)) == 40
        count = len(server.asked)
        with judging(server, tmp_path) as judge:
            assert judge.compare(pairs) == verdicts
        assert len(server.asked) == count


ASKING = """
import sys
from pathlib import Path
from posttrain.generate.remote import Remote, RemoteRequest, RemoteSettings
from posttrain.judge.prompts import comparison
requests = [RemoteRequest(tuple(comparison("Q?", f"p {n}", "a", "bb")), 1, top_logprobs=20) for n in range(30)]
client = Remote(RemoteSettings(sys.argv[1], "judge", concurrency=2), Path(sys.argv[2]), where="test")
print(len(client.ask(requests)))
"""


def test_a_killed_process_has_lost_only_what_was_under_way(tmp_path: Path) -> None:
    """Two requests at most are under way when the process is killed; only they are answered again."""
    server = ChatServer()
    server.seconds = 0.02
    with chat_server(server):
        command = [sys.executable, "-c", ASKING, server.url, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while len(server.answered) < 10 and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert 10 <= len(server.asked) < 30
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "30\n"
    assert len(set(server.answered)) == 30
    assert 30 <= len(server.answered) <= 32


def test_a_cut_off_line_is_asked_again_and_the_next_one_is_whole(tmp_path: Path) -> None:
    with chat_server(ChatServer()) as server:
        with judging(server, tmp_path, concurrency=1) as judge:
            judge.compare(PAIRS)
        (file,) = tmp_path.glob("*.jsonl")
        lines = file.read_bytes()
        file.write_bytes(lines[:-20])
        with judging(server, tmp_path) as judge:
            assert probabilities(judge) == pytest.approx(WANTED)
        assert len(server.asked) == 5 + 1
        with judging(server, tmp_path) as judge:
            assert probabilities(judge) == pytest.approx(WANTED)
        assert len(server.asked) == 6
    text = file.read_text()
    assert not re.search("colour|Which answer|TEST_KEY", text), "replies are stored, prompts are not"
    assert oct(file.stat().st_mode & 0o777) == "0o600"


def test_a_stop_ends_between_two_requests_and_keeps_what_is_done(tmp_path: Path) -> None:
    stop = StopSignal()
    with chat_server(ChatServer()) as server, judging(server, tmp_path, stop, concurrency=1) as judge:
        answer = server.answer

        def stopping(body: dict) -> tuple[int, dict]:
            stop.asked = len(server.asked) == 3
            return answer(body)

        server.answer = stopping  # type: ignore[method-assign]
        with pytest.raises(Interrupted, match="stopped while asking a server"):
            judge.compare(PAIRS)
        assert len(server.asked) == 3
        stop.asked = False
        assert probabilities(judge) == pytest.approx(WANTED)
        assert len(server.answered) == 5


@pytest.mark.parametrize("counted", [True, False])
def test_a_budget_holds_over_processes_and_keeps_what_is_done(tmp_path: Path, counted: bool) -> None:
    with chat_server(ChatServer()) as server:
        server.usage = counted
        with judging(server, tmp_path, max_requests=3, concurrency=1) as judge:
            with pytest.raises(
                EndpointError, match=r"the budget of 3 requests is used up .* raise max_requests; 2 of 4 replies"
            ):
                judge.compare(PAIRS)
        with judging(server, tmp_path, max_requests=3) as judge, pytest.raises(EndpointError, match="budget of 3 requests"):
            judge.compare(PAIRS)
        assert len(server.asked) == 3
        with judging(server, tmp_path, max_tokens=20) as judge, pytest.raises(EndpointError, match="budget of 20 tokens"):
            judge.compare(PAIRS)
        assert len(server.asked) == 3
        with judging(server, tmp_path, max_requests=5) as judge:
            assert probabilities(judge) == pytest.approx(WANTED)
        assert len(server.answered) == 5


def test_failed_requests_count_too(tmp_path: Path) -> None:
    with chat_server(ChatServer()) as server, judging(server, tmp_path, max_requests=2) as judge:
        server.faults = [Fault(500), Fault(500)]
        with pytest.raises(EndpointError, match="budget of 2 requests"):
            judge.compare(PAIRS)
        assert len(server.asked) == 2
