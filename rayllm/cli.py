"""The roof: `rayllm STAGE [RECIPE] [--a.b=c ...]` reads a recipe and calls one stage.

Everything a stage needs is imported after its recipe is known to be good, so that help and mistakes cost nothing.
"""

from __future__ import annotations

import errno
import importlib
import os
import select
import shutil
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE, EXIT_TERMINATED = (128 + s for s in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM))

BAD_INPUT = (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Stage:
    """One row of the stage table. Code is named "module:attribute" and imported when it is needed."""

    name: str
    purpose: str
    schema: str
    run: str
    plan: str | None = None
    """`describe_plan(config) -> dict[str, object]`: what --dry-run prints besides the recipe."""
    argument: str | None = None
    """The key that the first argument sets, for a stage that takes no recipe."""

    recipe: str | None = None
    """The recipe that is read where none is named."""
    short: Mapping[str, str] = field(default_factory=dict)
    """Short options whose text, the next argument, is a key's value: {"-p": "prompt"}."""

    @property
    def usage(self) -> str:
        argument = self.argument.upper() if self.argument else "[RECIPE]"
        return f"rayllm {self.name} {argument} [--key=value ...] [--dry-run] [--help]"


def _schema(name: str) -> str:
    return f"rayllm.config.schema:{name}"


def _chat_schema(name: str) -> str:
    return f"rayllm.config.chat_schema:{name}"


def _rl_schema(name: str) -> str:
    return f"rayllm.config.rl_schema:{name}"


STAGES = (
    Stage(
        "tokenizer",
        "train a byte-pair tokenizer on text",
        _schema("TokenizerConfig"),
        run="rayllm.text.train:run",
        plan="rayllm.text.train:describe_plan",
    ),
    Stage(
        "tokenize",
        "turn text into token shards, in parallel",
        _schema("TokenizeConfig"),
        run="actors.tokenize:run",
        plan="actors.tokenize:describe_plan",
    ),
    Stage(
        "pretrain",
        "train a base model on token shards",
        _schema("PretrainConfig"),
        run="actors.fit:run",
        plan="rayllm.plans.pretrain:describe_plan",
    ),
    Stage(
        "sample",
        "continue a text with any checkpoint",
        _schema("SampleConfig"),
        run="rayllm.engine.sample:run",
        plan="rayllm.plans.answers:describe_sample",
    ),
    Stage(
        "base-eval",
        "measure a base model: bits per byte",
        _schema("BaseEvalConfig"),
        run="rayllm.evals.base:run",
        plan="rayllm.plans.answers:describe_base_eval",
    ),
    Stage(
        "sft",
        "teach a base model to chat",
        _chat_schema("SFTConfig"),
        run="actors.fit:run_sft",
        plan="rayllm.plans.train:describe_plan",
    ),
    Stage(
        "rl",
        "teach a chat model by reinforcement",
        _rl_schema("RLConfig"),
        run="actors.rl:run",
        plan="rayllm.plans.rl:describe_plan",
    ),
    Stage(
        "explain",
        "show one group of an RL step, token by token",
        _rl_schema("ExplainConfig"),
        run="rayllm.training.explain:run",
        argument="run",
    ),
    Stage(
        "chat-eval",
        "test a chat model: pass@1 of tasks",
        _chat_schema("ChatEvalConfig"),
        run="actors.evaluate:run",
        plan="rayllm.plans.answers:describe_chat_eval",
    ),
    Stage(
        "chat",
        "talk with a chat model in the terminal",
        _chat_schema("ChatConfig"),
        run="rayllm.engine.chat:run",
        plan="rayllm.plans.answers:describe_chat",
        short={"-p": "prompt"},
    ),
    Stage(
        "serve",
        "serve a chat model over HTTP",
        _chat_schema("ServeConfig"),
        run="actors.serve:run",
        plan="rayllm.plans.answers:describe_serve",
    ),
    Stage(
        "report",
        "write one page over the stages of a run",
        _chat_schema("ReportConfig"),
        run="rayllm.runs.report:run",
        argument="run",
    ),
    Stage(
        "quickstart",
        "the whole life of a small model, in minutes",
        "rayllm.config.quickstart_schema:QuickstartConfig",
        run="actors.quickstart:run",
        plan="rayllm.plans.quickstart:describe_plan",
        recipe="quickstart",
    ),
    Stage(
        "import-nanochat",
        "convert a nanochat checkpoint and its tokenizer",
        _schema("ImportNanochatConfig"),
        run="rayllm.runs.import_nanochat:run",
        plan="rayllm.runs.import_nanochat:describe_plan",
        argument="source",
    ),
)


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run one command line (default: that of this process) on a stage table and return its exit code.

    0: done; 2: bad input, with one line on stderr (RAYLLM_TRACEBACK=1 adds the traceback); 1: anything else that
    failed; 130 and 143: interrupted by Ctrl-C or SIGTERM, after every `finally` has run.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    stage = next((stage for stage in stages if arguments and stage.name == arguments[0]), None)
    command = f"rayllm {stage.name}" if stage else "rayllm"
    try:
        with _sigterm_unwinds():
            if stage is None:
                _answer_without_stage(arguments, stages)
            else:
                _run_stage(stage, arguments[1:])
            sys.stdout.flush()
        return EXIT_OK
    except SystemExit as error:
        # Ray, once started, has its own handler for SIGTERM, which exits with the bare signal number.
        return EXIT_TERMINATED if error.code == signal.SIGTERM else _exit_code(error)
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001, the roof: whatever it is, it is shown and sets the exit code
        if isinstance(error, BrokenPipeError) and _stdout_is_gone():
            return EXIT_BROKEN_PIPE
        return _report(command, error)


def _answer_without_stage(arguments: list[str], stages: Sequence[Stage]) -> None:
    """`rayllm`, `rayllm --help`, `rayllm --version`, or a stage that is none."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_render_help(stages))
    elif arguments[0] == "--version":
        from importlib.metadata import version

        print(f"rayllm {version('rayllm')}")
    else:
        import difflib

        names = [stage.name for stage in stages]
        close = difflib.get_close_matches(arguments[0].replace("_", "-"), names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"{arguments[0]!r} is no stage; {hint}the stages are {', '.join(names)}")


def _run_stage(stage: Stage, arguments: list[str]) -> None:
    schema = _import(stage.schema)
    if "--help" in arguments or "-h" in arguments:
        from rayllm.config.help import render_stage_help

        print(render_stage_help(schema, stage.usage, width=_width(), color=_color()))
        return
    from rayllm.config.flags import list_switches, split_arguments
    from rayllm.config.load import ConfigError, load_config

    arguments = _spell_out(stage, arguments)
    is_dry = "--dry-run" in arguments
    arguments = [argument for argument in arguments if argument != "--dry-run"]
    positionals, flags = split_arguments(arguments, list_switches(schema))
    if len(positionals) > 1 or any(word.startswith("-") for word in positionals):
        wrong = next((word for word in positionals if word.startswith("-")), positionals[-1])
        raise ConfigError(f"{wrong}: not understood; usage: {stage.usage}")
    if stage.argument and positionals:
        flags.insert(0, f"--{stage.argument}={_quote(positionals.pop())}")  # quoted: a path is the text it is
    recipe = positionals[0] if positionals else stage.recipe
    config = load_config(schema, recipe, flags)
    if is_dry:
        _print_dry_run(stage, config, recipe)
    else:
        _import(stage.run)(config)


def _spell_out(stage: Stage, arguments: list[str]) -> list[str]:
    """Short options as long ones: `-p TEXT` is `--prompt='TEXT'`, the text being what it is."""
    spelled, rest = [], iter(arguments)
    for argument in rest:
        if argument in stage.short:
            text = next(rest, None)
            if text is None:
                raise ValueError(f"{argument}: got no text; write {argument} TEXT")
            argument = f"--{stage.short[argument]}={_quote(text)}"
        spelled.append(argument)
    return spelled


def _print_dry_run(stage: Stage, config: Any, recipe: str | None) -> None:
    """The resolved recipe, and the plan as comments below it: the whole output is a recipe again."""
    from rayllm.config.load import to_yaml

    plan = _import(stage.plan)(config) if stage.plan else {}
    print(f"# rayllm {stage.name}: the resolved recipe" + (f" of {recipe}" if recipe else ""))
    print(to_yaml(config), end="")
    if plan:
        label_width = max(len(label) for label in plan)
        print("\n# the plan")
        for label, value in plan.items():
            print("\n".join(f"# {line}" for line in f"{label:<{label_width}}  {value}".splitlines()))


def _render_help(stages: Sequence[Stage]) -> str:
    color, label_width = _color(), max(len(stage.name) for stage in stages) + 2
    bold = "\033[1m{}\033[0m".format if color else "{}".format
    rows = [f"  {bold(stage.name.ljust(label_width))}{stage.purpose}" for stage in stages]
    about = textwrap.fill(
        "RECIPE is a YAML file, or the name of a packaged recipe such as laptop. A flag sets one key of the stage "
        "(--model.head_dim=64, also --model.head-dim 64) and wins over the recipe; one for a key that is true or "
        "false needs no value (--rollout-only). --dry-run prints the resolved recipe and the plan, and exits.",
        _width(),
        break_on_hyphens=False,
    )
    return "\n".join(
        [
            f"{bold('usage:')} rayllm STAGE [RECIPE] [--key=value ...] [--dry-run] [--help]",
            "",
            "Train a chat model from raw text, one stage after the other:",
            "",
            *rows,
            "",
            about,
            "",
            "rayllm STAGE --help shows the keys and the recipes of a stage; rayllm --version the version.",
        ]
    )


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _quote(text: str) -> str:
    escaped = text.replace("'", "''")
    return f"'{escaped}'"


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 120)


def _color() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that `finally` blocks close files and stop what was started."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Callable[[int, FrameType | None], Any] | int | None = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or EXIT_OK
    print(error.code, file=sys.stderr)
    return EXIT_FAILED


def _report(command: str, error: Exception) -> int:
    """One clear line for what the user can mend, the whole traceback for what they cannot."""
    # An error that travelled through Ray is wrapped with a remote traceback; what was raised is its `cause`.
    cause = getattr(error, "cause", None)
    original = cause if isinstance(cause, Exception) else error
    if isinstance(original, OSError) and original.errno in DISK_FULL:
        where = f" while writing {original.filename}" if original.filename else ""
        return _fail(command, f"disk full{where}: free some space or choose another --out, then run again", EXIT_FAILED)
    if isinstance(original, BAD_INPUT):
        return _fail(command, _message(original), EXIT_BAD_INPUT)
    # Ours: something that was waited for did not come, or a loss is no number.
    if type(original) in (TimeoutError, ConnectionError, FloatingPointError):
        return _fail(command, _message(original), EXIT_FAILED)
    traceback.print_exception(error)
    return EXIT_FAILED


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _fail(command: str, message: str, exit_code: int) -> int:
    print(f"{command}: error: {message}", file=sys.stderr)
    if os.environ.get("RAYLLM_TRACEBACK") == "1":
        traceback.print_exc()
    return exit_code


def _stdout_is_gone() -> bool:
    """Whether the reader of our output has left (`rayllm --help | head -1`); then nothing more is written to it."""
    stdout_fd = 1
    poller = select.poll()
    poller.register(stdout_fd, 0)  # errors and hang-ups are reported unasked
    if not poller.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout_fd)
    return True
