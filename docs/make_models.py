"""Writes docs/models.md: every causal architecture of transformers, tried at tiny size with random weights. `make models`.

For each kind a tiny model (`tiny_models.py`) is saved and loaded as a base in float32. A base that loads is compared with
transformers' own plain attention, on a row that stands second in a packed batch and on greedy tokens; the check that posttrain
makes at load takes no part in this comparison. Each kind runs in a process of its own.
"""

import json
import os
import re
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tiny_models import KINDS, tiny_model

from posttrain.data.packing import pack, row_segments
from posttrain.errors import ModelError
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.batches import batch_logprobs, to_device
from posttrain.models.source import locate_base

PAGE = Path(__file__).parent / "models.md"
# Nats by which a log-probability may differ in float32; seconds that one kind may take.
CLOSE, LONGEST = 1e-4, 300
HEAD = """<!-- written by docs/make_models.py: run `make models` -->
# Models

Every kind of model that transformers {version} loads as a causal one, tried at tiny size (two layers, windows of 8) with
random weights in norms and biases too. *right*: log-probabilities of a row in a packed batch are those of transformers' plain
attention to {close} nats in float32, six greedy tokens are the same, and the base also passes the check at load in bfloat16.
*refused*: `load_base` refuses the architecture by name, with the reason. *not tried*: no tiny model of it could be made, or it
does not run on text alone. A base of any kind is checked with its own weights when it is loaded, so a kind that
is not in this table is not trusted either.

{counts}.

| `model_type` | class | verdict | |
|---|---|---|---|
"""


class Verdict(NamedTuple):
    """What came of one kind."""

    word: str
    why: str


def judge(kind: str) -> Verdict:
    """Try one kind in this process."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        try:
            own = tiny_model(kind)
            logits = own(input_ids=torch.arange(7, 31)[None], use_cache=False).logits
            assert logits.shape == (1, 24, logits.shape[2]), "no logits for each token"
            own.save_pretrained(folder)
        except Exception as error:  # noqa: BLE001 - an architecture may ask for anything
            return Verdict("not tried", _said(error))
        for path in locate_base("random:tiny").folder.glob("tokenizer*"):
            (Path(folder) / path.name).write_bytes(path.read_bytes())
        try:
            base = load_base(folder, template="gemma", dtype="float32", device="cpu")
            load_base(folder, template="gemma", dtype="bfloat16", device="cpu")
        except ModelError as error:
            return Verdict("refused", error.found.split(": ", 1)[-1])
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        return _compared(base, reference)


@torch.no_grad()
def _compared(base: BaseModel, reference: Any) -> Verdict:
    generator = torch.Generator().manual_seed(1)
    row, other = (torch.randint(7, base.vocabulary, (n,), generator=generator).tolist() for n in (24, 9))
    segments = row_segments(other, [False] + [True] * 8, 0) + row_segments(row, [False] + [True] * 23, 1)
    found = batch_logprobs(base, to_device(pack(segments, 2), base.device), "base")[8:]
    greedy = list(generate(base, [row], SamplingSettings(6, 0.0), "base")[0].completion_ids)
    logits = reference(input_ids=torch.tensor([row]), use_cache=False).logits[0].float()
    ids: list[int] = []
    while len(ids) < len(greedy):
        ids.append(int(reference(input_ids=torch.tensor([row + ids]), use_cache=False).logits[0, -1].argmax()))
    wanted = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    apart = float((found - wanted).abs().max())
    if apart > CLOSE or ids != greedy:
        return Verdict("WRONG", f"{apart:.2g} nats" + ("" if ids == greedy else ", other greedy tokens"))
    return Verdict("right", "")


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:160]


def judge_apart(kind: str) -> Verdict:
    """Try one kind in a process of its own, which it cannot break for others."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LONGEST)
        try:
            verdict = judge(kind)
        except BaseException as error:  # noqa: BLE001 - told as what it is
            verdict = Verdict("CRASH", _said(error))
        os.write(writing, json.dumps(verdict).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return Verdict(*json.loads(said)) if said else Verdict("CRASH", f"no answer within {LONGEST} s")


def page(verdicts: dict[str, Verdict]) -> str:
    """The whole page."""
    words = [verdict.word for verdict in verdicts.values()]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(sorted(words)))
    text = HEAD.format(version=transformers.__version__, close=CLOSE, counts=f"Of {len(words)} kinds: {counts}")
    for kind, verdict in sorted(verdicts.items()):
        name = KINDS[kind] if isinstance(KINDS[kind], str) else KINDS[kind][0]
        why = re.sub(r"[|<>`]", " ", verdict.why)
        text += f"| `{kind}` | {name} | {verdict.word} | {why} |\n"
    return text


def main() -> int:
    """Try all kinds, or those that are named, and write the page if it is all of them."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    locate_base("random:tiny")
    verdicts = {}
    for kind in sys.argv[1:] or KINDS:
        verdicts[kind] = judge_apart(kind)
        print(f"{kind:26s} {verdicts[kind].word:10s} {verdicts[kind].why}", flush=True)
    if len(sys.argv) == 1:
        PAGE.write_text(page(verdicts), encoding="utf-8")
    return sum(verdict.word.isupper() for verdict in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
