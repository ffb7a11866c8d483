"""Faults of networks and of neighbours, by a proxy before real SGLang servers: no request is lost. See conftest.py."""

import pytest

from open_agentrl_jax.types import Sampling
from tests.rollout.pools import PROMPT, batch, flowing, post, until

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]


async def test_errors_of_a_server(qwen3, checkpoints):
    async with batch(qwen3, checkpoints, 50) as (pool, first, _):
        fault = first.fault("generate", "status", times=6)
    assert fault.struck >= 3
    assert pool.metrics()["rollout/retries"] >= 3


async def test_answers_that_do_not_come_in_time(qwen3, checkpoints):
    async with batch(qwen3, checkpoints, 58, tokens=20, deadline=6.0) as (pool, first, _):
        fault = first.fault("generate", "hang", times=2)
    assert fault.struck == 2
    assert pool.metrics()["rollout/timeouts"] >= 2
    assert pool.metrics()["rollout/retries"] >= 2


async def test_truncated_answers(qwen3, checkpoints):
    async with batch(qwen3, checkpoints, 51) as (pool, first, second):
        cuts = [first.fault("generate", "truncate", value=6000), second.fault("generate", "truncate", value=9000)]
        await until(lambda: sum(cut.struck for cut in cuts) >= 8)
        first.faults, second.faults = [], []
    counts = pool.metrics()
    assert counts["rollout/retries"] >= 8
    assert counts["rollout/resumed"] >= 8
    assert counts["rollout/tokens_kept"] > 0


async def test_a_server_aborts_everything(qwen3, checkpoints):
    async with batch(qwen3, checkpoints, 52) as (pool, _, _):
        await flowing(pool.fleet.servers[0])
        await post(f"{qwen3.urls[0]}/abort_request", abort_all=True)
        assert pool.metrics()["rollout/servers_ready"] == 2
    counts = pool.metrics()
    assert 1 <= counts["rollout/resumed"] <= counts["rollout/aborted_by_server"] <= 4
    assert "rollout/retries" not in counts


async def test_a_server_that_somebody_paused(qwen3, checkpoints):
    async with batch(qwen3, checkpoints, 53) as (pool, _, _):
        await flowing(pool.fleet.servers[0])
        await post(f"{qwen3.urls[0]}/pause_generation", mode="retract")
        await until(lambda: pool.fleet.servers[0].state == "paused")
        one = await pool.generate(PROMPT, Sampling(5), session="new")
        pool.fleet.counts.subtract({"requests": 1, "tokens": 5})
        assert len(one.ids) == 5
        await post(f"{qwen3.urls[0]}/continue_generation")
        await until(lambda: pool.fleet.servers[0].state == "ready")
    assert "rollout/servers_lost" not in pool.metrics()
