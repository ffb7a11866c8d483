"""What `max_staleness` changes, and that 0 changes nothing: scheduler and embedded engine against a plain loop."""

import asyncio
import collections
import random

import jax
import numpy as np

from open_agentrl_jax.models import qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.rollout.local import LocalEngine
from open_agentrl_jax.rollout.scheduler import EventLoop, Scheduler
from open_agentrl_jax.types import Group, Message, Sampling, Task, Trajectory

CONFIG = ModelConfig("qwen3", 97, 48, 64, 2, 4, 2, 16, tie_word_embeddings=True, initializer_range=0.2)
PROMPTS, SAMPLES, STEPS = 2, 3, 4


class Problems:
    def __getitem__(self, position):
        return Task(str(position), [Message("user", "")], "")


class Player:
    """Episodes of two turns on the embedded engine; each takes its own time, another one in every run."""

    def __init__(self, seed, tail=()):
        self.engine = LocalEngine(
            qwen.init(CONFIG, 0), CONFIG, slots=4, max_length=96, decode_chunk=4, prefill_chunks=(8, 16)
        )
        self.delays, self.tail = random.Random(seed), tail  # positions whose second turn waits for the first update
        self.started, self.updated, self.waited_for = collections.Counter(), False, len(tail) * SAMPLES

    async def __call__(self, task, *, position, sample, attempt):
        self.started[position, sample] += 1
        session, ids = f"{position}-{sample}", [position + 1, 2, 3]
        mask, logprobs, versions = [False] * 3, [0.0] * 3, [-1] * 3
        for turn, tokens in enumerate((4 + 5 * sample, 8)):
            await asyncio.sleep(self.delays.random() * 0.01)
            while (turn and position in self.tail and not self.updated) or (position > 3 and self.waited_for):
                await asyncio.sleep(0.005)
            sampling = Sampling(tokens, seed=position * SAMPLES + sample)
            one = await self.engine.generate(ids, sampling, session=session)
            ids, mask = [*ids, *one.ids.tolist(), 7], [*mask, *[True] * tokens, False]
            logprobs, versions = [*logprobs, *one.logprobs, 0.0], [*versions, *one.version, -1]
        await self.engine.release(session)
        self.waited_for -= position in self.tail
        return Trajectory(
            np.array(ids, np.int32),
            np.array(mask),
            np.array(logprobs, np.float32),
            np.array(versions, np.int32),
            [],
            "answer",
        )

    def update(self, groups, version):
        """A stand-in for training: all later numbers depend on every token of every batch before."""
        self.total = getattr(self, "total", 0) + sum(int(t.tokens.sum()) for g in groups for t in g.trajectories)
        scale = np.float32(1 + self.total % 1000 * 1e-4)
        self.engine.set_params(jax.tree.map(lambda x: x * scale, qwen.init(CONFIG, 0)), version)
        self.updated = True


def scheduled(player, max_staleness):
    loop = EventLoop()
    scheduler = Scheduler(
        loop,
        player,
        Problems(),
        prompts=PROMPTS,
        samples=SAMPLES,
        concurrency=PROMPTS * SAMPLES * (max_staleness + 1),
        batches=STEPS,
        max_staleness=max_staleness,
    )
    batches = []
    for version in range(1, STEPS + 1):
        batches.append(scheduler.next_batch())
        player.update(batches[-1], version)
        scheduler.trained(batches[-1])
        scheduler.published(version)
    scheduler.close()
    loop.close()
    player.engine.close()
    return batches


async def plain(player):
    """One episode after the other, and an update after each batch."""
    batches = []
    for step in range(STEPS):
        batches.append([])
        for position in range(step * PROMPTS, (step + 1) * PROMPTS):
            samples = [await player(None, position=position, sample=n, attempt=0) for n in range(SAMPLES)]
            batches[-1].append(Group(Task("", [], ""), samples, position))
        player.update(batches[-1], step + 1)
    player.engine.close()
    return batches


def versions_of(group):
    return {int(v) for t in group.trajectories for v in t.versions[t.loss_mask]}


def test_without_staleness_every_number_is_that_of_a_plain_loop():
    expected = asyncio.run(plain(Player(1)))
    for step, (batch, wanted) in enumerate(zip(scheduled(Player(2), 0), expected, strict=True)):
        assert [group.position for group in batch] == [group.position for group in wanted]
        for group, other in zip(batch, wanted, strict=True):
            assert versions_of(group) == {step}
            for one, two in zip(group.trajectories, other.trajectories, strict=True):
                for name in ("tokens", "loss_mask", "logprobs", "versions"):
                    np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_episodes_that_an_update_overtakes_go_on_and_are_trained_once():
    player = Player(3, tail=(2, 3))
    batches = scheduled(player, 1)
    assert set(player.started.values()) == {1}
    assert sorted(group.position for batch in batches for group in batch) == list(range(PROMPTS * STEPS))
    for step, batch in enumerate(batches):
        for group in batch:
            assert step - 1 <= min(versions_of(group)) <= max(versions_of(group)) <= step
    assert [group.position for group in batches[1]] == [2, 3]
    for trajectory in (t for group in batches[1] for t in group.trajectories):
        sampled = trajectory.versions[trajectory.loss_mask]
        assert set(sampled[:-8]) == {0}
        assert set(sampled[-8:]) == {1}
