"""Precedence, the traps of YAML, and errors that name key, value, origin and cure."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayllm.config.chat_schema import ChatConfig, ChatEvalConfig, ReportConfig, ServeConfig, SFTConfig, TaskConfig
from rayllm.config.flags import list_switches, split_arguments
from rayllm.config.load import ConfigError, load_config, to_dict, to_yaml
from rayllm.config.quickstart_schema import QuickstartConfig
from rayllm.config.rl_schema import RLConfig
from rayllm.config.schema import (
    BaseEvalConfig,
    ImportNanochatConfig,
    PretrainConfig,
    SampleConfig,
    SamplingConfig,
    TokenizeConfig,
    TokenizerConfig,
    TrackingConfig,
)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(schema: type, recipe: str | None = None, flags: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(schema, recipe, flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Precedence


def test_defaults_then_recipe_then_flags(tmp_path: Path) -> None:
    recipe = write(tmp_path, "depth: 6\nmodel:\n  head_dim: 32\n  sequence_len: 256\nlog_every: 5\n")
    config = load_config(
        PretrainConfig, recipe, ["--depth=8", "--model.head-dim", "64", "--log_every=7", "--log_every=9"]
    )
    assert config.depth == 8
    assert (config.model.head_dim, config.model.sequence_len, config.model.aspect_ratio) == (64, 256, 64)
    assert config.log_every == 9  # the last of two flags
    assert load_config(PretrainConfig) == PretrainConfig()


def test_a_group_keeps_the_defaults_its_stage_gave_it() -> None:
    """base-eval draws 48 tokens where SamplingConfig alone would draw 128."""
    assert load_config(BaseEvalConfig, None, ["--sampling.seed=3"]).sampling == SamplingConfig(max_tokens=48, seed=3)


def test_a_group_can_be_one_flow_mapping() -> None:
    config = load_config(PretrainConfig, None, ["--horizon={kind: steps, value: 10}"])
    assert (config.horizon.kind, config.horizon.value) == ("steps", 10.0)


def test_an_empty_recipe_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(PretrainConfig, write(tmp_path, "# nothing but a comment\n")) == PretrainConfig()


# Values


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--eval_every=null", "eval_every", None),
        ("--tokens_per_step=auto", "tokens_per_step", "auto"),
        ("--tokens_per_step=1e6", "tokens_per_step", 1_000_000),
        ("--eval_tokens=6_000_000", "eval_tokens", 6_000_000),
        ("--eval_tokens=1e6", "eval_tokens", 1_000_000),
        ("--seed=-1", "seed", -1),
        ("--seed=010", "seed", 10),
        ("--out=runs/a: b #1", "out", "runs/a: b #1"),
        ("--out=2026", "out", "2026"),
        ("--out=1e-4", "out", "1e-4"),
        ("--out=true", "out", "true"),
        ("--out=[x", "out", "[x"),
        ("--out='it''s'", "out", "it's"),
        ('--out="a"b', "out", '"a"b'),
        ("--tracking.sinks=wandb", "tracking.sinks", ["wandb"]),
        ("--tracking.sinks=[wandb, mlflow]", "tracking.sinks", ["wandb", "mlflow"]),
        ("--tracking.sinks=[]", "tracking.sinks", []),
        ("--tracking.name=null", "tracking.name", None),
        ("--tracking.name='null'", "tracking.name", "null"),
        ("--tracking.name=no", "tracking.name", "no"),
        ("--optim.matrix_lr=1e-4", "optim.matrix_lr", 1e-4),
        ("--optim.matrix_lr=.5", "optim.matrix_lr", 0.5),
        ("--optim.matrix_lr=1", "optim.matrix_lr", 1.0),
    ],
)
def test_flag_values(flag: str, key: str, value: object) -> None:
    # 1e6 tokens are divisible by rows of 1000, too
    tree = to_dict(load_config(PretrainConfig, None, ["--model.sequence_len=1000", flag]))
    for part in key.split("."):
        tree = tree[part]
    assert tree == value
    assert type(tree) is type(value)


@pytest.mark.parametrize(
    ("flag", "prompts"),
    [
        ("--prompts=Once upon a time", ("Once upon a time",)),
        ("--prompts='Once, there'", ("Once, there",)),
        ('--prompts="Hello," she said: #1', ('"Hello," she said: #1',)),
        ("--prompts=[a, 'b, c', 42]", ("a", "b, c", "42")),
        ("--prompts=7", ("7",)),
    ],
)
def test_prompts(flag: str, prompts: tuple[str, ...]) -> None:
    assert load_config(SampleConfig, None, [flag]).prompts == prompts


def test_yaml_1_1_traps_in_a_recipe(tmp_path: Path) -> None:
    recipe = write(tmp_path, "out: no\noptim: {matrix_lr: 1e-4}\ntracking: {name: 12:30, project: 2026-01-01}\n")
    config = load_config(PretrainConfig, recipe)
    assert config.out == "no"
    assert config.optim.matrix_lr == 1e-4
    assert config.tracking == TrackingConfig(name="12:30", project="2026-01-01")


def test_one_source_in_a_recipe_needs_no_brackets(tmp_path: Path) -> None:
    assert load_config(TokenizerConfig, write(tmp_path, "sources: a.txt\n")).sources == ("a.txt",)


@given(
    text=st.text().filter(lambda t: t.strip()),
    prompts=st.lists(st.text(), min_size=1),
    number=st.floats(min_value=0, allow_nan=False, allow_infinity=False),
)
def test_to_yaml_reads_back(text: str, prompts: list[str], number: float) -> None:
    config = SampleConfig(checkpoint=text, prompts=tuple(prompts), sampling=SamplingConfig(temperature=number))
    # A file, not a flag: a new one for each example, which tmp_path cannot give.
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml(config), encoding="utf-8", newline="")
        assert load_config(SampleConfig, str(path)) == config


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t.strip() and t[0] not in "\"'"))
def test_a_text_flag_is_the_text_it_is(text: str) -> None:
    assert load_config(PretrainConfig, None, [f"--out={text}"]).out == text


# Lists of groups


def test_a_list_of_groups_in_a_recipe_and_in_a_flag(tmp_path: Path) -> None:
    recipe = write(tmp_path, "tasks:\n  - {name: gsm8k, epochs: 4}\n  - name: chat_jsonl\n    path: a.jsonl\n")
    tasks = (TaskConfig(name="gsm8k", epochs=4), TaskConfig(name="chat_jsonl", path="a.jsonl"))
    assert load_config(SFTConfig, recipe).tasks == tasks
    flag = "--tasks=[{name: gsm8k, epochs: 4}, {name: chat_jsonl, path: a.jsonl}]"
    assert load_config(SFTConfig, None, [flag]).tasks == tasks
    assert load_config(SFTConfig, recipe, ["--tasks=[{name: gsm8k}]"]).tasks == (TaskConfig(name="gsm8k"),)
    assert load_config(SFTConfig, None, ["--tasks={name: gsm8k}"]).tasks == (TaskConfig(name="gsm8k"),)


def test_one_key_of_one_item(tmp_path: Path) -> None:
    recipe = write(tmp_path, "tasks: [{name: gsm8k}, {epochs: 3}]\n")
    config = load_config(SFTConfig, recipe, ["--tasks.1.epochs=5", "--tasks.0={num_examples: 7}"])
    assert config.tasks == (TaskConfig(name="gsm8k", num_examples=7), TaskConfig(epochs=5))
    nested = load_config(QuickstartConfig, None, ["--sft.tasks.0.num_examples=120"])
    assert nested.sft.tasks == (TaskConfig(num_examples=120),)


def test_a_new_item_is_like_the_first_of_the_default() -> None:
    """What is said to be held out is so, unless somebody says otherwise."""
    validation = load_config(SFTConfig, None, ["--validation=[{name: gsm8k}, {}]"]).validation
    assert validation == (
        TaskConfig(name="gsm8k", split="validation", num_examples=200),
        TaskConfig(split="validation", num_examples=200),
    )


task_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t.strip())


@given(st.lists(st.tuples(task_texts, st.integers(1, 9)), min_size=1, max_size=3))
def test_lists_of_groups_read_back(parts: list[tuple[str, int]]) -> None:
    tasks = tuple(TaskConfig(name="chat_jsonl", path=path, epochs=epochs) for path, epochs in parts)
    config = SFTConfig(tasks=tasks)
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml(config), encoding="utf-8", newline="")
        assert load_config(SFTConfig, str(path)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks:\n- name: gsm8k\n- nme: x\n", "{path}:3: unknown key tasks.1.nme (got x); did you mean tasks.1.name?"),
        ("tasks:\n- name: gsm8k\n  epochs: 4.5\n",
         "{path}:3: tasks.0.epochs: got 4.5, expected integer > 0; write for example epochs: 1"),
        ("tasks:\n- name: gsm8k\n- gsm8k\n",
         "{path}:3: tasks.1: got gsm8k, expected a group with keys among name, split, path, num_examples, max_level, "
         "seed, epochs; write for example - {{name: word_problems}}"),
        ("tasks:\n- name: gsm\n",
         "{path}:2: tasks.0.name: got gsm, expected word_problems, gsm8k or chat_jsonl; did you mean gsm8k?"),
        ("tasks:\n- name: gsm8k\n  name: gsm8k\n",
         "{path}:3: tasks.0.name: got gsm8k, a second value, first on line 2; keep one of them"),
        ("tasks:\n- name: gsm8k\n- name: chat_jsonl\n",
         "{path}:3: tasks.1.path is missing; tasks.1.name=chat_jsonl reads conversations from a file, write "
         "--tasks.1.path=FILE"),
    ],
)  # fmt: skip
def test_errors_in_a_list_of_groups_name_the_item_and_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert error_of(SFTConfig, path) == message.format(path=path)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--tasks=[{nam: x}]", "--tasks=[{nam: x}]: unknown key tasks.0.nam (got x); did you mean tasks.0.name?"),
        ("--tasks", "--tasks: tasks: got no value, expected list of groups; write --tasks='[{name: word_problems}]'"),
        ("--tasks=[{name: gsm8k",
         "--tasks=[{name: gsm8k: tasks: got [{name: gsm8k, not valid YAML; write for example "
         "--tasks='[{name: word_problems}]'"),
        ("--tasks.name=x",
         "--tasks.name=x: unknown key tasks.name; tasks is a list, whose items are tasks.0, tasks.1, ..."),
        ("--tasks.2.epochs=3",
         "--tasks.2.epochs=3: tasks.2.epochs: got 3, and tasks has 1 item(s), counted from 0; write all of tasks to "
         "have more"),
        ("--epochs=3",
         "--epochs=3: unknown key epochs; did you mean --tasks.0.epochs or --validation.0.epochs?"),
    ],
)  # fmt: skip
def test_flag_errors_in_a_list_of_groups(flag: str, message: str) -> None:
    assert error_of(SFTConfig, None, (flag,)) == message


def test_a_list_written_anew_is_not_blamed_on_the_recipe(tmp_path: Path) -> None:
    recipe = write(tmp_path, "tasks:\n- name: gsm8k\n")
    message = error_of(SFTConfig, recipe, ("--tasks=[{split: test_unseen, name: gsm8k}]",))
    assert message.startswith("--tasks=[{split: test_unseen, name: gsm8k}] and --tasks=[")


# Errors


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--depht=4", "--depht=4: unknown key depht; did you mean --depth?"),
        ("--head_dim=4", "--head_dim=4: unknown key head_dim; did you mean --model.head_dim?"),
        ("--dryrun", "--dryrun: unknown key dryrun; did you mean --dry-run?"),
        ("--flavour=4", "--flavour=4: unknown key flavour; the keys here are out, depth, model, horizon, "
         "tokens_per_step, rows_per_micro_batch, seed, data, optim, workers, log_every, eval_every, eval_tokens, "
         "sample_every, sample_tokens, save_every, keep_checkpoints, checkpoints, tracking"),
        ("--model={head_dim: 4", "--model={head_dim: 4: model: got {head_dim: 4, not valid YAML; write for example "
         "--model='{aspect_ratio: 64}'"),
        ("--depth.x=4", "--depth.x=4: unknown key depth.x; depth is a value and has no keys"),
        ("--depth=-3", "--depth=-3: depth: got -3, expected integer > 0; write for example --depth=12"),
        ("--depth=four", "--depth=four: depth: got four, expected integer > 0; write for example --depth=12"),
        ("--depth=true", "--depth=true: depth: got true, expected integer > 0; write for example --depth=12"),
        ("--depth=4.5", "--depth=4.5: depth: got 4.5, expected integer > 0; write for example --depth=12"),
        ("--depth='4'", "--depth='4': depth: got '4', expected integer > 0; write for example --depth=12"),
        ("--depth", "--depth: depth: got no value, expected integer > 0; write --depth=12"),
        ("--depth=", "--depth=: depth: got no value, expected integer > 0; "
         "write --depth=12 (or '\"\"' for an empty text)"),
        (
            "--optim.final_lr_fraction=1.5",
            "--optim.final_lr_fraction=1.5: optim.final_lr_fraction: got 1.5, expected number from 0 to 1; "
            "write for example --optim.final_lr_fraction=0.05",
        ),
        (
            "--optim.matrix_lr=.inf",
            "--optim.matrix_lr=.inf: optim.matrix_lr: got .inf, expected number > 0; write for example "
            "--optim.matrix_lr=0.02",
        ),
        (
            "--eval_every=-1",
            "--eval_every=-1: eval_every: got -1, expected integer > 0 or null; write for example --eval_every=250",
        ),
        (
            "--horizon.kind=token",
            "--horizon.kind=token: horizon.kind: got token, expected ratio, flops, tokens or steps; "
            "did you mean tokens?",
        ),
        (
            "--tracking.sinks=[wandb, tensorbord]",
            "--tracking.sinks=[wandb, tensorbord]: tracking.sinks: got [wandb, tensorbord], expected list of wandb, "
            "tensorboard or mlflow; write for example --tracking.sinks='[wandb]'",
        ),
        (
            "--model=3",
            "--model=3: model: got 3, expected a group with keys among aspect_ratio, head_dim, num_kv_heads, "
            "sequence_len, window_pattern; write for example --model='{aspect_ratio: 64}'",
        ),
        (
            "--model.window_pattern=SLX",
            "--model.window_pattern=SLX: model.window_pattern: got SLX, expected text matching ^[SL]+$; "
            "write for example --model.window_pattern=SSSL",
        ),
        (
            "--tracking.sinks=wandb,mlflow",
            "--tracking.sinks=wandb,mlflow: tracking.sinks: got wandb,mlflow, one value or several?; write "
            "--tracking.sinks='[wandb, mlflow]' for several, --tracking.sinks='[\"wandb,mlflow\"]' for one",
        ),
        ("--model={head_dim: 4, head_dim: 8}",
         "--model={head_dim: 4, head_dim: 8}: model.head_dim: got 8, a second value; keep one of them"),
    ],
)  # fmt: skip
def test_flag_errors(flag: str, message: str) -> None:
    assert error_of(PretrainConfig, None, (flag,)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth: 4\ndepht: 5\n", "{path}:2: unknown key depht (got 5); did you mean depth?"),
        ("model:\n  width: 5\n", "{path}:2: unknown key model.width (got 5); the keys here are model.aspect_ratio, "
         "model.head_dim, model.num_kv_heads, model.sequence_len, model.window_pattern"),
        ("depth: 4\n\ndepth: 5\n", "{path}:3: depth: got 5, a second value, first on line 1; keep one of them"),
        ("# a comment\ndepth: -3\n", "{path}:2: depth: got -3, expected integer > 0; write for example depth: 12"),
        ("out: 5\n", '{path}:1: out: got 5, expected text; write out: "5"'),
        ("horizon:\n  kind: 5\n", "{path}:2: horizon.kind: got 5, expected ratio, flops, tokens or steps; "
         "write for example kind: ratio"),
        ("out:\n", "{path}:1: out: got nothing, expected text; write for example out: runs/base"),
        ("out: [a]\n", "{path}:1: out: got [a], expected text; write for example out: runs/base"),
        ("depth: {a: 1}\n", "{path}:1: depth: got {{a: 1}}, expected integer > 0; write for example depth: 12"),
        ("seed: on\n", "{path}:1: seed: got on, expected integer; write for example seed: 42"),
        ("model:\n  head_dim: big\n", "{path}:2: model.head_dim: got big, expected integer > 0; write for example "
         "head_dim: 128"),
        ("model: null\n", "{path}:1: model: got null, expected a group with keys among aspect_ratio, head_dim, "
         "num_kv_heads, sequence_len, window_pattern; write for example model: {{aspect_ratio: 64}}"),
        ("- depth\n", "{path}:1: got - depth; a recipe is a list of lines like `key: value`"),
    ],
)  # fmt: skip
def test_recipe_errors(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert error_of(PretrainConfig, path) == message.format(path=path)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("depth: 4\nmodel: {head_dim: 4\n", 3, "expected ',' or '}'"),
        ("depth: 4\n\tseed: 1\n", 2, "cannot start any token"),
        ("depth: 4\n---\ndepth: 5\n", 2, "another document"),
        ("depth: 4\nout: \x07\n", 2, "character"),
        ("a: " + "[" * 5000, None, "nested too deeply"),
    ],
)
def test_yaml_syntax_errors_name_file_and_line(tmp_path: Path, text: str, line: int | None, reason: str) -> None:
    path = write(tmp_path, text)
    message = error_of(PretrainConfig, path)
    assert message.startswith(f"{path}:{line}: not valid YAML: " if line else f"{path}: not valid YAML: ")
    assert reason in message


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"depth: 4\n\xff\xfe")
    assert error_of(PretrainConfig, str(path)) == f"{path}:2: not UTF-8 text; save the recipe as UTF-8"


def test_bytes_that_are_no_unicode_in_a_flag() -> None:
    message = error_of(PretrainConfig, None, ("--out=runs/\udcff",))
    assert "out: got 'runs/\\udcff', which is not valid Unicode" in message
    assert message.isascii()


def test_a_value_set_by_a_flag_is_blamed_on_the_flag_not_the_recipe(tmp_path: Path) -> None:
    recipe = write(tmp_path, "depth: 4\n")
    assert error_of(PretrainConfig, recipe, ("--depth=0",)).startswith("--depth=0: depth: got 0,")


def test_positional_among_flags() -> None:
    assert error_of(PretrainConfig, None, ("depth=4",)) == "'depth=4' is no flag; write --key=value"


def test_split_arguments() -> None:
    arguments = ["laptop", "--depth", "4", "--seed", "-1", "--out=a=b", "--last"]
    assert split_arguments(arguments) == (["laptop"], ["--depth=4", "--seed=-1", "--out=a=b", "--last"])
    assert split_arguments(["--a", "--b", "c"]) == ([], ["--a", "--b=c"])


@pytest.mark.parametrize(
    ("flags", "rollout_only", "replay"),
    [
        (["--rollout-only"], True, None),
        (["--rollout_only", "--seed=3"], True, None),
        (["--rollout-only", "false"], False, None),
        (["--rollout-only=false", "--rollout-only", "true"], True, None),
        (["--replay", "some-file.jsonl.gz"], False, "some-file.jsonl.gz"),
        (["--replay=runs/a-b"], False, "runs/a-b"),
    ],
)
def test_flags_as_people_write_them(flags: list[str], rollout_only: bool, replay: str | None) -> None:
    config = load_config(RLConfig, None, flags)
    assert (config.rollout_only, config.replay) == (rollout_only, replay)


def test_a_flag_that_stands_alone_takes_no_recipe_for_its_value() -> None:
    switches = list_switches(RLConfig)
    assert {"rollout_only", "test_at_end"} <= switches and not {"replay", "seed", "loss"} & switches
    assert split_arguments(["--rollout-only", "laptop", "--seed", "3"], switches) == (
        ["laptop"], ["--rollout-only", "--seed=3"],
    )  # fmt: skip
    assert split_arguments(["--rollout-only", "yes"], switches) == ([], ["--rollout-only=yes"])
    assert load_config(QuickstartConfig, None, ["--sft.isolate=false", "--sft.isolate"]).sft.isolate


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rollout-only", "yes"), "--rollout-only=yes: rollout_only: got yes, expected true or false; write for "
         "example --rollout_only=false"),
        (("--rollout-only=",), "--rollout-only=: rollout_only: got no value, expected true or false; write "
         "--rollout_only=false (or '\"\"' for an empty text)"),
        (("--rollout-onyl",), "--rollout-onyl: unknown key rollout_onyl; did you mean --rollout_only?"),
        (("--rollout-only", "--replay=f"), "--replay=f and --rollout-only: rollout_only=True is about sampling, and "
         "replay=f samples nothing; leave one out"),
    ],
)  # fmt: skip
def test_errors_of_flags_that_stand_alone(flags: tuple[str, ...], message: str) -> None:
    assert error_of(RLConfig, None, flags) == message


# Combinations


@pytest.mark.parametrize(
    ("schema", "flags", "message"),
    [
        (
            PretrainConfig,
            ("--depth=1e30", "--model.num_kv_heads=7"),
            "--depth=1e30: depth=1000000000000000019884624838656 is beyond the limit; write --depth=1000 or less",
        ),
        (
            PretrainConfig,
            ("--model.sequence_len=10000000000",),
            "--model.sequence_len=10000000000: model.sequence_len=10000000000 is beyond the limit; write "
            "--model.sequence_len=1048576 or less",
        ),
        (
            PretrainConfig,
            ("--seed=-99999999999999999999",),
            "--seed=-99999999999999999999: seed=-99999999999999999999 is beyond the limit; write "
            "--seed=-4611686018427387904 or more",
        ),
        (
            PretrainConfig,
            ("--model.head_dim=63",),
            "--model.head_dim=63: model.head_dim=63 is odd, but rotary embeddings turn channels in pairs; write an "
            "even number, such as 64",
        ),
        (
            PretrainConfig,
            ("--depth=4", "--model.head_dim=64", "--model.num_kv_heads=3"),
            "--model.num_kv_heads=3 and --depth=4 and --model.head_dim=64: model.num_kv_heads=3 does not divide the 4 "
            "query heads (depth 4 * aspect_ratio 64 / head_dim 64); write one of 1, 2, 4, or null",
        ),
        (
            PretrainConfig,
            ("--tokens_per_step=5000", "--workers.num_workers=2"),
            "--tokens_per_step=5000 and --workers.num_workers=2: tokens_per_step=5000 is not divisible by "
            "model.sequence_len 2048 * workers.num_workers 2 = 4096; write --tokens_per_step=4096",
        ),
        (
            PretrainConfig,
            ("--eval_tokens=100",),
            "--eval_tokens=100: eval_tokens=100 is less than one row of model.sequence_len=2048; write at least 2048",
        ),
        (
            PretrainConfig,
            ("--horizon.kind=steps", "--horizon.value=2.5"),
            "--horizon.value=2.5 and --horizon.kind=steps: horizon.value=2.5 is no whole number of steps; write "
            "--horizon.value=3",
        ),
        (
            PretrainConfig,
            ("--depth=1", "--model.aspect_ratio=8", "--model.head_dim=8"),
            "--depth=1 and --model.aspect_ratio=8 and --model.head_dim=8: depth=1 makes a model of width 8, and the "
            "least is 24; raise depth, model.aspect_ratio or model.head_dim",
        ),
        (
            PretrainConfig,
            ("--workers.device=mps", "--workers.num_workers=2"),
            "--workers.num_workers=2 and --workers.device=mps: workers.num_workers=2 is too many for "
            "workers.device=mps, which serves one process; write --workers.num_workers=1 or --workers.device=cpu",
        ),
        (
            TokenizerConfig,
            (),
            "defaults: sources=[] leaves nothing to train on; write --sources=FILE, or --kind=byte",
        ),
        (TokenizeConfig, (), "defaults: sources=[] leaves nothing to tokenize; write --sources=FILE"),
        (
            TokenizeConfig,
            ("--sources=a", "--validation.kind=sources"),
            "--validation.kind=sources: validation.kind=sources needs validation.sources=[...]; name what to hold out, "
            "or write kind hash",
        ),
        (
            TokenizeConfig,
            ("--sources=a", "--validation.sources=b"),
            "--validation.sources=b: validation.sources=['b'] is not read with validation.kind=hash; write "
            "--validation.kind=sources to hold these out, or leave validation.sources empty",
        ),
        (
            TokenizeConfig,
            ("--sources=a", "--validation.fraction=1"),
            "--validation.fraction=1: validation.fraction=1 leaves nothing to train on; write a number below 1",
        ),
        (
            SampleConfig,
            ("--prompts=[]",),
            '--prompts=[]: prompts=[] leaves nothing to continue; write --prompts="Once upon a time"',
        ),
        (ImportNanochatConfig, (), "defaults: source is missing; give the directory of the nanochat checkpoint"),
        (PretrainConfig, ("--out=''",), "--out='': out is empty; write the path of a directory"),
        (
            PretrainConfig,
            ("--data.shards=' '",),
            "--data.shards=' ': data.shards is empty; write the path of a directory",
        ),
        (
            SFTConfig,
            ("--tasks=[]",),
            "--tasks=[]: tasks=[] leaves nothing to learn; write --tasks='[{name: word_problems}]'",
        ),
        (
            SFTConfig,
            ("--validation=[]",),
            "--validation=[]: validation=[] leaves nothing to measure; write "
            "--validation='[{name: word_problems, split: validation}]'",
        ),
        (
            SFTConfig,
            ("--validation.0.split=train",),
            "--validation.0.split=train: validation.0 holds what tasks.0 learns from (word_problems, split train); "
            "write --validation.0.split=validation",
        ),
        (
            SFTConfig,
            ("--sequence_len=512", "--tokens_per_step=1000"),
            "--tokens_per_step=1000 and --sequence_len=512: tokens_per_step=1000 is not divisible by sequence_len 512 "
            "* workers.num_workers 1 = 512; write --tokens_per_step=1024",
        ),
        (
            SFTConfig,
            ("--tasks.0.path=a.jsonl",),
            "--tasks.0.path=a.jsonl: tasks.0.path=a.jsonl is not read by tasks.0.name=word_problems; write "
            "--tasks.0.name=chat_jsonl, or leave the path out",
        ),
        (
            RLConfig,
            ("--num_samples=1",),
            "--num_samples=1: num_samples=1 leaves no baseline: a sample is judged against the others of its problem; "
            "write --num_samples=16, or at least 2",
        ),
        (
            RLConfig,
            ("--task.name=chat_jsonl", "--task.path=a"),
            "--task.name=chat_jsonl: task.name=chat_jsonl has no verdict on answers; write --task.name=gsm8k or "
            "another",
        ),
        (
            RLConfig,
            ("--task.name=gsm8k", "--task.split=test_unseen"),
            "--task.split=test_unseen and --task.name=gsm8k: task.split=test_unseen is no part of gsm8k, which has "
            "train, validation, test; write --task.split=test",
        ),
        (
            RLConfig,
            ("--learners.device=mps", "--learners.num_workers=2"),
            "--learners.num_workers=2 and --learners.device=mps: learners.num_workers=2 is too many for "
            "learners.device=mps, which serves one process; write --learners.num_workers=1 or --learners.device=cpu",
        ),
        (
            ChatEvalConfig,
            ("--tasks.0.epochs=2",),
            "--tasks.0.epochs=2: tasks.0.epochs=2 counts only in the mixture of sft; leave it out here",
        ),
        (
            ChatEvalConfig,
            ("--tasks=[]",),
            "--tasks=[]: tasks=[] leaves nothing to be tested on; write --tasks='[{name: word_problems, split: test}]'",
        ),
        (
            ChatConfig,
            ("--prompt=''",),
            "--prompt='': prompt is empty; write what to ask, or leave it out to have a conversation",
        ),
        (ServeConfig, ("--checkpoint=''",), "--checkpoint='': checkpoint is empty; write the path of a directory"),
        (
            ServeConfig,
            ("--host=' '",),
            "--host=' ': host is empty; write --host=127.0.0.1, or 0.0.0.0 to open it to the network",
        ),
        (
            ServeConfig,
            ("--model_name=''",),
            "--model_name='': model_name is empty; write a name, or leave it out to have the run's",
        ),
        (ReportConfig, (), "defaults: run is missing; give a run directory, or the folder of a model's runs"),
        (
            QuickstartConfig,
            ("--rl.num_samples=1",),
            "--rl.num_samples=1: rl: num_samples=1 leaves no baseline: a sample is judged against the others of its "
            "problem; write --rl.num_samples=16, or at least 2",
        ),
    ],
)
def test_impossible_combinations(schema: type, flags: tuple[str, ...], message: str) -> None:
    assert error_of(schema, None, flags) == message


def test_a_combination_names_the_line_of_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "tokens_per_step: 1000\nmodel:\n  sequence_len: 512\n")
    message = error_of(PretrainConfig, path, ("--workers.num_workers=2",))
    assert message.startswith(f"{path}:1 and {path}:3 and --workers.num_workers=2: tokens_per_step=1000 is not")


def test_a_byte_tokenizer_needs_no_sources() -> None:
    assert load_config(TokenizerConfig, None, ["--kind=byte"]).kind == "byte"


@pytest.mark.parametrize("schema", [SFTConfig, RLConfig, ChatEvalConfig, ChatConfig, ServeConfig, QuickstartConfig])
def test_the_defaults_of_the_chat_stages_can_work(schema: type) -> None:
    assert load_config(schema) == schema()
