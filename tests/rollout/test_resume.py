"""What was sampled is kept: answers that broke go on where they were, elsewhere or later, under new weights too."""

import asyncio

import pytest

from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.rollout.sglang import SGLangPool
from open_agentrl_jax.types import Sampling
from tests.rollout.fake_sglang import VOCAB, FakeSGLang, expect

PROMPT = [3, 1, 4, 1, 5]
LENGTH = 80


def pool_of(*servers, **settings):
    settings = {"interval": 0.05, "outage": 20.0, **settings}
    return SGLangPool([server.url for server in servers], vocab_size=VOCAB, **settings)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def held(server, pool):
    """A request that `server` has given 8 tokens of, and no more until it is let go."""
    server.hold_at = 8
    task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(LENGTH), session="a"))
    await until(lambda: server.generated == 8)
    return task


async def test_an_answer_that_breaks_goes_on_and_nothing_is_sampled_twice():
    async with FakeSGLang() as server, pool_of(server) as pool:
        await pool.update_weights("5", 1)
        server.cut_after = 32
        completion = await pool.generate(PROMPT, Sampling(LENGTH), session="a")
        expect(completion, PROMPT, [(5, 1, LENGTH)])
        assert server.generated == LENGTH
        assert [len(body["input_ids"]) for body in server.seen] == [5, 37, 69]
        counts = pool.metrics()
        assert counts["rollout/tokens_kept"] == 64
        assert counts["rollout/retries"] == counts["rollout/resumed"] == 2
        assert counts["rollout/requests"] == 1
        assert counts["rollout/tokens"] == LENGTH


async def test_what_a_dead_server_sent_is_kept_and_another_goes_on():
    async with FakeSGLang() as other, FakeSGLang() as dying, pool_of(dying, other) as pool:
        await pool.update_weights("5", 1)
        await until(lambda: len(pool.fleet.ready()) == 2)
        task = await held(dying, pool)
        await dying._runner.cleanup()
        expect(await task, PROMPT, [(5, 1, LENGTH)])
        assert (dying.generated, other.generated) == (8, LENGTH - 8)
        assert pool.metrics()["rollout/sessions_moved"] == 1


async def test_a_request_in_flight_goes_on_under_new_weights():
    async with FakeSGLang() as server, pool_of(server) as pool:
        await pool.update_weights("5", 1)
        task = await held(server, pool)
        await pool.update_weights("6", 2)
        server.hold_at = None
        expect(await task, PROMPT, [(5, 1, 8), (6, 2, LENGTH - 8)])
        assert "rollout/retries" not in pool.metrics()


async def test_an_answer_that_broke_goes_on_under_the_weights_of_then():
    """The long tail of a group: its first part is old, and stays."""
    async with FakeSGLang() as server, pool_of(server) as pool:
        await pool.update_weights("5", 1)
        task = await held(server, pool)
        server.aborted.add(server.seen[0]["rid"])
        server.hold_at = 24
        await until(lambda: server.generated == 24)
        await pool.update_weights("6", 2)
        server.hold_at = None
        expect(await task, PROMPT, [(5, 1, 24), (6, 2, LENGTH - 24)])
        assert server.generated == LENGTH
        assert pool.metrics()["rollout/aborted_by_server"] == pool.metrics()["rollout/resumed"] == 1


async def test_a_server_that_brings_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr("open_agentrl_jax.rollout.sglang.ATTEMPTS", 2)
    async with FakeSGLang() as server, pool_of(server) as pool:
        await pool.update_weights("5", 1)
        server.cut_after = 0
        server.piece = 0
        with pytest.raises(EngineError, match="2 attempts in a row failed, the last one: "):
            await pool.generate(PROMPT, Sampling(LENGTH))
