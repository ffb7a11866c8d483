"""What the pool refuses before it sends anything. Real servers: test_sglang_requests.py, _weights, _faults, _kills."""

import contextlib

import pytest

from open_agentrl_jax.rollout import remote
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.rollout.sglang import SGLangPool
from open_agentrl_jax.types import Sampling, UserError
from tests.rollout.conftest import VOCAB
from tests.rollout.pools import make_pool


@pytest.mark.parametrize("ids", [[], [-1], [VOCAB], [[1, 2]], ["a"], [0.5]])
async def test_bad_ids_are_not_sent(ids):
    pool = make_pool(["http://127.0.0.1:1"])
    with pytest.raises(ValueError, match=r"ids|vocabulary"):
        await pool.generate(ids, Sampling(1))
    assert not pool.fleet.servers


async def test_top_p_alone_is_refused():
    pool = make_pool(["http://127.0.0.1:1"])
    with pytest.raises(UserError, match=r"rollout\.top_p"):
        await pool.generate([1], Sampling(1, top_p=0.9))


async def test_no_server_is_said_with_its_reason():
    async with contextlib.AsyncExitStack() as stack:
        pool = make_pool(["http://127.0.0.1:1"], outage=1.0)
        stack.push_async_callback(pool.close)
        with pytest.raises(EngineError, match=r"127\.0\.0\.1:1: down .*Connect"):
            await pool.generate([1], Sampling(1))


def test_servers_must_be_given_once():
    with pytest.raises(UserError, match=r"rollout\.servers"):
        SGLangPool(["http://a", "http://a"], vocab_size=4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "a"}}', "a"),
        ('{"error": "b"}', "b"),
        ('{"object": "error", "message": "c"}', "c"),
        ('generate: {"error": "d"}', "d"),
        ("Internal Server Error", "Internal Server Error"),
    ],
)
def test_every_shape_of_error(body, message):
    with pytest.raises(remote.ServerError, match=f"^HTTP 500: {message}$"):
        remote._raise(500, body)
    with pytest.raises(remote.Refused):
        remote._raise(400, body)


def test_no_request_id_is_a_prefix_of_another():
    """Servers abort every request whose id starts with the given one."""
    pool = make_pool(["http://127.0.0.1:1"])
    lengths = {len(next(pool._rids)) for _ in range(101)}
    assert len(lengths) == 1
