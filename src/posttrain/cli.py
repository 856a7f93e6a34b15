"""The command line `posttrain`. Each command parses its options, calls one function and prints the result.

Exit codes: 0 success (also a requested stop with the state saved), 2 a mistake of the user, 1 a defect of posttrain, 130 Ctrl-C
when there is no state to save. If the reader of the output ends, a long command (`run`, `evaluate`, …) continues without
output, and a command that only prints ends with 0.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.arguments import integer, number
from posttrain.artifacts import disk_error, is_disk_error
from posttrain.constitution import commands as constitution
from posttrain.constitution import trail_command
from posttrain.errors import Interrupted, PosttrainError, RecipeError
from posttrain.judge import commands as judge
from posttrain.serve import commands
from posttrain.streams import discard, keep_writing, open_standard_streams
from posttrain.terminal import say, show_text

Verb = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    open_standard_streams()
    try:
        parsed = _parsed(sys.argv[1:] if arguments is None else arguments)
        verb: Verb = parsed.verb
        if verb in (_run, _evaluate, _merge, _export, _report, judge.audit, commands.serve):
            keep_writing()
        code = verb(parsed)
        sys.stdout.flush()  # flush here, so that a closed pipe or a full disk is handled below
        return code
    except PosttrainError as error:
        say(f"error: {error}")
        return 2
    except Interrupted as stopped:
        say(stopped)
        return 0
    except KeyboardInterrupt:
        say("stopped")
        return 130  # the exit code of shells for Ctrl-C
    except BrokenPipeError:  # the reader of the output has ended: `posttrain show … | head`
        discard(sys.stdout.fileno())  # Python flushes standard output at exit, which would fail again
        return 0
    except OSError as error:
        if not is_disk_error(error):
            raise
        if error.filename is None:  # standard output: the flush at exit would fail again
            discard(sys.stdout.fileno())
        say(f"error: {disk_error(Path(error.filename or 'standard output'), error)}")
        return 2


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. Raises RecipeError for one that is not UTF-8, which no manifest could store."""
    for argument in arguments:
        if argument.isascii() or argument == argument.encode(errors="replace").decode():
            continue
        escaped = os.fsencode(argument).decode(errors="backslashreplace")
        do = "rename the file or name its folder; type text in UTF-8"
        raise RecipeError("posttrain", f"the argument {escaped} is not UTF-8", do=do)
    try:
        return build_parser().parse_args(arguments)
    except SystemExit:  # --help, --version, or an error of argparse
        sys.stdout.flush()
        raise


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="posttrain", description="From a pretrained base model to an aligned assistant, with its cost measured."
    )
    parser.add_argument("--version", action="version", version=f"posttrain {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_run(verbs)
    _add_reading(verbs)
    _add_models(verbs)
    _add_data(verbs)
    _add_constitution(verbs)
    _add_serving(verbs)
    return parser


def _verb(verbs: Any, name: str, verb: Verb, about: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=verb)
    return parser


def _add_run(verbs: Any) -> None:
    run = _verb(verbs, "run", _run, "run or resume a recipe", "posttrain run recipes/quickstart.toml")
    run.add_argument("recipe", type=Path, help="a recipe (.toml)")
    run.add_argument("--out", type=Path, help="run folder (default: runs/<name of the recipe>)")
    run.add_argument(
        "--set", action="append", default=[], metavar="STAGE.FIELD=VALUE", help="change a setting, e.g. dpo.beta=0.2"
    )
    run.add_argument("--until", metavar="STAGE", help="stop after this stage and its evaluation")
    run.add_argument("--dry-run", action="store_true", help="check everything and print the plan")
    run.add_argument("--json", action="store_true", help="print the scorecard (or the plan) as JSON")


def _add_reading(verbs: Any) -> None:
    report = _verb(verbs, "report", _report, "rewrite report.html", "posttrain report runs/quickstart")
    report.add_argument("run", type=Path, help="a run folder")
    show = _verb(
        verbs, "show", _show, "a run's scorecard, or a stage's manifest and lineage", "posttrain show runs/quickstart/dpo"
    )
    show.add_argument("target", type=Path, metavar="RUN[/STAGE]", help="a run folder, or a stage in it")
    show.add_argument("--json", action="store_true", help="print JSON")
    compare = _verb(
        verbs, "compare", _compare, "paired comparison of two policies",
        "posttrain compare runs/quickstart/sft runs/quickstart/dpo",
    )  # fmt: skip
    compare.add_argument("a", type=Path, metavar="RUN/STAGE", help="the stage before")
    compare.add_argument("b", type=Path, metavar="RUN/STAGE", help="the stage after")
    compare.add_argument("--json", action="store_true", help="print JSON")
    trail_command.add_options(_verb(verbs, "audit", trail_command.audit, trail_command.ABOUT, trail_command.EXAMPLE))


def _add_models(verbs: Any) -> None:
    chat = _verb(verbs, "chat", _chat, "talk to a model or to a stage of a run", "posttrain chat runs/quickstart/dpo")
    chat.add_argument("target", metavar="MODEL_OR_RUN/STAGE", help="a stage of a run, a run (its last stage) or a model")
    chat.add_argument("--compare", metavar="A,B,…", help="answer with several stages side by side, e.g. base,sft,dpo")
    chat.add_argument("--system", default="", help="a system message")
    chat.add_argument("--temperature", type=number, default=0.7, help="0 is greedy (default: 0.7)")
    chat.add_argument("--max-new-tokens", type=integer(1), default=256, help="longest answer in tokens (default: 256)")
    chat.add_argument("--seed", type=integer(0), default=0, help="sampling seed (default: 0)")
    chat.add_argument("--template", default="auto", help="chat template for a model without one (runs record theirs)")
    evaluate = _verb(
        verbs,
        "evaluate",
        _evaluate,
        "evaluate a model or a stage of a run on suites",
        "posttrain evaluate runs/quickstart/dpo --suite starter",
    )
    evaluate.add_argument("target", metavar="MODEL_OR_RUN/STAGE", help="a stage of a run, a run (its last stage) or a model")
    evaluate.add_argument("--pairs", metavar="FILE", help="measure a reward stage on these preference pairs instead")
    evaluate.add_argument("--against", metavar="RUN/STAGE", help="with --pairs: another reward stage, to measure agreement")
    evaluate.add_argument("--best-of", metavar="RUN/STAGE", help="best-of-n by this reward stage instead, on --prompts")
    evaluate.add_argument("--prompts", metavar="FILE", help="with --best-of: demonstrations or pairs with the prompts")
    evaluate.add_argument("--samples", type=integer(1), default=16, help="with --best-of: completions per prompt (default: 16)")
    evaluate.add_argument("--gold", metavar="RUN/STAGE", help="with --best-of: another reward stage that scores them too")
    evaluate.add_argument("--temperature", type=number, default=1.0, help="with --best-of (default: 1)")
    evaluate.add_argument("--suite", action="append", metavar="NAME_OR_FILE", help="default: starter")
    evaluate.add_argument("--limit", type=integer(0), default=0, help="use only the first items (pairs, prompts); 0 uses all")
    evaluate.add_argument("--max-new-tokens", type=integer(1), default=64, help="longest answer in tokens (default: 64)")
    evaluate.add_argument("--seed", type=integer(0), default=0, help="sampling seed (default: 0)")
    evaluate.add_argument("--template", default="auto", help="chat template for a model without one (runs record theirs)")
    evaluate.add_argument("--out", type=Path, help="also write scores.jsonl and scorecard.json into this folder")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    merge = _verb(
        verbs, "merge", _merge, "merge an adapter into its base: a model folder for any tool",
        "posttrain merge runs/quickstart/dpo --out merged",
    )  # fmt: skip
    merge.add_argument("target", metavar="RUN/STAGE", help="a stage of a run")
    merge.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    export = _verb(
        verbs,
        "export",
        _export,
        "write a policy as a folder for other tools",
        "posttrain export runs/quickstart/dpo --to ollama --out exported",
    )
    export.add_argument("target", metavar="RUN/STAGE", help="a stage of a run")
    export.add_argument(
        "--to", choices=("hf", "peft", "ollama"), required=True,
        help="hf: a merged model folder; peft: the adapter alone; ollama: a merged folder with a Modelfile",
    )  # fmt: skip
    export.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")


def _add_data(verbs: Any) -> None:
    data = verbs.add_parser(
        "data",
        help="check data before training",
        epilog="example: posttrain data check my.jsonl --recipe recipes/quickstart.toml",
    )
    kinds = data.add_subparsers(required=True, metavar="VERB", help="command")
    check = _verb(
        kinds, "check", _data_check, "show what training would use of a data file",
        "posttrain data check my.jsonl --recipe recipes/quickstart.toml",
    )  # fmt: skip
    check.add_argument("file", help="a file, a folder, a hub id or starter/<file>")
    check.add_argument("--recipe", type=Path, help="use the base, template and stage limits of this recipe")
    check.add_argument("--stage", help="the stage whose limits apply (default: the first for this kind of data)")
    check.add_argument("--model", default="random:tiny", help="tokenizer to use without a recipe")
    check.add_argument("--template", default="auto", help="chat template to use without a recipe")
    check.add_argument("--json", action="store_true", help="print JSON")


def _add_constitution(verbs: Any) -> None:
    about = "validate a constitution and print the exact prompts it makes"
    parser = verbs.add_parser("constitution", help="check constitutions", epilog=f"example: {constitution.EXAMPLE}")
    kinds = parser.add_subparsers(required=True, metavar="VERB", help="command")
    constitution.add_options(_verb(kinds, "check", constitution.check, about, constitution.EXAMPLE))
    parser = verbs.add_parser("judge", help="audit judges that compare answers", epilog=f"example: {judge.EXAMPLE}")
    kinds = parser.add_subparsers(required=True, metavar="VERB", help="command")
    judge.add_options(_verb(kinds, "audit", judge.audit, "measure the accuracy and the biases of a judge", judge.EXAMPLE))


def _add_serving(verbs: Any) -> None:
    commands.add_options(
        _verb(
            verbs,
            "serve",
            commands.serve,
            "serve a model or a run with the OpenAI HTTP API",
            "posttrain serve runs/quickstart",
        )
    )
    keys = verbs.add_parser(
        "keys", help="manage the API keys of a server", epilog="example: posttrain keys add keys.json --name ann"
    )
    kinds = keys.add_subparsers(required=True, metavar="VERB", help="command")
    add = _verb(kinds, "add", _keys_add, "create a key; it is shown once", "posttrain keys add keys.json --name ann")
    add.add_argument("--name", required=True, help="the name of the key")
    add.add_argument("--admin", action="store_true", help="the key may also load and unload adapters")
    list_keys = _verb(kinds, "list", _keys_list, "list names, scopes and dates of the keys", "posttrain keys list keys.json")
    revoke = _verb(kinds, "revoke", _keys_revoke, "revoke a key", "posttrain keys revoke keys.json ann")
    for verb in (add, list_keys, revoke):
        verb.add_argument("file", type=Path, help="a key file (.json)")
    revoke.add_argument("name", help="the name of the key")


def _width() -> int:
    """The width of the terminal; 120 columns for a file or a pipe."""
    return shutil.get_terminal_size((120, 24)).columns


def _run(options: argparse.Namespace) -> int:
    from posttrain.evaluate.table import format_table
    from posttrain.pipeline import check_until, run_folder, run_recipe
    from posttrain.recipe import load_recipe, to_toml

    recipe = load_recipe(options.recipe, tuple(options.set))
    run = run_folder(recipe, options.out)
    if options.dry_run:
        from posttrain.estimate import describe

        check_until(recipe, options.until)
        plan, text = describe(recipe, run, until=options.until)
        show_text(json.dumps(plan, indent=2) if options.json else text)
        return 0
    outcome = run_recipe(recipe, to_toml(recipe), run, until=options.until)
    if options.json:
        show_text(json.dumps(outcome.scorecard, indent=2))
        return 0
    if not outcome.worked:
        show_text(f"{run}: nothing to do, every stage is finished")
    show_text(format_table(outcome.scorecard, width=_width()))
    show_text(f"report: {outcome.report}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from posttrain.report.render import write_report

    show_text(f"report: {write_report(options.run)}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from posttrain.report.show import show

    data, text = show(options.target)
    show_text(json.dumps(data, indent=2, ensure_ascii=False) if options.json else text)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from posttrain.report.show import compare

    data, text = compare(options.a, options.b)
    show_text(json.dumps(data, indent=2) if options.json else text)
    return 0


def _chat(options: argparse.Namespace) -> int:
    from posttrain.generate.engine import SamplingSettings
    from posttrain.models.target import open_target
    from posttrain.serve.chat import chat

    settings = SamplingSettings(options.max_new_tokens, options.temperature, 1.0, options.seed, False)
    beside = tuple(name.strip() for name in (options.compare or "").split(",") if name.strip())
    return chat(open_target(options.target, template=options.template), settings, system=options.system, beside=beside)


def _evaluate(options: argparse.Namespace) -> int:
    from posttrain.evaluate.target import evaluate_best_of, evaluate_pairs, evaluate_target
    from posttrain.generate.engine import SamplingSettings
    from posttrain.models.target import open_reward_model, open_target

    _check_evaluate(options)
    if options.pairs is not None:
        data, text = evaluate_pairs(
            open_reward_model(options.target), options.pairs, limit=options.limit, out=options.out, against=options.against
        )
    elif options.best_of is not None:
        data, text = evaluate_best_of(
            open_target(options.target, template=options.template), options.best_of, options.prompts,
            SamplingSettings(options.max_new_tokens, options.temperature, 1.0, options.seed),
            samples=options.samples, gold=options.gold, limit=options.limit, out=options.out,
        )  # fmt: skip
    else:
        data, text = evaluate_target(
            open_target(options.target, template=options.template), tuple(options.suite or ["starter"]), limit=options.limit,
            max_new_tokens=options.max_new_tokens, seed=options.seed, out=options.out, width=_width(),
        )  # fmt: skip
    show_text(json.dumps(data, indent=2) if options.json else text)
    return 0


def _check_evaluate(options: argparse.Namespace) -> None:
    """Raise RecipeError for an option that needs another one."""
    for name, needed in (("against", "pairs"), ("prompts", "best_of"), ("gold", "best_of"), ("best_of", "prompts")):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            needed_option = needed.replace("_", "-")
            raise RecipeError(f"--{name.replace('_', '-')}", f"no --{needed_option}", do=f"add --{needed_option}")


def _merge(options: argparse.Namespace) -> int:
    from posttrain.models.merge import merge_target
    from posttrain.models.target import open_target

    show_text(f"merged model: {merge_target(open_target(options.target), options.out)}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from posttrain.models.export import export_target
    from posttrain.models.target import open_target

    show_text(f"exported: {export_target(open_target(options.target), options.to, options.out)}")
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from posttrain.data.doctor import check_rows, plan_check
    from posttrain.evaluate.suites import evaluation_prompts, load_suites
    from posttrain.models.base_model import load_chat
    from posttrain.models.source import locate_base
    from posttrain.recipe import load_recipe

    if options.stage is not None and options.recipe is None:
        raise RecipeError("--stage", f'"{options.stage}" without a recipe', do="add --recipe")
    recipe = load_recipe(options.recipe) if options.recipe else None
    check = plan_check(options.file, recipe, options.stage, model=options.model, template=options.template)
    suites = recipe.evaluation.suites if recipe else ("starter",)
    source = locate_base(check.model)
    report, text = check_rows(
        check,
        load_chat(source, check.template),
        context=source.context(),
        evaluation_prompts=evaluation_prompts(load_suites(suites, limit=0)),
    )
    show_text(json.dumps(report, indent=2, ensure_ascii=False) if options.json else text)
    return 0


def _keys_add(options: argparse.Namespace) -> int:
    from posttrain.serve.keys import SCOPES, add_key

    show_text(add_key(options.file, options.name, SCOPES if options.admin else SCOPES[:1]))
    return 0


def _keys_list(options: argparse.Namespace) -> int:
    from posttrain.serve.keys import Keys

    for key in Keys.read(options.file).keys:
        show_text(f"{key.name}  {', '.join(key.scopes)}  {key.created}")
    return 0


def _keys_revoke(options: argparse.Namespace) -> int:
    from posttrain.serve.keys import revoke_key

    revoke_key(options.file, options.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
