"""Wall time of an RL step, and where it goes: nanochat's scheme beside the product, in turns and overlapped.

    python tests/bench/bench_rl.py [--quick]     # GSM8K in RAYLLM_DATA_DIR, else prompts and lengths like its

(a) nanochat's scheme: one prompt at a time, static batches of 8 rows that decode until the slowest has ended, then a
    forward and backward for each 8 rows, padded, with all logits at once, also for groups without variance; the
    optimizer at the end. One process, all cores, eager, float32.
(b) the product at max_staleness 0, colocated, on the actors, slots and micro-batches of the recipe `laptop`;
(c) the same apart: one rollout actor, with all the slots, and one learner, with one core each; (d) as (c), at
    max_staleness 1, where weights that come while sequences run wait until these have ended.

(b) to (d) are `actors.rl.teach` on a local Ray; times are those of its metrics.jsonl. Every variant has the same:
- weights: depth 4, width 256, head 64, vocabulary 8192, context 512, random; 16 problems x 16 samples, the same 16
  problems in every step;
- prompts: GSM8K's first. Lengths: sample j of problem i is as long as GSM8K's reference answer to problem 16 i + j, to
  the token: the worker gives each sequence its own max_tokens, and no token ends one or calls a tool;
- verdicts: a hash of the answer's text, right or wrong; 2 problems of 5 are never answered right, so that 10 groups of
  16 have variance; optimizer, learning rates, temperature 1.

A run's first step (start, a validation of 2 x 2 samples) and last one (nothing is sampled ahead) are left out, of the
others the mean is taken; (a) first warms up on one prompt. Runs alternate, the best of each counts, as others share the
machine; with OMP_WAIT_POLICY=PASSIVE threads that wait do not take turns away from those who work. `overlap.bound` is
max(Tr, Tl) / (Tr + Tl), with the times that (c) waits for rollouts and learns, each alone on the machine; in (d) both
share its memory, and `overlap.k1_over_busier_side` compares a step with what the busier of the two works in it. Shares
are those of a step's wall time, idle ones besides: the part of it in which rollout actors, or learners, had nothing to
do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_engine import NUM_SAMPLES, Work, build_model
from rl_work import MAX_TOKENS, build_rl_work, judge, pool_of
from static_rl import StaticScheme

from actors import cluster, rl
from rayllm.config.chat_schema import TaskConfig
from rayllm.config.load import load_config
from rayllm.config.rl_schema import GuardConfig, RLConfig
from rayllm.runs.checkpoint import open_checkpoint, save_checkpoint
from rayllm.runs.run_dir import open_run
from rayllm.runs.tracking import read_metrics
from rayllm.runtime import build_runtime
from rayllm.text.tokenizer import Tokenizer

DEPTH = 4
CPU = torch.device("cpu")
PHASES = ("wait_for_rollouts", "learn", "publish", "evaluate", "checkpoint")
IDLE = ("rollouts_idle", "learners_idle")


def save_start(run: Path, tokenizer: Tokenizer) -> str:
    """A run directory with the model that RL starts from."""
    model = build_model(DEPTH, CPU, torch.float32)
    save_checkpoint(
        run / "checkpoints",
        1,
        model_state=model.state_dict(),
        optimizer_state=None,
        state={"stage": "sft", "model": model.config.to_dict(), "tokenizer_fingerprint": tokenizer.fingerprint},
        tokenizer=tokenizer,
        keep=1,
    )
    return str(run)


def build_config(num_steps: int, num_prompts: int) -> RLConfig:
    """The recipe `laptop`, on this work, and with nothing but steps."""
    recipe = load_config(RLConfig, "laptop")
    return replace(
        recipe,
        task=TaskConfig(num_examples=num_prompts),
        validation=TaskConfig(split="validation", num_examples=2),
        test_at_end=False,
        num_steps=num_steps + 2,
        prompts_per_step=num_prompts,
        num_samples=NUM_SAMPLES,
        max_tokens=MAX_TOKENS,
        guard=GuardConfig(max_drop=None, max_kl=None),
        rollouts=replace(recipe.rollouts, device="cpu"),
        learners=replace(recipe.learners, device="cpu"),
        eval_every=None,
        eval_samples=2,
        save_every=None,
        samples_every=None,
    )


def build_variants(config: RLConfig, default_dtype: str) -> dict[str, RLConfig]:
    """The product's runs by name; `k0_float32` only where that is not the default dtype."""
    together = replace(config, placement="colocated")
    apart = replace(
        config,
        placement="disaggregated",
        rollouts=replace(
            config.rollouts,
            num_actors=1,
            num_slots=config.rollouts.num_slots * config.rollouts.num_actors,
            cpus_per_actor=1,
            new_weights="drain",
        ),
        learners=replace(config.learners, num_workers=1, cpus_per_worker=1),
    )
    variants = {"k0": together, "k0_apart": apart, "k1_apart": replace(apart, max_staleness=1)}
    if default_dtype != "float32":
        variants["k0_float32"] = replace(
            together,
            rollouts=replace(together.rollouts, dtype="float32"),
            learners=replace(together.learners, dtype="float32"),
        )
    return variants


