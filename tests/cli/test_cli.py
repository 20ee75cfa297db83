"""The command line as a person meets it: help, dry runs, errors and exit codes, each in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rayllm.cli import STAGES, main
from rayllm.config.load import load_config
from rayllm.config.schema import PretrainConfig

HEAVY = ("torch", "ray", "datasets", "wandb", "pyarrow", "numpy", "pydantic", "yaml")

# Stages that end in every way a stage can end; the table is handed to the real `main`.
ODD_STAGES = """
import os, signal, sys, time
from pathlib import Path
from rayllm.cli import Stage, main

def bad_value(config):
    raise ValueError("the tokenizer is not the checkpoint's;\\n  train them together")

def missing(config):
    open(config.checkpoint)

def forbidden(config):
    raise PermissionError(13, "Permission denied", config.checkpoint)

def full_disk(config):
    with open("/dev/full", "w") as file:
        file.write("x")

def bug(config):
    {}["no such key"]

def leaves(config):
    sys.exit("enough")

def naps(config):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        Path(config.checkpoint).write_text("cleaned up")

def naps_like_ray(config):
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))
    naps(config)

class RemoteError(RuntimeError):
    def __init__(self, cause):
        super().__init__("remote traceback\\n" * 20)
        self.cause = cause

def remote(config):
    raise RemoteError(ValueError("said far away"))

def broken_pipe(config):
    raise BrokenPipeError(32, "a worker is gone")

names = ["bad_value", "missing", "forbidden", "full_disk", "bug", "leaves", "naps", "naps_like_ray", "remote",
         "broken_pipe"]
