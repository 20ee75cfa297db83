"""Rollouts: actors that sample answers and have them judged, and the pool that shares the prompts out among them."""

from __future__ import annotations

import asyncio
import math
import re
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch

from actors.cluster import Placement, wait_for
from actors.weights import Transfer, WeightsChannel
from actors.weights_roles import WeightsReceiver
from rayllm.config.chat_schema import RolloutConfig, TaskConfig
from rayllm.config.schema import SamplingConfig
from rayllm.engine.calculator import calculate
from rayllm.engine.engine import Engine
from rayllm.engine.request import Request
from rayllm.runs.load import load
from rayllm.runtime import build_runtime
from rayllm.text.chat import answer_text, render_for_completion
from rayllm.types import Completion, Prompt, Rollout, RolloutGroup
from tasks.build import build_task


@dataclass(frozen=True)
class SampleRequest:
    """`num_samples` answers to each of some examples of a task. The draws follow from the seed, the example and the
    sample; `seeds`, where given, has one for each example in place of the sampling's."""

    task: TaskConfig
    example_ids: tuple[int, ...]
    num_samples: int
    sampling: SamplingConfig
    seeds: tuple[int, ...] | None = None

    def share(self, rank: int, world_size: int) -> SampleRequest:
        """Every `world_size`-th example, from `rank` on."""
        seeds = None if self.seeds is None else self.seeds[rank::world_size]
        return replace(self, example_ids=self.example_ids[rank::world_size], seeds=seeds)


