"""What tests of real SGLang servers share: pools, a stand-in for the trainer, and the law that all of them check."""

import asyncio
import contextlib
import inspect
import json
import time
import urllib.request

import numpy as np

from open_agentrl_jax.rollout.sglang import SGLangPool
from open_agentrl_jax.types import Sampling
from tests.rollout.conftest import VOCAB
from tests.rollout.proxy import Proxy

PROMPT = list(range(10, 30))


class Trainer:
    """Holds a checkpoint's number, as a trainer holds parameters, and replays ids through it."""

    def __init__(self, checkpoints, family="qwen3"):
        self.checkpoints, self.family, self.seed = checkpoints, family, 0

    def replay(self, ids):
        return np.concatenate([[0.0], self.checkpoints.logprobs((self.family, self.seed), ids)])

    async def publish(self, pool, version, seed=None, path=None):
        self.seed = version % 3 if seed is None else seed
        await pool.update_weights(path or self.checkpoints.paths[self.family, self.seed], version)


def make_pool(urls, trainer=None, **settings):
    settings = {"interval": 1.0, "tolerance": 0.02, "outage": 240.0, "deadline": 240.0, **settings}
    return SGLangPool(urls, vocab_size=VOCAB, replay=trainer.replay if trainer else None, **settings)


def check(checkpoints, prompt, completion, seeds=None, family="qwen3", tokens=None):
    """The completion's log-probs are those of the weights that its versions name."""
    if tokens is not None:
        assert len(completion.ids) == tokens
    assert len(completion.ids) == len(completion.logprobs) == len(completion.version)
    ids = [*prompt, *completion.ids.tolist()]
    for version in np.unique(completion.version):
        seed = version % 3 if seeds is None else seeds[int(version)]
        expected = checkpoints.logprobs((family, seed), ids)[len(prompt) - 1 :]
        chosen = completion.version == version
        np.testing.assert_allclose(completion.logprobs[chosen], expected[chosen], atol=2e-3)


async def post(url, **body):
    """A request past the pool."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=30).close())


async def running(url):
    """Requests that the server itself says it works on."""

    def get():
        with urllib.request.urlopen(f"{url}/v1/loads", timeout=30) as response:
            return json.loads(response.read())["loads"]

    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in await asyncio.to_thread(get))


async def until(condition, seconds=180.0):
    """Waits for a condition, which may be a coroutine."""
    end = time.monotonic() + seconds
    while True:
        done = condition()
        if inspect.isawaitable(done):
            done = await done
        if done:
            return
        assert time.monotonic() < end, f"not within {seconds} s"
        await asyncio.sleep(0.05)


async def flowing(server, rounds=3):
    """Waits until answers came from a server at some moments: its requests are under way, and not at their end."""
    seen = set()

    def condition():
        seen.add(server.heard_at)
        return len(seen) > rounds

    await until(condition)


@contextlib.asynccontextmanager
async def batch(servers, checkpoints, version, tokens=600, episodes=8, **settings):
    """A pool behind two proxies with a batch of requests under way; at the end all of them must be whole."""
    trainer = Trainer(checkpoints)
    async with (
        Proxy(servers.urls[0]) as first,
        Proxy(servers.urls[1]) as second,
        make_pool([first.url, second.url], trainer, **settings) as pool,
    ):
        await trainer.publish(pool, version)
        await until(lambda: len(pool.fleet.ready()) == 2, 240)
        prompts = [[n, *PROMPT] for n in range(episodes)]
        tasks = [
            asyncio.ensure_future(pool.generate(p, Sampling(tokens), session=str(n))) for n, p in enumerate(prompts)
        ]
        yield pool, first, second
        for prompt, completion in zip(prompts, await asyncio.gather(*tasks), strict=True):
            check(checkpoints, prompt, completion, tokens=tokens)
            assert completion.finish_reason == "length"
            assert set(completion.version) == {version}
        assert pool.metrics()["rollout/requests"] == episodes
        assert pool.metrics()["rollout/tokens"] == episodes * tokens
