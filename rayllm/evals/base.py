"""The `base-eval` stage: bits per byte on the validation split, and samples."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from rayllm.config.load import to_dict
from rayllm.config.schema import BaseEvalConfig
from rayllm.data.loader import validation_batches
from rayllm.data.shards import TokenShards
from rayllm.engine.sample import continue_text
from rayllm.evals.bpb import evaluate_bpb
from rayllm.runs.atomic import write_json
from rayllm.runs.checkpoint import open_checkpoint
from rayllm.runs.load import load
from rayllm.runs.run_dir import open_run
from rayllm.runs.tracking import build_tracker
from rayllm.runtime import build_runtime


def run(config: BaseEvalConfig) -> None:
    """Evaluate and print; writes report.json and metrics.jsonl to the report directory."""
    checkpoint = open_checkpoint(config.checkpoint)
    shards = TokenShards.load(config.shards)
    if shards.tokenizer_fingerprint != checkpoint.state.get("tokenizer_fingerprint"):
        raise ValueError(
            f"shards={config.shards} were made by another tokenizer than the checkpoint's ({checkpoint}): "
            "tokenize the text with the checkpoint's own (--tokenizer=CHECKPOINT/tokenizer)"
        )
    shards.verify("val")  # a number that will be quoted is not measured on damaged text
    # Beside the run's checkpoints, one report per step: runs/base/base-eval/step_000500.
    out = Path(config.out) if config.out else checkpoint.report_path("base-eval")
    plan = {"checkpoint": str(checkpoint), "step": checkpoint.step}
    with open_run(out, stage="base-eval", config=config, plan=plan, may_change=("tracking",)) as run_dir:
        runtime = build_runtime(config.device, config.dtype)
        model, tokenizer = load(checkpoint.path, runtime.device, runtime.dtype)
        start = time.perf_counter()
        print(f"base-eval: {checkpoint} on the validation split of {config.shards} ...", file=sys.stderr)
        batches = validation_batches(
            shards,
            rows_per_batch=config.rows_per_batch,
            sequence_len=model.config.sequence_len,
            max_tokens=config.max_tokens,
            long_documents=config.long_documents,
            isolate=config.isolate,
        )
        bpb = evaluate_bpb(model, batches, tokenizer.token_bytes_V(), runtime)
        samples = {}
        for prompt in config.prompts:
            greedy = replace(config.sampling, temperature=0.0, top_k=None)
            samples[prompt] = {
                "greedy": continue_text(model, tokenizer, prompt, greedy)[0],
                "sampled": continue_text(model, tokenizer, prompt, config.sampling)[0],
            }
        write_json(
            run_dir.path / "report.json",
            {
                "checkpoint": str(checkpoint),
                "step": checkpoint.step,
                "bits_per_byte": asdict(bpb),
                "samples": samples,
                "seconds": round(time.perf_counter() - start, 1),
            },
        )
        tracker = build_tracker(run_dir.path, config.tracking, config=to_dict(config), resume_step=None)
        tracker.log(checkpoint.step, {"val/bpb": bpb.value, "val/bpb_stderr": bpb.stderr})
        tracker.close()
        amount = f"{bpb.num_tokens:,} tokens, {bpb.num_bytes:,} bytes"
        print(f"bits per byte  {bpb.value:.4f} +- {bpb.stderr:.4f}   ({amount})")
        for prompt, texts in samples.items():
            for kind, text in texts.items():
                print(f"\n[{kind}] {prompt}|{text}")
        print(f"\nreport: {run_dir.path / 'report.json'}")
