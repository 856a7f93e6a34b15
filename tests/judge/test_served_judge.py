"""A judge behind `posttrain serve` in a second process: its replies are those of the same model in this process."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from posttrain.errors import EndpointError
from posttrain.generate.remote import Remote, RemoteRequest, RemoteSettings
from posttrain.judge.endpoint import EndpointJudge
from posttrain.judge.prompts import comparison
from posttrain.judge.reasoning import Reasoning
from posttrain.judge.verdict import ComparisonRequest
from posttrain.models.base_model import BaseModel
from posttrain.models.segments import Segments, Span

PAIRS = [
    ComparisonRequest("Name a colour.", "Red.", "A colour is a property of light.", "Which answer is longer?"),
    ComparisonRequest("Say hi.", "Hi!", "Hi!", "Which answer is longer?"),
]


@contextmanager
def served() -> Iterator[str]:
    """The address of `posttrain serve` in a second process."""
    code = "import sys; from posttrain.cli import main; sys.exit(main())"
    arguments = [sys.executable, "-c", code, "serve", "random:tiny", "--template", "gemma", "--port", "0"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        yield line.rpartition(" at ")[2].strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        process.stdout.close()


def _reasoning(client: Remote) -> EndpointJudge:
    return EndpointJudge(client, "tiny", reasoning=Reasoning(samples=9, tokens=4, clamp=0.4))


@torch.no_grad()
def test_a_judge_behind_posttrain_serve_reads_what_the_model_gives(base: BaseModel, tmp_path: Path) -> None:
    """The likeliest first tokens are those of the same model in this process; the verdicts come from them."""
    messages = tuple(comparison(PAIRS[0].question, PAIRS[0].prompt, PAIRS[0].a, PAIRS[0].b))
    with served() as address:
        client = Remote(RemoteSettings(address, "random:tiny"), tmp_path, where="test")
        try:
            (reply,) = client.ask([RemoteRequest(messages, 1, top_logprobs=20)])
            whys = [verdict.why for verdict in EndpointJudge(client, "tiny").compare(PAIRS)]
            long = [PAIRS[0]._replace(a="long " * base.context)]
            too_long = [judge.compare(long)[0].why for judge in (EndpointJudge(client, "tiny"), _reasoning(client))]
            reasoned = [verdict.why for verdict in _reasoning(client).compare(PAIRS)]
        finally:
            client.close()
        wrong = Remote(RemoteSettings(address, "another"), tmp_path, where="test")
        with pytest.raises(EndpointError, match='has no model "another"'):
            wrong.ask([RemoteRequest(messages, 1)])
        wrong.close()
    ids = base.chat.encode_prompt(messages)
    hidden = base.hidden(torch.tensor(ids), torch.arange(len(ids)), Segments((Span(0, len(ids), ()),)), "base")
    logprobs = torch.log_softmax(base.logits(hidden[-1:], "base")[0].float(), 0)
    assert reply.choices[0].first is not None
    assert [logprob for _, logprob in reply.choices[0].first] == pytest.approx(logprobs.topk(20).values.tolist(), abs=1e-3)
    assert whys == ["its reply would be neither of the two options"] * 2
    assert too_long == ["does not fit the context of the server"] * 2
    assert reasoned == ["no sample ends in one of the two options"] * 2
