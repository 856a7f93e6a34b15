"""The verb `serve` and its options. What it needs is imported when it runs: the command itself must start at once."""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from posttrain.arguments import seconds, whole
from posttrain.errors import RecipeError
from posttrain.terminal import say, show_text

# What the extra "serve" brings.
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def add_options(serve: argparse.ArgumentParser) -> None:
    """The options of `posttrain serve`."""
    serve.add_argument("target", metavar="MODEL_OR_RUN", help="a model, or a run: its base and every finished policy")
    serve.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=_named,
        metavar="NAME=PATH",
        help="serve this adapter as well, by this name",
    )
    serve.add_argument("--adapters-dir", type=Path, metavar="DIR", help="adapters in here may be loaded while it runs")
    serve.add_argument(
        "--adapter-bytes",
        type=whole(1),
        default=2**31,
        metavar="N",
        help="memory for adapters and for the engine's copies of them, each as wide as the widest (default: 2147483648)",
    )
    serve.add_argument("--name", help="the name of the base (default: as it was asked for, of a folder its last part)")
    serve.add_argument("--template", default="auto", help="chat template of a model without one (a run knows its own)")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than loopback need --keys (default: 127.0.0.1)"
    )
    serve.add_argument("--port", type=whole(0, 2**16 - 1), default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="only holders of these keys may ask")
    _add_limits(serve)


def _add_limits(serve: argparse.ArgumentParser) -> None:
    size, time = (whole(1), "N"), (seconds, "S")
    limits: tuple[tuple[str, float, tuple[Callable[[str], float], str], str], ...] = (
        ("body-bytes", 2**20, size, "largest request"),
        ("prompt-chars", 2**18, size, "longest prompt in characters"),
        ("max-tokens", 4096, size, "most new tokens a request may ask for"),
        ("default-tokens", 512, size, "new tokens of a chat answer where none are named"),
        ("completions", 16, size, "most completions of one request, over its prompts"),
        ("queue", 256, size, "requests that may wait; more get 429"),
        ("header-seconds", 10.0, time, "the headers of a request must be sent within this time"),
        ("body-seconds", 30.0, time, "a request must be sent within this time"),
        ("queue-seconds", 60.0, time, "an answer must begin within this time"),
        ("request-seconds", 600.0, time, "an answer must end within this time"),
        ("shutdown-timeout", 30.0, time, "time to finish answers after SIGTERM"),
    )
    for name, default, (kind, shown), about in limits:
        serve.add_argument(f"--{name}", type=kind, default=default, metavar=shown, help=f"{about} (default: {default:.10g})")


def _named(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not name or not sign or not path:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=PATH")
    return name, Path(path)


def serve(options: argparse.Namespace) -> int:
    """Listen until a signal comes. Raises PosttrainError for what cannot be served."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError("posttrain serve", f"{', '.join(missing)} not installed", do='pip install "posttrain[serve]"')
    from posttrain.generate.short_threads import apart
    from posttrain.kernels import advice
    from posttrain.serve.keys import KeyFile
    from posttrain.serve.limits import Limits
    from posttrain.serve.run import check_host, open_service
    from posttrain.serve.run import serve as listen

    keys = KeyFile(options.keys) if options.keys is not None else None
    check_host(options.host, keys)
    limits = Limits(
        options.body_bytes, options.prompt_chars, options.max_tokens, options.default_tokens, options.completions,
        options.queue, options.body_seconds, options.queue_seconds, options.request_seconds, options.shutdown_timeout,
        options.header_seconds,
    )  # fmt: skip
    service = apart(
        open_service, options.target, adapters=options.adapter, folder=options.adapters_dir, name=options.name,
        template=options.template, budget_bytes=options.adapter_bytes, limits=limits,
    )  # fmt: skip
    note = apart(advice, service.base.dtype, service.base.device)
    if note is not None:
        say(f"note: {note}")
    names = ", ".join(served.name for served in service.store.models())
    listen(
        service, host=options.host, port=options.port, keys=keys,
        told=lambda address: show_text(f"serving {names} at {address}/v1"),
    )  # fmt: skip
    return 0
