"""The plan of the quickstart in words, for `--dry-run`."""

from __future__ import annotations

from rayllm.config.chat_schema import SFTConfig
from rayllm.config.quickstart_schema import QuickstartConfig
from rayllm.optim.estimate import assumed_device
from rayllm.optim.scaling import plan
from rayllm.plans.model import describe_shape
from rayllm.plans.rl import describe_run, describe_step
from rayllm.plans.train import describe_task


def describe_plan(config: QuickstartConfig) -> dict[str, object]:
    """A line of each stage; the stages' own `--dry-run` tells more."""
    derived = plan(config.pretrain, config.tokenizer.vocab_size, assumed_device(config.pretrain.workers))
    return {
        "corpus": f"{config.corpus.num_documents:,} documents",
        "model": f"{describe_shape(derived.model)}; {derived.parameters.total:,} parameters",
        "pretrain": f"{derived.num_steps:,} steps of {derived.tokens_per_step:,} tokens",
        "sft": _describe_sft(config.sft),
        "rl": f"{describe_step(config.rl)}; {describe_run(config.rl)}",
        "chat-eval": f"{', '.join(map(describe_task, config.chat_eval.tasks))}, before and after rl",
        "writes": f"a run directory for each stage, and report.html, to {config.out}",
    }


def _describe_sft(config: SFTConfig) -> str:
    return f"{', '.join(map(describe_task, config.tasks))}, in steps of {config.tokens_per_step:,} tokens"
