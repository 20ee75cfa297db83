"""The plan of pretraining in words, for `--dry-run`."""

from __future__ import annotations

from rayllm.config.schema import PretrainConfig
from rayllm.optim.estimate import assumed_device
from rayllm.optim.scaling import plan
from rayllm.plans.model import describe_shape, find_vocab_size
from rayllm.plans.train import describe_time, worker_memory


def describe_plan(config: PretrainConfig) -> dict[str, object]:
    """The plan in words, for `--dry-run`: label -> value with its unit."""
    vocab_size, origin = find_vocab_size(config.data.tokenizer)
    device = assumed_device(config.workers)
    derived = plan(config, vocab_size, device)
    counts, model = derived.parameters, derived.model
    flops = derived.flops_per_token * derived.num_tokens
    tokens_at_once = derived.rows_per_micro_batch * model.sequence_len
    return {
        "model": describe_shape(model),
        "vocabulary": f"{vocab_size:,} ({origin})",
        "parameters": f"{counts.total:,} (matrices {counts.matrices:,}, lm_head {counts.lm_head:,}, "
        f"wte {counts.wte:,}, value embeddings {counts.value_embeds:,}, scalars {counts.scalars:,})",
        "flops_per_token": f"{derived.flops_per_token:.3e}",
        "training_flops": f"{flops:.3e}",
        "tokens_per_step": f"{derived.tokens_per_step:,} = {derived.num_micro_batches} micro-batches x up to "
        f"{derived.rows_per_micro_batch} rows x {model.sequence_len} tokens x {config.workers.num_workers} worker(s)",
        "steps": f"{derived.num_steps:,}",
        "tokens": f"{derived.num_tokens:,} ({derived.num_tokens / counts.scaling:.2f} per scaling parameter)",
        "lr_multiplier": f"{derived.lr_multiplier:.4f} (square root of tokens_per_step / 2^19)",
        "matrix_weight_decay": f"{derived.matrix_weight_decay:.4f}",
        "estimated_memory": f"{worker_memory(model, tokens_at_once, config.workers)} per worker",
        "estimated_time": describe_time(flops, config.workers),
    }