class RolloutWorker(WeightsReceiver):
    """Holds the model of a checkpoint in an engine and samples from it. A plain class: tests call it as it is.

    As an actor it runs in one event loop: requests share the engine, each moves it on while it waits for its own
    samples, and new weights enter between two of its steps.
    """

    def __init__(self, checkpoint: str, config: RolloutConfig, weights_version: int = 0, num_threads: int = 0) -> None:
        if num_threads:
            torch.set_num_threads(num_threads)
        runtime = build_runtime(config.device, config.dtype)
        model, self.tokenizer = load(checkpoint, runtime.device, runtime.dtype)
        self.engine = Engine(
            model.lay_out_for_inference(),
            self.tokenizer,
            num_slots=config.num_slots,
            num_prompts=config.num_prompts,
            max_len=model.config.sequence_len,
            calculator=calculate,
            repeats=True,
            weights_version=weights_version,
        )
        self._dtype = str(runtime.dtype).removeprefix("torch.")
        drains = config.new_weights == "drain"
        super().__init__(lambda state, number: self.engine.load(state, number, drain=drains), runtime.device)
        self._busy_s = 0.0
        self._tasks: dict[TaskConfig, Any] = {}
        self._told: set[str] = set()

    async def sample(self, request: SampleRequest) -> list[RolloutGroup]:
        """One group an example, in their order. A prompt that cannot be run gives a group of failed rollouts."""
        task = self._task(request.task)
        prompts = [self._prompt(request.task, task, example_id) for example_id in request.example_ids]
        seeds = request.seeds or [None] * len(prompts)
        batch = self.engine.submit_all(
            Request(prompt, request.sampling, request.num_samples, seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        )
        try:
            while not batch.is_done:
                start = time.perf_counter()
                self.engine.step()
                self._busy_s += time.perf_counter() - start
                await asyncio.sleep(0)  # others of the event loop have their turn
        finally:
            batch.cancel()  # what a caller who gave up leaves behind
        return [
            RolloutGroup(prompt, tuple(self._judge(task, example_id, completion) for completion in completions))
            for example_id, prompt, completions in zip(request.example_ids, prompts, batch.completions(), strict=True)
        ]

    async def describe(self) -> dict[str, str]:
        """What the learners must know of this sampler."""
        return {"dtype": self._dtype}

    async def read_counters(self) -> dict[str, float]:
        """Seconds that the engine was at work so far, and tool calls, their errors and time-outs."""
        return {"busy_s": self._busy_s, **{f"tool_{name}": float(n) for name, n in self.engine.tool_counts.items()}}

    def _task(self, config: TaskConfig) -> Any:
        if config not in self._tasks:
            self._tasks[config] = load_task(config)
        return self._tasks[config]

    def _prompt(self, config: TaskConfig, task: Any, example_id: int) -> Prompt:
        token_ids = render_for_completion(self.tokenizer, task.conversation(example_id), max_tokens=2**31)
        return Prompt(f"{config.name}/{config.split}/{example_id}", tuple(token_ids))

    def _judge(self, task: Any, example_id: int, completion: Completion) -> Rollout:
        if completion.finish_reason not in ("stop", "length"):
            message = f"{completion.finish_reason}: {completion.error}"
            self._tell_once(re.sub(r"\d+", "", message), message)  # those that differ in numbers alone are alike
            return Rollout(completion, None)
        text = answer_text(self.tokenizer, completion.token_ids, completion.sampled_mask)
        try:
            reward = float(task.evaluate(example_id, text))
            if not math.isfinite(reward):
                raise ValueError(f"the reward is {reward}")
            return Rollout(completion, reward)
        except Exception as error:  # noqa: BLE001 - a verdict that fails is no verdict, whatever a task raises
            kind = type(error).__name__
            self._tell_once(kind, f"{task.name} has no verdict on example {example_id}: {kind}: {error}")
            return Rollout(completion, None)

    def _tell_once(self, kind: str, message: str) -> None:
        """One line for each kind of failure; all of them are counted in the step's metrics."""
        if kind not in self._told:
            self._told.add(kind)
            print(f"rollout: {message} (told once, counted in num_failed)", file=sys.stderr)


class RolloutPool:
    """The rollout actors. Which of them samples what follows from the request alone, so that a step repeats exactly."""

    def __init__(
        self, checkpoint: str, config: RolloutConfig, placement: Placement, channel: WeightsChannel, version: int = 0
    ) -> None:
        config = replace(config, device=placement.decide(config.device))
        self._config, self._channel = config, channel
        actor = self.actor_class().options(**placement.options())
        self.actors = [
            actor.remote(checkpoint, config, version, placement.num_threads) for _ in range(config.num_actors)
        ]

    @staticmethod
    def actor_class() -> Any:
        """What samples."""
        return RolloutActor

    def start(self, request: SampleRequest) -> Sampling:
        """Begin to sample; example j of the request is the part of actor j modulo their number."""
        n = len(self.actors)
        shares = [actor.sample.remote(request.share(rank, n)) for rank, actor in enumerate(self.actors)]
        what = f"sampling {len(request.example_ids)} prompts x {request.num_samples} by {n} rollout actors"
        return Sampling(shares, len(request.example_ids), self._config.timeout_s, what)

    def sample(self, request: SampleRequest) -> list[RolloutGroup]:
        """One group an example, in their order. Raises TimeoutError after `rollouts.timeout_s`."""
        return self.start(request).wait()

    def publish(self, source: Any, number: int) -> Transfer:
        """Begin to bring the weights of an actor to all rollout actors."""
        return self._channel.start(source, number, self.actors, self._config.timeout_s)

    def describe(self) -> Any:
        """What the first actor says of itself, as a promise: all are alike."""
        return self.actors[0].describe.remote()

    def read_counters(self) -> dict[str, float]:
        """Sums over the actors of what they counted so far."""
        counters = wait_for(
            [actor.read_counters.remote() for actor in self.actors], self._config.timeout_s, "reading counters"
        )
        return {name: sum(c[name] for c in counters) for name in counters[0]}

    def close(self) -> None:
        """Stop the actors."""
        self._channel.close()
        for actor in self.actors:
            ray.kill(actor)


class Sampling:
    """A request that the pool is at work on."""

    def __init__(self, shares: list[Any], num_examples: int, timeout_s: float, what: str) -> None:
        self._shares, self.num_examples = shares, num_examples
        self._timeout_s, self._what = timeout_s, what

    def wait(self) -> list[RolloutGroup]:
        """One group an example, in their order. Raises TimeoutError after `rollouts.timeout_s`."""
        n, sampled = len(self._shares), wait_for(self._shares, self._timeout_s, self._what)
        return [sampled[j % n][j // n] for j in range(self.num_examples)]

    def cancel(self) -> None:
        """Give it up."""
        for share in self._shares:
            ray.cancel(share)


def load_task(config: TaskConfig) -> Any:
    """The task that a recipe names."""
    return build_task(
        config.name,
        split=config.split,
        path=config.path,
        num_examples=config.num_examples,
        max_level=config.max_level,
        seed=config.seed,
    )


RolloutActor = ray.remote(RolloutWorker)
