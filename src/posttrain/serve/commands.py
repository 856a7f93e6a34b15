"""The command `serve` and its options. Heavy imports happen inside `serve`, so that the command line starts fast."""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from posttrain.arguments import integer, seconds
from posttrain.errors import RecipeError
from posttrain.terminal import say, show_text

# Packages of the extra "serve".
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
        help="also serve this adapter under this name",
    )
    serve.add_argument("--adapters-dir", type=Path, metavar="DIR", help="clients may load adapters from this folder")
    serve.add_argument(
        "--adapter-bytes",
        type=integer(1),
        default=2**31,
        metavar="N",
        help="memory for adapters and the engine's slots, each slot as wide as the widest adapter (default: 2147483648)",
    )
    serve.add_argument("--name", help="the name of the base (default: the model as given; for a folder its last part)")
    serve.add_argument("--template", default="auto", help="chat template for a model without one (runs record theirs)")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but loopback needs --keys (default: 127.0.0.1)"
    )
    serve.add_argument("--port", type=integer(0, 2**16 - 1), default=8000, help="0 picks a free port (default: 8000)")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="require one of the API keys in this file")
    _add_limits(serve)


def _add_limits(serve: argparse.ArgumentParser) -> None:
    size, time = (integer(1), "N"), (seconds, "S")
    limits: tuple[tuple[str, float, tuple[Callable[[str], float], str], str], ...] = (
        ("body-bytes", 2**20, size, "largest request"),
        ("prompt-chars", 2**18, size, "longest prompt in characters"),
        ("max-tokens", 4096, size, "most new tokens a request may ask for"),
        ("default-tokens", 512, size, "new tokens of a chat answer if the request sets no limit"),
        ("completions", 16, size, "most completions of one request, over its prompts"),
        ("queue", 256, size, "requests that may wait; further ones get 429"),
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
    """Serve until SIGTERM or Ctrl-C. Raises PosttrainError if the target cannot be served."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError("posttrain serve", f"{', '.join(missing)} not installed", do='pip install "posttrain[serve]"')
    from posttrain.generate.short_threads import run_in_short_thread
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
    service = run_in_short_thread(
        open_service, options.target, adapters=options.adapter, folder=options.adapters_dir, name=options.name,
        template=options.template, budget_bytes=options.adapter_bytes, limits=limits,
    )  # fmt: skip
    note = run_in_short_thread(advice, service.base.dtype, service.base.device)
    if note is not None:
        say(f"note: {note}")
    names = ", ".join(served.name for served in service.store.models())
    listen(
        service, host=options.host, port=options.port, keys=keys,
        announce=lambda address: show_text(f"serving {names} at {address}/v1"),
    )  # fmt: skip
    return 0