def run_product(config: RLConfig, work: Work, ray_cluster: cluster.Cluster) -> dict[str, float]:
    """Mean times and idle shares of the steps in between."""
    checkpoint = open_checkpoint(config.checkpoint)
    with open_run(config.out, stage="rl", config=config, plan={}) as run_dir:
        rl.teach(config, run_dir, checkpoint, ray_cluster, resumes=False, pool_class=pool_of(work))
    records = [r for r in read_metrics(run_dir.metrics_path) if "time/step_s" in r][1:-1]
    assert len(records) == config.num_steps - 2
    assert all(r["train/num_tokens"] == work.num_tokens and r["train/num_failed"] == 0 for r in records)
    names = {name: f"time/{name}_s" for name in ("step", *PHASES)} | {name: f"time/{name}_share" for name in IDLE}
    return mean([{name: r.get(key, 0.0) for name, key in names.items()} for r in records])


def mean(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 problems, lengths a quarter, one step: it works")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each variant")
    args = parser.parse_args()
    if args.quick:
        args.steps = args.repeats = 1
    work, tokenizer = build_rl_work(args.quick)
    config = build_config(args.steps, len(work.prompts))
    default_dtype = str(build_runtime("cpu").dtype).removeprefix("torch.")
    lengths = sum(work.lengths, [])
    print(
        f"{len(work.prompts)} prompts of {min(map(len, work.prompts))}-{max(map(len, work.prompts))} tokens x "
        f"{NUM_SAMPLES} samples of {min(lengths)}-{max(lengths)}, mean {work.num_tokens / len(lengths):.0f}; "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; default dtype {default_dtype}"
    )
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, checkpoint=save_start(Path(folder, "sft"), tokenizer))
        for repeat in range(args.repeats):
            scheme = StaticScheme(build_model(DEPTH, CPU, torch.float32), config, work, tokenizer, judge)
            scheme.step(num_prompts=1)
            steps = [scheme.step(len(work.prompts)) for _ in range(args.steps)]
            runs.setdefault("nanochat", []).append(mean(steps))
            print(f"nanochat {runs['nanochat'][-1]['step']:.2f} s", flush=True)
            with cluster.connect() as ray_cluster:
                for name, variant in build_variants(config, default_dtype).items():
                    times = run_product(replace(variant, out=f"{folder}/{name}_{repeat}"), work, ray_cluster)
                    runs.setdefault(name, []).append(times)
                    print(f"{name} {times['step']:.2f} s", flush=True)
    print(json.dumps(tell(runs)))


def tell(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Print the table, with the goals; the result."""
    best = {name: min(tries, key=lambda times: times["step"]) for name, tries in runs.items()}
    base = best["nanochat"]["step"]
    print(f"\n{'':<12}{'s/step':>8}{'times (a)':>11}", *(f"{name:>18}" for name in (*PHASES, "other", *IDLE)), "  runs")
    shares: dict[str, dict[str, float]] = {}
    for name, times in best.items():
        shares[name] = {phase: times[phase] / times["step"] for phase in PHASES if times.get(phase)}
        shares[name]["other"] = 1 - sum(shares[name].values())
        columns = [shares[name].get(phase, 0.0) for phase in (*PHASES, "other")] + [times.get(i, 0.0) for i in IDLE]
        print(
            f"{name:<12}{times['step']:>8.2f}{base / times['step']:>11.1f}",
            *(f"{share:>18.1%}" for share in columns),
            "  " + ", ".join(f"{run['step']:.2f}" for run in runs[name]),
        )
    sampling_s, learning_s = (best["k0_apart"][phase] for phase in PHASES[:2])
    result = {
        "speedup.k0": base / best["k0"]["step"],
        "speedup_same_dtype.k0": base / best.get("k0_float32", best["k0"])["step"],
        "overlap.k1_over_k0": best["k1_apart"]["step"] / best["k0_apart"]["step"],
        "overlap.bound": max(sampling_s, learning_s) / (sampling_s + learning_s),
    }
    away = result["overlap.k1_over_k0"] / result["overlap.bound"] - 1
    overlapped = best["k1_apart"]
    busier_s = overlapped["step"] * (1 - min(overlapped[idle] for idle in IDLE))
    result["overlap.k1_over_busier_side"] = overlapped["step"] / busier_s
    print(f"(b) k0 is {result['speedup.k0']:.1f} times as fast as (a): goal 5")
    print(f"    with equal dtype {result['speedup_same_dtype.k0']:.1f}: goal 3")
    print(f"(d) over (c) is {result['overlap.k1_over_k0']:.3f}, the bound {result['overlap.bound']:.3f}, ", end="")
    print(f"{away:+.0%}: goal within 15 %")
    print(f"    (d)'s busier side works {busier_s:.1f} s a step, ", end="")
    print(f"where (c)'s takes {max(sampling_s, learning_s):.1f} s with the memory to itself")
    rounded = {name: {phase: round(share, 3) for phase, share in of.items()} for name, of in shares.items()}
    return {key: round(value, 3) for key, value in sorted(result.items())} | {"phase_share": rounded}


if __name__ == "__main__":
    main()