stages = [Stage(name, "ends oddly", "rayllm.config.schema:SampleConfig", run=f"__main__:{name}") for name in names]
sys.exit(main(stages=stages))
"""


def rayllm(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rayllm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=120)


@pytest.fixture
def odd_stages(tmp_path: Path) -> list[str]:
    script = tmp_path / "odd_stages.py"
    script.write_text(ODD_STAGES)
    return [sys.executable, str(script)]


# Help


def test_help_lists_the_stages() -> None:
    for arguments in ((), ("--help",), ("-h",)):
        answer = rayllm(*arguments)
        assert answer.returncode == 0
        for stage in STAGES:
            assert re.search(rf"^  {stage.name} +{re.escape(stage.purpose)}$", answer.stdout, re.MULTILINE)


def test_version() -> None:
    assert re.fullmatch(r"rayllm \d+\.\d+\.\d+\n", rayllm("--version").stdout)


def imported_by(*arguments: str) -> set[str]:
    """Top-level packages that a command line imports."""
    command = [sys.executable, "-X", "importtime", "-m", "rayllm", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in answer.stderr.splitlines()}


def test_the_import_probe_sees_packages() -> None:
    assert {"numpy", "yaml"} <= imported_by("pretrain", "--dry-run")


@pytest.mark.parametrize("arguments", [["--help"], *([stage.name, "--help"] for stage in STAGES)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported_by(*arguments).isdisjoint(HEAVY)


def test_stage_help_names_keys_and_recipes() -> None:
    page = rayllm("pretrain", "laptop", "--depth=4", "--help").stdout  # wherever --help stands
    assert page.startswith("usage: rayllm pretrain [RECIPE]")
    assert "--model.head_dim  integer > 0; default: 128" in page
    assert "Recipes for this stage: gsm8k, laptop" in page
    assert "usage: rayllm import-nanochat SOURCE" in rayllm("import-nanochat", "-h").stdout


def test_no_color_where_there_is_no_terminal() -> None:
    assert "\033" not in rayllm("--help").stdout + rayllm("pretrain", "--help").stdout


@pytest.mark.parametrize("no_color", ["", "1"])
def test_color_on_a_terminal_unless_no_color(no_color: str) -> None:
    parent, child = os.openpty()
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    subprocess.run([sys.executable, "-m", "rayllm", "--help"], stdout=child, env=environment, check=True, timeout=120)
    os.close(child)
    assert (b"\033[1m" in os.read(parent, 10_000)) == (not no_color)
    os.close(parent)


# Dry run


def test_dry_run_prints_a_recipe_and_the_plan(tmp_path: Path) -> None:
    answer = rayllm("pretrain", "laptop", "--dry-run", "--log_every=3")
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"^# parameters +[\d,]+", answer.stdout, re.MULTILINE)
    saved = tmp_path / "resolved.yaml"
    saved.write_text(answer.stdout)
    assert load_config(PretrainConfig, str(saved)) == load_config(PretrainConfig, "laptop", ["--log_every=3"])


def test_dry_runs_need_neither_ray_nor_torch(tmp_path: Path) -> None:
    from rayllm.text.tokenizer import Tokenizer

    tokenizer, text = tmp_path / "tokenizer", tmp_path / "text.txt"
    Tokenizer.byte_level().save(tokenizer)
    text.write_text("Once upon a time\n")
    out = f"--out={tmp_path / 'out'}"
    needed = {
        "pretrain": [f"--data.tokenizer={tokenizer}", out],
        "tokenizer": [f"--sources={text}", out],
        "tokenize": [f"--sources={text}", f"--tokenizer={tokenizer}", out],
        "import-nanochat": [str(Path(__file__).parents[1] / "parity" / "mha"), out],
        "report": [str(tmp_path)],
        "explain": [str(tmp_path)],
    }
    for stage in STAGES:
        arguments = (stage.name, *needed.get(stage.name, []), "--dry-run")
        assert imported_by(*arguments).isdisjoint({"torch", "ray"}), arguments
    assert not (tmp_path / "out").exists()


def test_import_nanochat_takes_its_source_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-nanochat", "some: 'odd' dir", "--out", "there", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "source: 'some: ''odd'' dir'\n" in printed
    assert "out: there\n" in printed


# Errors


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["pretrain", "--depth=-3"],
            "rayllm pretrain: error: --depth=-3: depth: got -3, expected integer > 0; write for example --depth=12",
        ),
        (["base-eval", "--shard=x"], "rayllm base-eval: error: --shard=x: unknown key shard; did you mean --shards?"),
        (
            ["pretrian"],
            "rayllm: error: 'pretrian' is no stage; did you mean pretrain? the stages are tokenizer, tokenize, "
            "pretrain, sample, base-eval, sft, rl, explain, chat-eval, chat, serve, report, quickstart, "
            "import-nanochat",
        ),
        (
            ["sample", "a", "b"],
            "rayllm sample: error: b: not understood; usage: rayllm sample [RECIPE] [--key=value ...] [--dry-run] "
            "[--help]",
        ),
        (
            ["sample", "-d", "4"],
            "rayllm sample: error: -d: not understood; usage: rayllm sample [RECIPE] [--key=value ...] [--dry-run] "
            "[--help]",
        ),
        (
            ["explain", "--step", "40"],
            "rayllm explain: error: defaults: run is missing; give a run directory of the rl stage",
        ),
        (
            ["import-nanochat"],
            "rayllm import-nanochat: error: defaults: source is missing; give the directory of the nanochat checkpoint",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], line: str) -> None:
    answer = rayllm(*arguments)
    assert (answer.returncode, answer.stdout, answer.stderr) == (2, "", line + "\n")


def test_a_broken_recipe_names_its_line(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("depth: 4\nworkers:\n  num_worker: 2\n")
    answer = rayllm("pretrain", str(recipe), "--dry-run")
    assert answer.returncode == 2
    assert answer.stderr == (
        f"rayllm pretrain: error: {recipe}:3: unknown key workers.num_worker (got 2); "
        "did you mean workers.num_workers?\n"
    )


@pytest.mark.parametrize(
    ("stage", "exit_code", "line"),
    [
        ("bad_value", 2, "rayllm bad_value: error: the tokenizer is not the checkpoint's; train them together"),
        ("missing", 2, "rayllm missing: error: No such file or directory: nowhere"),
        ("forbidden", 2, "rayllm forbidden: error: Permission denied: nowhere"),
        ("remote", 2, "rayllm remote: error: said far away"),
        (
            "full_disk",
            1,
            "rayllm full_disk: error: disk full: free some space or choose another --out, then run again",
        ),
        ("leaves", 1, "enough"),
    ],
)
def test_how_a_stage_fails(odd_stages: list[str], stage: str, exit_code: int, line: str) -> None:
    command = [*odd_stages, stage, "--checkpoint=nowhere"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (answer.returncode, answer.stderr) == (exit_code, line + "\n")


def test_the_traceback_on_request(odd_stages: list[str]) -> None:
    environment = {**os.environ, "RAYLLM_TRACEBACK": "1"}
    answer = subprocess.run([*odd_stages, "bad_value"], capture_output=True, text=True, env=environment, timeout=120)
    assert answer.returncode == 2
    assert answer.stderr.startswith("rayllm bad_value: error: ")
    assert "Traceback (most recent call last)" in answer.stderr


@pytest.mark.parametrize(("stage", "error"), [("bug", "KeyError"), ("broken_pipe", "a worker is gone")])
def test_what_we_did_wrong_has_its_traceback(odd_stages: list[str], stage: str, error: str) -> None:
    answer = subprocess.run([*odd_stages, stage], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 1
    assert answer.stderr.startswith("Traceback")
    assert error in answer.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("stage", "sent", "exit_code", "said"),
    [
        ("naps", signal.SIGINT, 130, "rayllm naps: interrupted\n"),
        ("naps", signal.SIGTERM, 143, ""),
        ("naps_like_ray", signal.SIGTERM, 143, ""),
    ],
)
def test_signals_unwind(
    odd_stages: list[str], tmp_path: Path, stage: str, sent: signal.Signals, exit_code: int, said: str
) -> None:
    marker = tmp_path / "marker"
    command = [*odd_stages, stage, f"--checkpoint={marker}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (exit_code, said)
    assert marker.read_text() == "cleaned up"


def test_sigterm_handling_ends_with_the_command() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"], ["pretrain", "--dry-run"]])
def test_a_reader_that_leaves_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rayllm", *arguments]
    answer = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (answer.returncode, answer.stderr) == (141, "")
