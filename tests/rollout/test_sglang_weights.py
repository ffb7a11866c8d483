"""Real SGLang servers sample from the trainer's weights, and from no others. See conftest.py."""

import asyncio
import resource

import jax
import numpy as np
import pytest

from open_agentrl_jax.models import hf
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.train.publish import publish_weights, replayed_logprobs
from open_agentrl_jax.types import Sampling, UserError
from tests.rollout.pools import PROMPT, Trainer, check, flowing, make_pool, until
from tests.rollout.proxy import Proxy

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]


async def test_requests_in_flight_continue_across_updates(qwen3, checkpoints):
    trainer = Trainer(checkpoints)
    async with make_pool(qwen3.urls, trainer) as pool:
        await trainer.publish(pool, 10)
        prompts = [[n, *PROMPT] for n in range(8)]
        tasks = [asyncio.ensure_future(pool.generate(p, Sampling(900), session=str(n))) for n, p in enumerate(prompts)]
        for version in (11, 12):
            await asyncio.gather(*(flowing(server, 5) for server in pool.fleet.servers))
            await trainer.publish(pool, version)
        for prompt, completion in zip(prompts, await asyncio.gather(*tasks), strict=True):
            check(checkpoints, prompt, completion, tokens=900)
            assert set(completion.version) == {10, 11, 12}
            assert (np.diff(completion.version) >= 0).all()
        assert "rollout/retries" not in pool.metrics()


async def test_wrong_weights_are_found(qwen3, checkpoints):
    trainer = Trainer(checkpoints)
    async with make_pool(qwen3.urls, trainer) as pool:
        await trainer.publish(pool, 20, seed=0)
        other = checkpoints.paths["qwen3", 1]
        with pytest.raises(EngineError, match=r"quarantined .*differ from the trainer's"):
            await trainer.publish(pool, 21, seed=0, path=other)
        with pytest.raises(EngineError, match="quarantined"):
            await pool.generate(PROMPT, Sampling(4))
        # Another architecture: SGLang says that it worked.
        with pytest.raises(EngineError, match="quarantined"):
            await trainer.publish(pool, 22, seed=0, path=checkpoints.paths["qwen2", 0])
        with pytest.raises(EngineError, match="quarantined"):
            await trainer.publish(pool, 23, seed=0, path="/nowhere")
        await trainer.publish(pool, 24, seed=2)
        check(checkpoints, PROMPT, await pool.generate(PROMPT, Sampling(20)), {24: 2}, tokens=20)
        assert "rollout/servers_quarantined" not in pool.metrics()
        assert pool.metrics()["rollout/quarantines"] == 6


async def test_what_wrong_weights_sampled_is_thrown_away(qwen3, checkpoints):
    trainer = Trainer(checkpoints)
    async with Proxy(qwen3.urls[0]) as bad, make_pool([bad.url, qwen3.urls[1]], trainer) as pool:
        await trainer.publish(pool, 30)
        bad.fault("update_weights_from_disk", "path", value=checkpoints.paths["qwen3", 2], times=1)
        prompts = [[n, *PROMPT] for n in range(6)]
        tasks = [asyncio.ensure_future(pool.generate(p, Sampling(500), session=str(p[0]))) for p in prompts]
        await asyncio.gather(*map(flowing, pool.fleet.servers))
        await trainer.publish(pool, 31)
        for prompt, completion in zip(prompts, await asyncio.gather(*tasks), strict=True):
            check(checkpoints, prompt, completion, tokens=500)
        counts = pool.metrics()
        assert counts["rollout/quarantines"] == counts["rollout/servers_quarantined"] == 1
        assert "differ from the trainer's" in pool.fleet.servers[0].reason
        await trainer.publish(pool, 32)
        assert pool.metrics()["rollout/servers_ready"] == 2


async def test_a_slow_load_does_not_hold_the_others(qwen3, checkpoints):
    trainer = Trainer(checkpoints)
    async with (
        Proxy(qwen3.urls[0]) as slow,
        make_pool([slow.url, qwen3.urls[1]], trainer, straggler_seconds=0.3) as pool,
    ):
        await trainer.publish(pool, 40)
        await until(lambda: len(pool.fleet.ready()) == 2)
        slow.fault("update_weights_from_disk", "delay", value=8.0, times=1)
        await trainer.publish(pool, 41)
        assert [s.state for s in pool.fleet.servers] == ["updating", "ready"]
        check(checkpoints, PROMPT, await pool.generate(PROMPT, Sampling(20)), tokens=20)
        await until(lambda: len(pool.fleet.ready()) == 2)
        completions = await asyncio.gather(*(pool.generate(PROMPT, Sampling(9), session=s) for s in "ab"))
        for completion in completions:
            check(checkpoints, PROMPT, completion)
            assert set(completion.version) == {41}


async def test_what_the_trainer_publishes_is_what_servers_sample_from(qwen3, checkpoints, tmp_path):
    """The whole way of weights: our parameters, our files, the server, and the proof by our own forward."""
    config, params = hf.load_pretrained(checkpoints.paths["qwen3", 0])
    trainer = Trainer(checkpoints)
    trainer.replay = lambda ids: replayed_logprobs(params, config, ids)
    async with make_pool(qwen3.urls, trainer) as pool:
        for version in (44, 45):
            params = jax.tree.map(lambda x: x * 0.9, params)
            path = publish_weights(params, config, tmp_path, version)
            await pool.update_weights(str(path), version)
            assert pool.metrics()["rollout/probe_difference"] < 1e-3
            one = await pool.generate(PROMPT, Sampling(20))
            expected = replayed_logprobs(params, config, [*PROMPT, *one.ids.tolist()])[len(PROMPT) :]
            np.testing.assert_allclose(one.logprobs, expected, atol=2e-3)
        # Where the disk is full nothing reaches a server, and what was published last stays.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            with pytest.raises(UserError, match=r"rollout\.weights_dir: .* is full"):
                publish_weights(params, config, tmp_path, 46)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        again = await pool.generate(PROMPT, Sampling(20))
        assert set(again.version) == {45}
