"""Real SGLang servers hang and die; what was under way goes on elsewhere, and who returns is proven first."""

import asyncio
import dataclasses
import os
import signal

import numpy as np
import pytest

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.environment import Step
from open_agentrl_jax.rollout.scheduler import play_all
from open_agentrl_jax.rollout.servers import _members
from open_agentrl_jax.rollout.sglang import SGLangPool
from open_agentrl_jax.types import Message, Sampling, Task, ToolCall
from tests.rollout.pools import PROMPT, Trainer, batch, check, flowing, make_pool, until

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]
FOLLOWING = [7, 8, 9]


class Script:
    """A chat without text: a problem's number opens the prompt, and every turn is a call."""

    stop_ids = ending = ()
    call = '<tool_call>{"name": "tool", "arguments": {}}</tool_call>'

    def prompt(self, messages):
        return [int(messages[0].content), *PROMPT]

    def following(self, messages):
        return FOLLOWING

    def decode(self, ids):
        return self.call

    def parse(self, text):
        return "", [ToolCall("tool")]


class Turns:
    """An environment that counts what it is asked; it scores 1."""

    def __init__(self):
        self.steps = 0

    async def reset(self, task):
        return task.messages

    async def step(self, message):
        self.steps += 1
        return Step([Message("tool", "")], 1.0, done=not message.tool_calls, accuracy=1.0)

    async def close(self):
        pass


@dataclasses.dataclass
class Turnwise:
    """The pool with turns of a fixed length: random weights know no end."""

    pool: SGLangPool
    tokens: int

    async def generate(self, ids, sampling, *, session=""):
        sampling = dataclasses.replace(sampling, max_tokens=self.tokens)
        one = await self.pool.generate(ids, sampling, session=session)
        return dataclasses.replace(one, finish_reason="stop")

    async def release(self, session):
        await self.pool.release(session)


async def test_a_server_hangs(qwen3, checkpoints):
    group = qwen3._guards[0].pid
    async with batch(qwen3, checkpoints, 54) as (pool, _, _):
        await flowing(pool.fleet.servers[0])
        for pid in _members(group):
            os.kill(pid, signal.SIGSTOP)
        try:
            await until(lambda: pool.fleet.servers[0].state == "down")
            await until(lambda: pool.fleet.counts["requests"] == 8 and not pool._running, 60)
        finally:
            for pid in _members(group):
                os.kill(pid, signal.SIGCONT)
        await until(lambda: len(pool.fleet.ready()) == 2, 240)
    counts = pool.metrics()
    assert counts["rollout/servers_lost"] == counts["rollout/servers_returned"] == 1
    assert counts["rollout/sessions_moved"] == 4


async def test_a_batch_of_episodes_outlives_one_of_two_servers(qwen3, checkpoints):
    """SIGKILL in the middle: every episode comes once, is whole, and scored for what it did, not for what happened."""
    problems, samples, turns, tokens = 6, 2, 3, 250
    played = []

    async def play(task, *, position, sample, attempt):
        environment = Turns()
        session = f"{position}-{sample}-{attempt}"
        budget = episode.Budget(max_turns=turns)
        engine = Turnwise(pool, tokens)
        played.append((session, environment))
        return await episode.run(engine, environment, Script(), task, Sampling(1), budget, session=session)

    trainer = Trainer(checkpoints)
    tasks = [Task(str(n), [Message("user", str(n))], "") for n in range(problems)]
    async with make_pool(qwen3.urls, trainer) as pool:
        await trainer.publish(pool, 55)
        await until(lambda: len(pool.fleet.ready()) == 2, 240)
        lost = pool.fleet.counts["servers_lost"]
        batch = asyncio.ensure_future(play_all(play, tasks, samples=samples, concurrency=12))
        await until(lambda: len(played) == problems * samples and all(one.steps for _, one in played))
        await flowing(pool.fleet.servers[0], 2)  # all are in their second turn, and some of it has come
        qwen3.kill(0)
        groups = await batch
        counts = pool.metrics()
        assert counts["rollout/servers_lost"] == lost + 1
        assert counts["rollout/tokens_kept"] > 0
        assert counts["rollout/requests"] == problems * samples * turns
        assert counts["rollout/tokens"] == problems * samples * turns * tokens
        assert len(played) == problems * samples
        assert {environment.steps for _, environment in played} == {turns}
        assert [group.task.id for group in groups] == [task.id for task in tasks]
        for one in (trajectory for group in groups for trajectory in group.trajectories):
            assert (one.stop, one.reward, one.metrics["attempts"]) == ("turns", 1.0, 1.0)
            assert one.loss_mask.sum() == turns * tokens
            assert set(one.versions[one.loss_mask]) == {55}
            expected = checkpoints.logprobs(("qwen3", 55 % 3), one.tokens)
            np.testing.assert_allclose(one.logprobs[1:][one.loss_mask[1:]], expected[one.loss_mask[1:]], atol=2e-3)
        # It is started again, and gets no work before it has the weights of now.
        await until(lambda: len(pool.fleet.ready()) == 2, 240)
        assert pool.fleet.servers[0].version == 55
        both = await asyncio.gather(*(pool.generate(PROMPT, Sampling(10), session=f"after {n}") for n in range(2)))
        for completion in both:
            check(checkpoints, PROMPT, completion, tokens=10)
        assert {server.sessions for server in pool.fleet.servers} == {1}
    assert pool.metrics()["rollout/servers_returned"] == lost + 1


async def test_all_servers_are_killed(qwen3, checkpoints):
    async with batch(qwen3, checkpoints, 56) as (pool, _, _):
        await asyncio.gather(*map(flowing, pool.fleet.servers))
        qwen3.kill(0)
        qwen3.kill(1)
        await until(lambda: not pool.fleet.ready())
        await until(lambda: not pool._running, 280)
        assert pool.metrics()["rollout/servers_lost"] == 2
        await until(lambda: len(pool.fleet.ready()) == 2, 280)
