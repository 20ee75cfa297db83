"""The tree of the quickstart: the life of a small model in one go, made of the stages' own trees."""

from __future__ import annotations

from rayllm.config.chat_schema import ChatEvalConfig, SFTConfig
from rayllm.config.frozen import frozen
from rayllm.config.rl_schema import RLConfig
from rayllm.config.schema import NonNegativeInt, PositiveInt, PretrainConfig, TokenizeConfig, TokenizerConfig


@frozen
class CorpusConfig:
    """The built-in text: stories about the world that the word problems ask about, with no solution among them."""

    num_documents: PositiveInt = 20_000
    """Documents to write."""
    seed: int = 0
    """Seed of the text."""


@frozen
class QuickstartConfig:
    """The whole life of a small model on built-in data: from text to a chat model taught by RL, in minutes.

    The groups are the stages' own recipes; where each reads and writes is set below `out`.
    """

    out: str = "runs/quickstart"
    """Folder of the stages' run directories."""
    seed: NonNegativeInt = 0
    """Added to every seed of every stage but those of the problems held out."""
    corpus: CorpusConfig = CorpusConfig()
    """The built-in text."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Stage 1: the tokenizer."""
    tokenize: TokenizeConfig = TokenizeConfig()
    """Stage 2: token shards."""
    pretrain: PretrainConfig = PretrainConfig()
    """Stage 3: the base model."""
    sft: SFTConfig = SFTConfig()
    """Stage 4: the chat model."""
    rl: RLConfig = RLConfig()
    """Stage 5: the chat model taught by RL."""
    chat_eval: ChatEvalConfig = ChatEvalConfig()
    """Measured after sft and after rl, on the same problems."""
