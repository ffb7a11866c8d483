"""Requests to real servers through the pool. See conftest.py."""

import asyncio
import time

import numpy as np
import pytest

from open_agentrl_jax.types import Sampling
from tests.rollout.conftest import CONTEXT, VOCAB
from tests.rollout.pools import PROMPT, Trainer, check, flowing, make_pool, running, until

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]


async def logprobs_are_those_of_the_model(servers, checkpoints, family):
    trainer = Trainer(checkpoints, family)
    async with make_pool(servers.urls, trainer) as pool:
        await trainer.publish(pool, 1)
        one = await pool.generate(PROMPT, Sampling(40))
        check(checkpoints, PROMPT, one, family=family, tokens=40)
        assert one.finish_reason == "length"
        assert set(one.version) == {1}
        assert pool.metrics()["rollout/probe_difference"] < 1e-3

        hot = await pool.generate(PROMPT, Sampling(30, temperature=2.0))
        expected = checkpoints.logprobs((family, 1), [*PROMPT, *hot.ids], 2.0)[len(PROMPT) - 1 :]
        np.testing.assert_allclose(hot.logprobs, expected, atol=2e-3)

        greedy = await pool.generate(PROMPT, Sampling(30, temperature=0.0))
        stop = int(greedy.ids[7])
        stopped = await pool.generate(PROMPT, Sampling(30, temperature=0.0, stop_ids=(stop,)))
        end = greedy.ids.tolist().index(stop) + 1
        assert stopped.finish_reason == "stop"
        assert stopped.ids.tolist() == greedy.ids[:end].tolist()


async def test_logprobs_of_qwen3(qwen3, checkpoints):
    await logprobs_are_those_of_the_model(qwen3, checkpoints, "qwen3")


async def test_logprobs_of_qwen2(qwen2, checkpoints):
    await logprobs_are_those_of_the_model(qwen2, checkpoints, "qwen2")


async def test_truncated_sampling(qwen2, checkpoints):
    trainer = Trainer(checkpoints, "qwen2")
    async with make_pool(qwen2.urls, trainer) as pool:
        await trainer.publish(pool, 3)
        for top_p in (1.0, 0.3):
            some = await pool.generate(PROMPT, Sampling(30, top_k=5, top_p=top_p))
            rows = checkpoints.distributions(("qwen2", 0), [*PROMPT, *some.ids])[len(PROMPT) - 1 :].numpy()
            for row, token, logprob in zip(rows, some.ids, some.logprobs, strict=True):
                best = np.exp(np.sort(row)[::-1][:5])
                best = best[np.cumsum(best) - best <= top_p]  # on CPU, SGLang takes the top-p of the whole distribution
                assert np.exp(row[token]) >= best[-1] - 1e-4
                assert logprob == pytest.approx(row[token] - np.log(best.sum()), abs=5e-3)
        loose = await pool.for_evaluation().generate(PROMPT, Sampling(10, top_p=0.5))
        assert len(loose.ids) == 10
        assert np.isnan(loose.logprobs).all()


async def test_turns_of_a_session_reuse_its_cache(qwen3, checkpoints):
    trainer = Trainer(checkpoints)
    async with make_pool(qwen3.urls, trainer) as pool:
        await trainer.publish(pool, 4)

        async def episode(number):
            ids = [*range(100, 300), number]
            for _ in range(3):
                completion = await pool.generate(ids, Sampling(20), session=f"s{number}")
                ids = [*ids, *completion.ids.tolist(), 7, 8, 9]

        await asyncio.gather(*(episode(n) for n in range(6)))
        assert [server.sessions for server in pool.fleet.servers] == [3, 3]
        counts = pool.metrics()
        # Of turns two and three, all but the last sampled token and the four new ones were computed before.
        assert counts["rollout/cached_tokens"] >= 6 * (2 * 201 + 20 + 23 + 20 - 4)
        for n in range(6):
            await pool.release(f"s{n}")
        assert [server.sessions for server in pool.fleet.servers] == [0, 0]


async def test_context_is_kept(qwen2):
    async with make_pool(qwen2.urls) as pool:
        with pytest.raises(ValueError, match="no room"):
            await pool.generate([1] * CONTEXT, Sampling(1))
        full = await pool.generate([1] * (CONTEXT - 20), Sampling(500))
        assert full.finish_reason == "length"
        assert 15 <= len(full.ids) <= 20


async def test_cancel_and_release_end_the_request_on_the_server(qwen2):
    url = qwen2.urls[0]

    async def is_running(count):
        return await running(url) == count

    async with make_pool([url]) as pool:
        task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(900), session="a"))
        await until(lambda: is_running(1))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: is_running(0))
        task = asyncio.ensure_future(pool.generate(PROMPT, Sampling(900), session="b"))
        await flowing(pool.fleet.servers[0], 1)
        await pool.release("b")
        completion = await asyncio.wait_for(task, 5)
        assert completion.finish_reason == "abort"
        assert 0 < len(completion.ids) < 900
        await until(lambda: is_running(0))


async def test_a_thousand_episodes_at_once(qwen3, checkpoints):
    trainer = Trainer(checkpoints)
    async with make_pool(qwen3.urls, trainer, deadline=200) as pool:
        await trainer.publish(pool, 5)
        began = time.process_time()
        prompts = [[n % VOCAB, n // VOCAB, 5, 6] for n in range(1000)]
        completions = await asyncio.gather(
            *(pool.generate(p, Sampling(6), session=str(n)) for n, p in enumerate(prompts))
        )
        seconds = time.process_time() - began
        print(f"client CPU seconds for 1,000 requests: {seconds:.2f}")
        assert [len(c.ids) for c in completions] == [6] * 1000
        assert pool.metrics()["rollout/requests"] == 1000
        assert seconds < 10  # seen: 1.3
        for n in (0, 500, 999):
            check(checkpoints, prompts[n], completions[n])
