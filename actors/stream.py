"""What the loop learns from: groups of rollouts, a batch at a time, sampled ahead or saved before."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import numpy as np

from actors.rollout import RolloutPool, SampleRequest, Sampling, load_task
from actors.weights import Transfer
from rayllm.config.rl_schema import RLConfig
from rayllm.config.schema import SamplingConfig
from rayllm.data.packing import shuffle
from rayllm.engine.sampling import stable_seed
from rayllm.training.admission import room
from rayllm.training.loop import Metrics
from rayllm.training.rollout_batch import is_even
from rayllm.training.saved_rollouts import load_groups, saved_files
from rayllm.types import RolloutGroup


class GroupSource(Protocol):
    """Groups for one batch after the other. `num_prompts` counts the problems that batches took so far."""

    num_prompts: int

    def take(self, step: int) -> tuple[list[RolloutGroup], Metrics]:
        """The groups of batch number `step`; waits for them."""
        ...

    def publish(self, learners: Any, number: int) -> None:
        """Begin to bring the learners' weights to where groups are sampled."""
        ...

    def settle(self) -> None:
        """Return once they are there."""
        ...

    def restart(self) -> None:
        """Give up what was sampled ahead."""
        ...


class RolloutStream:
    """Samples up to `max_staleness` batches ahead (`admission`), and replaces groups that teach nothing where the
    recipe has a budget for it. Batches take groups in the order of their admission."""

    def __init__(self, config: RLConfig, pool: RolloutPool, first_step: int, num_prompts: int) -> None:
        self._config, self._pool = config, pool
        self._problems = ProblemOrder(len(load_task(config.task)), config.seed)
        self._version = self._published = first_step
        self._num_admitted = self.num_prompts = num_prompts
        self._pending: deque[Sampling] = deque()
        self._ready: deque[RolloutGroup] = deque()
        self._transfer: Transfer | None = None
        self._arrival: Metrics = {}
        """What the newest transfer of weights took."""

    def take(self, step: int) -> tuple[list[RolloutGroup], Metrics]:
        """As many groups as the recipe asks for, fewer where the budget is spent. Raises TimeoutError when sampling
        takes longer than it may."""
        per_step, budget = self._config.prompts_per_step, self._config.sampling_budget
        taken: list[RolloutGroup] = []
        num_seen = num_replaced = 0
        while len(taken) < per_step and num_seen < per_step * budget:
            self._admit(num_accepted=step * per_step + len(taken))
            group = self._next()
            num_seen += 1
            if budget > 1 and is_even(group):
                num_replaced += 1
            else:
                taken.append(group)
        self.num_prompts += num_seen
        self._admit(num_accepted=(step + 1) * per_step)
        counts = {"train/num_groups": float(len(taken)), "train/num_replaced_groups": float(num_replaced)}
        return taken, counts | self._arrival

    def publish(self, learners: Any, number: int) -> None:
        """Begin to bring weights number `number` to the pool; without learners they stay what they are."""
        self._published = number
        self._transfer = None if learners is None else self._pool.publish(learners.source, number)

    def settle(self) -> None:
        """Return once the pool has what was published; only then are further groups admitted for it."""
        if self._transfer is not None:
            self._transfer.wait()
            self._arrival = self._transfer.metrics()
        self._transfer, self._version = None, self._published

    def restart(self) -> None:
        """Give up what was sampled ahead, by weights that nobody wants any more."""
        for sampling in self._pending:
            sampling.cancel()
        self._pending.clear()
        self._ready.clear()
        self._num_admitted = self.num_prompts

    def _admit(self, num_accepted: int) -> None:
        config = self._config
        count = room(
            version=self._version,
            max_staleness=config.max_staleness,
            groups_per_batch=config.prompts_per_step,
            num_accepted=num_accepted,
            num_pending=len(self._ready) + sum(sampling.num_examples for sampling in self._pending),
            num_batches=config.num_steps,
        )
        if count == 0:
            return
        addresses = [self._problems.at(self._num_admitted + i) for i in range(count)]
        self._num_admitted += count
        sampling = SamplingConfig(
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, max_tokens=config.max_tokens
        )
        # One request a batch: how long one is waited for is then bounded, and what shares the engine repeats.
        for first in range(0, count, config.prompts_per_step):
            part = addresses[first : first + config.prompts_per_step]
            request = SampleRequest(
                config.task,
                tuple(example_id for example_id, _ in part),
                config.num_samples,
                sampling,
                seeds=tuple(stable_seed(config.seed, epoch) for _, epoch in part),
            )
            self._pending.append(self._pool.start(request))

    def _next(self) -> RolloutGroup:
        if not self._ready:
            self._ready.extend(self._pending.popleft().wait())
        return self._ready.popleft()


class SavedGroups:
    """Batches of an earlier run, in order, over and over: nothing is sampled."""

    def __init__(self, config: RLConfig) -> None:
        assert config.replay is not None
        self._files = saved_files(config.replay)
        self.num_prompts = 0

    def take(self, step: int) -> tuple[list[RolloutGroup], Metrics]:
        """The groups of the file whose turn it is."""
        groups = load_groups(self._files[step % len(self._files)])
        self.num_prompts += len(groups)
        return groups, {"train/num_groups": float(len(groups))}

    def publish(self, learners: Any, number: int) -> None:
        """Nobody samples."""

    def settle(self) -> None:
        """Nothing is on its way."""

    def restart(self) -> None:
        """Nothing was sampled ahead."""


class ProblemOrder:
    """Which example is the n-th of a run: a shuffled pass over all of them after the other, by index alone."""

    def __init__(self, num_problems: int, seed: int) -> None:
        if num_problems < 1:
            raise ValueError("the task holds no problem to learn from")
        self._num_problems, self._seed = num_problems, seed
        self._orders: dict[int, np.ndarray] = {}

    def at(self, n: int) -> tuple[int, int]:
        """(example index, epoch) of the n-th problem."""
        epoch, place = divmod(n, self._num_problems)
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = shuffle(self._num_problems, self._seed, epoch)
        return int(self._orders[epoch][place]), epoch
