import asyncio
import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import decode, hf, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel.mesh import make_mesh
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.rollout.local import LocalEngine
from open_agentrl_jax.rollout.slots import cut
from open_agentrl_jax.types import Sampling, UserError

CONFIG = ModelConfig("qwen3", 97, 48, 64, 2, 4, 2, 16, tie_word_embeddings=True, initializer_range=0.2)
LENGTH = 96
SIZES = {
    "slots": 4,
    "max_length": LENGTH,
    "decode_chunk": 4,
    "prefill_chunks": (8, 16),
}  # all tests share what is compiled


@functools.cache
def params_of(seed=0):
    return qwen.init(CONFIG, seed)


@pytest.fixture
def engine():
    engine = LocalEngine(params_of(), CONFIG, **SIZES)
    yield engine
    engine.close()


class Gate:
    """Holds the engine's thread before its n-th decode dispatch until it is opened."""

    def __init__(self, monkeypatch, n):
        self.reached, self._open, self._left, real = threading.Event(), threading.Event(), n, decode.decode

        def gated(*args):
            self._left -= 1
            if self._left == 0:
                self.reached.set()
                assert self._open.wait(60)
            return real(*args)

        monkeypatch.setattr(decode, "decode", gated)

    async def open_after(self, engine, actions):
        """Once `actions` are handed to the thread."""
        while len(engine._inbox) < actions:
            await asyncio.sleep(0.001)
        self._open.set()

    async def wait(self):
        assert await asyncio.to_thread(self.reached.wait, 60)


@functools.partial(jax.jit, static_argnums=1)
def padded(params, config, tokens):
    positions = jnp.arange(LENGTH)[None]
    hidden = qwen.forward(params, config, tokens[None], positions, jnp.ones_like(positions))
    return jax.nn.log_softmax(qwen.logits(params, config, hidden)[0])


def whole(tokens, params=None, config=CONFIG):
    """Log-probs [t v] of the training forward over one sequence [t]."""
    filled_up = np.zeros(LENGTH, np.int32)
    filled_up[: len(tokens)] = tokens
    return np.asarray(padded(params_of() if params is None else params, config, filled_up))[: len(tokens)]


def prompt_of(seed, n):
    return np.random.default_rng(seed).integers(0, 97, n).tolist()


@dataclasses.dataclass
class Episode:
    """Several turns, each followed by some tokens of a tool after some time."""

    name: str
    prompt: list
    seed: int
    turns: tuple = ((9, 5), (12, 7), (6, 0))  # tokens sampled, tokens of the tool
    delays: tuple = (0.0, 0.0, 0.0)
    temperature: float = 1.0

    async def run(self, engine, release=True):
        ids, self.sampled, self.logprobs = list(self.prompt), [], []
        for (n, tool), delay in zip(self.turns, self.delays, strict=True):
            await asyncio.sleep(delay)
            how = Sampling(n, self.temperature, seed=self.seed)
            completion = await engine.generate(ids, how, session=self.name)
            assert completion.finish_reason == "length" and len(completion.ids) == n
            self.sampled += range(len(ids), len(ids) + n)
            self.logprobs += completion.logprobs.tolist()
            ids += completion.ids.tolist() + prompt_of(len(ids), tool)
        if release:
            await engine.release(self.name)
        self.ids = ids
        return ids, self.logprobs


async def test_every_turn_has_the_logprobs_of_the_training_forward(engine):
    episodes = [Episode(str(i), prompt_of(i, n), i) for i, n in enumerate((1, 2, 17, 30, 33, 40))]
    await asyncio.gather(*(e.run(engine) for e in episodes))
    for e in episodes:
        at = np.array(e.sampled)
        expected = whole(e.ids)[at - 1, np.array(e.ids)[at]]
        assert np.ptp(expected) > 1
        np.testing.assert_allclose(e.logprobs, expected, atol=2e-5)  # asked for: 1e-4


async def test_qwen2_too_at_another_temperature():
    config = ModelConfig("qwen2", 97, 48, 64, 2, 4, 2, 12, initializer_range=0.2)
    params = qwen.init(config, 1)
    params["layers"]["q_bias"] += 0.5
    engine = LocalEngine(params, config, **SIZES)
    e = Episode("e", prompt_of(0, 21), 3, temperature=0.7)
    await e.run(engine)
    engine.close()
    at = np.array(e.sampled)
    expected = np.asarray(jax.nn.log_softmax(whole(e.ids, params, config) / 0.7))[at - 1, np.array(e.ids)[at]]
    np.testing.assert_allclose(e.logprobs, expected, atol=3e-5)


async def test_greedy_is_the_argmax_of_the_training_forward(engine):
    e = Episode("e", prompt_of(0, 21), 3, temperature=0.0)
    await e.run(engine)
    at = np.array(e.sampled)
    assert (whole(e.ids)[at - 1].argmax(-1) == np.array(e.ids)[at]).all()


async def test_bits_depend_neither_on_company_nor_on_time():
    """The same episodes one by one, and all at once on too few slots, in other orders, with slow and fast tools."""
    random = np.random.default_rng(0)
    shared = prompt_of(99, 26)
    episodes = [Episode(f"e{i}", shared if i % 3 else prompt_of(i, 5 * i + 2), i) for i in range(9)]

    async def play(slots, order, slow, one_by_one=False):
        engine = LocalEngine(params_of(), CONFIG, **SIZES | {"slots": slots})
        again = [dataclasses.replace(episodes[i], delays=tuple(random.uniform(0, slow, 3))) for i in order]
        if one_by_one:
            results = [await e.run(engine) for e in again]
        else:
            results = await asyncio.gather(*(e.run(engine) for e in again))
        stats = engine.stats()
        engine.close()
        return dict(zip(order, results, strict=True)), stats

    alone, stats = await play(4, range(9), 0, one_by_one=True)
    assert not stats["parked"]
    for slow in (0.0, 0.02, 0.2):
        crowded, stats = await play(4, random.permutation(9).tolist(), slow)
        assert crowded == alone  # tokens and log-probs, bit for bit
    assert stats["parked"] > 0  # the last one had tools slow enough that sessions lost their slots


async def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(engine):
    prompt = prompt_of(0, 20)
    how = [Sampling(12, seed=seed) for seed in (7, 7, 8, 7 + 2**32, -1)]
    first, again, *others = [(await engine.generate(prompt, h)).ids.tolist() for h in how]
    assert first == again
    assert len({tuple(x) for x in [first, *others]}) == 4


async def test_a_group_computes_its_prompt_once_and_a_turn_its_own_tokens_only(engine):
    prompt = prompt_of(0, 30)
    await asyncio.gather(*(engine.generate(prompt, Sampling(5, seed=i), session=str(i)) for i in range(4)))
    stats = engine.stats()
    assert (stats["prefill_tokens"], stats["cached_tokens"]) == (29, 3 * 29)
    await engine.release("0")  # free, but its prompt may still be had
    late = await engine.generate(prompt, Sampling(5, seed=9), session="late")
    stats = engine.stats()
    assert (stats["prefill_tokens"], stats["cached_tokens"]) == (29, 4 * 29)
    # The next turn: the last token sampled is not in the cache yet, nor are the six of the tool; the last one decodes.
    await engine.generate([*prompt, *late.ids, 1, 2, 3, 4, 5, 6], Sampling(3), session="late")
    stats = engine.stats()
    assert (stats["prefill_tokens"], stats["cached_tokens"]) == (29 + 6, 4 * 29 + 34)
    assert stats["generated_tokens"] == 5 * 5 + 3 and stats["decode_steps"] <= 5 + 5 + 3


async def test_a_rewritten_history_is_computed_from_where_it_differs(engine):
    prompt = prompt_of(0, 30)
    await engine.generate(prompt, Sampling(5), session="a")
    other = [*prompt[:20], (prompt[20] + 1) % 97, *prompt[21:]]
    changed = await engine.generate(other, Sampling(8, seed=1), session="a")
    assert engine.stats()["cached_tokens"] == 20
    ids = [*other, *changed.ids]
    np.testing.assert_allclose(changed.logprobs, whole(ids)[np.arange(29, 37), changed.ids], atol=2e-5)
    await engine.generate(prompt, Sampling(1), session="b")  # the prompt that the slot held is there no more
    assert engine.stats()["cached_tokens"] == 20
    assert (await engine.generate(other, Sampling(8, seed=1))).ids.tolist() == changed.ids.tolist()


async def test_stop_ids_end_with_the_stop_token(engine):
    prompt = prompt_of(0, 20)
    free = (await engine.generate(prompt, Sampling(30, seed=1))).ids.tolist()
    stop = next(t for i, t in enumerate(free) if i > 4 and t not in free[:i])
    absent = next(t for t in range(97) if t not in free)
    ended = await engine.generate(prompt, Sampling(30, seed=1, stop_ids=(absent, stop)))
    assert ended.finish_reason == "stop" and ended.ids.tolist() == free[: free.index(stop) + 1]
    assert len(ended.ids) == len(ended.logprobs) == len(ended.version)


async def test_the_context_is_a_limit_too(engine):
    completion = await engine.generate(prompt_of(0, LENGTH - 3), Sampling(30))
    assert completion.finish_reason == "length" and len(completion.ids) == 3


@pytest.mark.parametrize(
    ("ids", "how", "says"),
    [
        ([1, 97], {}, "id 97 is outside the vocabulary of 97"),
        ([-1, 3], {}, "id -1 is outside"),
        ([], {}, "non-empty"),
        ([0.5], {}, "whole numbers"),
        ([1] * LENGTH, {}, "no room in a context of 96"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"stop_ids": tuple(range(9))}, "stop ids"),
    ],
)
async def test_bad_requests_are_refused_by_name(engine, ids, how, says):
    with pytest.raises(ValueError, match=says):
        await engine.generate(ids, Sampling(**{"max_tokens": 4} | how))


async def test_a_session_generates_one_thing_at_a_time(engine):
    first = asyncio.ensure_future(engine.generate([1, 2], Sampling(40), session="a"))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="'a' already generates"):
        await engine.generate([1, 2], Sampling(4), session="a")
    await first
    await engine.generate([1, 2], Sampling(4), session="a")


async def test_new_weights_in_flight(engine, monkeypatch):
    """A request goes on over an update; its tokens say which weights sampled them, and nothing old is shared."""
    prompt = prompt_of(0, 20)
    how = Sampling(70, seed=3)
    old = await engine.generate(prompt, how)
    gate = Gate(monkeypatch, 3)
    running = asyncio.ensure_future(engine.generate(prompt, how))
    await gate.wait()
    update = asyncio.ensure_future(asyncio.to_thread(engine.set_params, params_of(1), 5))
    await gate.open_after(engine, 1)
    await update
    mixed = await running
    assert mixed.version.tolist() == [0] * 12 + [5] * 58
    assert (mixed.ids[:12] == old.ids[:12]).all() and (mixed.ids != old.ids).any()
    new = await engine.generate(prompt, how)
    assert set(new.version) == {5}
    expected = whole([*prompt, *new.ids], params_of(1))[np.arange(19, 89), new.ids]
    np.testing.assert_allclose(new.logprobs, expected, atol=2e-5)


async def test_weights_from_a_folder(engine, tmp_path):
    hf.save_pretrained(tmp_path / "new", CONFIG, params_of(1), dtype="float32")
    await engine.update_weights(str(tmp_path / "new"), 3)
    prompt = prompt_of(0, 20)
    new = await engine.generate(prompt, Sampling(8))
    assert set(new.version) == {3}
    np.testing.assert_allclose(
        new.logprobs, whole([*prompt, *new.ids], params_of(1))[np.arange(19, 27), new.ids], atol=2e-5
    )
    other = dataclasses.replace(CONFIG, num_layers=1)
    hf.save_pretrained(tmp_path / "other", other, qwen.init(other, 0), dtype="float32")
    with pytest.raises(UserError, match="another model"):
        await engine.update_weights(str(tmp_path / "other"), 4)
    with pytest.raises(ValueError, match="names and shapes"):
        engine.set_params(qwen.init(other, 0), 4)


@pytest.mark.parametrize("slots", [4, 24])
def test_the_trainers_arrays_are_shared_even_from_a_mesh(slots):
    """With few slots a CPU has the layers apart and shares the rest."""
    with jax.set_mesh(mesh := make_mesh(devices=jax.devices()[:1])):
        params = qwen.init(CONFIG, 0, mesh)
        engine = LocalEngine(params, CONFIG, **SIZES | {"slots": slots})
        completion = asyncio.run(engine.generate([1, 2, 3], Sampling(4)))
    assert isinstance(engine._params["layers"], tuple) == (slots == 4)
    shared = ("embed", "norm") if slots == 4 else ("embed", "norm", "layers")
    ours, theirs = ([tree[name] for name in shared] for tree in (engine._params, params))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()
    engine.close()
    plain = LocalEngine(params_of(), CONFIG, **SIZES)
    assert asyncio.run(plain.generate([1, 2, 3], Sampling(4))).ids.tolist() == completion.ids.tolist()
    plain.close()


async def test_bfloat16_weights_and_cache():
    engine = LocalEngine(params_of(), CONFIG, **SIZES, dtype="bfloat16")
    assert {x.dtype for x in (*engine._cache, *jax.tree.leaves(engine._params))} == {jnp.dtype("bfloat16")}
    e = Episode("e", prompt_of(0, 21), 3)
    await e.run(engine)
    engine.close()
    at = np.array(e.sampled)
    expected = whole(e.ids, config=dataclasses.replace(CONFIG, compute_dtype="bfloat16"))[at - 1, np.array(e.ids)[at]]
    np.testing.assert_allclose(e.logprobs, expected, atol=0.2)
    assert np.abs(e.logprobs - expected).mean() < 0.03


async def test_a_cancelled_request_leaves_its_slot(monkeypatch):
    engine = LocalEngine(params_of(), CONFIG, **SIZES | {"slots": 1})
    gate = Gate(monkeypatch, 3)
    running = asyncio.ensure_future(engine.generate([1], Sampling(90), session="a"))
    waiting = asyncio.ensure_future(engine.generate([2], Sampling(90)))
    await gate.wait()
    running.cancel()
    waiting.cancel()
    for task in (running, waiting):
        with pytest.raises(asyncio.CancelledError):
            await task
    await gate.open_after(engine, 2)
    completion = await engine.generate([1], Sampling(2), session="a")
    assert len(completion.ids) == 2 and engine.stats()["generated_tokens"] == 12 + 2
    engine.close()


async def test_release_aborts_what_still_runs(monkeypatch):
    engine = LocalEngine(params_of(), CONFIG, **SIZES | {"slots": 1})
    gate = Gate(monkeypatch, 3)
    running = asyncio.ensure_future(engine.generate([1], Sampling(90, seed=2), session="a"))
    waiting = asyncio.ensure_future(engine.generate([2], Sampling(90), session="b"))
    await gate.wait()
    await engine.release("b")
    await engine.release("a")
    await engine.release("never seen")
    await gate.open_after(engine, 3)
    aborted = await running
    assert aborted.finish_reason == "abort" and len(aborted.ids) == 12
    assert (await waiting).finish_reason == "abort" and not len((await waiting).ids)
    again = await engine.generate([1], Sampling(90, seed=2))
    assert again.ids[:12].tolist() == aborted.ids.tolist()
    engine.close()


async def test_an_error_of_the_device_reaches_every_caller_and_the_engine_goes_on(engine, monkeypatch):
    await engine.generate([1, 2, 3], Sampling(2), session="0")

    def broken(*args):
        raise MemoryError("out of slots")

    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode", broken)
        results = await asyncio.gather(
            *(engine.generate([1, 2], Sampling(4), session=str(i)) for i in range(9)), return_exceptions=True
        )
    assert [str(r) for r in results] == ["MemoryError: out of slots"] * 9
    assert all(isinstance(r, EngineError) for r in results)
    assert len((await engine.generate([1, 2], Sampling(4), session="0")).ids) == 4


async def test_broken_weights_are_an_error_and_leave_nothing_behind(engine):
    before = await engine.generate([1, 2, 3], Sampling(4))
    engine.set_params(jax.tree.map(lambda x: x * np.nan, params_of()), 1)
    with pytest.raises(EngineError, match="version 1 give log-probs that are not finite"):
        await engine.generate([1, 2, 3], Sampling(4))
    engine.set_params(params_of(), 2)
    assert (await engine.generate([1, 2, 3], Sampling(4))).logprobs.tolist() == before.logprobs.tolist()


async def test_close_ends_those_who_wait(monkeypatch):
    engine = LocalEngine(params_of(), CONFIG, **SIZES | {"slots": 1})
    gate = Gate(monkeypatch, 2)
    tasks = [asyncio.ensure_future(engine.generate([1], Sampling(90))) for _ in range(3)]
    await gate.wait()
    closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
    while not engine._closed:
        await asyncio.sleep(0.001)
    await gate.open_after(engine, 0)
    await closing
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, EngineError) and "closed" in str(result)
    with pytest.raises(EngineError, match="closed"):
        await engine.generate([1], Sampling(1))
    engine.close()


async def test_nothing_compiles_after_the_warmup():
    engine = LocalEngine(params_of(), CONFIG, **SIZES | {"slots": 3})
    before = engine.stats()["recompilations"]
    engine.warmup()
    assert before == 0 and engine._compiled >= 6  # two prefills, decode, copy, read, write
    episodes = [
        Episode(str(i), prompt_of(i, n), i, delays=(0, 0.05, 0.05)) for i, n in enumerate((1, 2, 17, 30, 33, 40, 40))
    ]
    await asyncio.gather(*(e.run(engine) for e in episodes))
    engine.set_params(params_of(1), 1)
    await engine.generate([1, 2], Sampling(3, top_k=2, top_p=0.5, stop_ids=(1, 2)))
    stats = engine.stats()
    assert stats["recompilations"] == 0 and stats["parked"] > 0
    engine.close()


def test_sizes_that_cannot_be_are_refused():
    for sizes, says in (
        ({"slots": 0}, "slots=0"),
        ({"max_length": 1}, "max_length"),
        ({"max_length": 40000}, "max_position_embeddings=32768"),
    ):
        with pytest.raises(UserError, match=says):
            LocalEngine(params_of(), CONFIG, **SIZES | sizes)


def test_a_compact_batch_is_used_only_where_its_bits_are_those_of_all_slots(monkeypatch):
    """The quickstart's sizes, so that the claim in local.py is kept true where it matters."""
    config = ModelConfig("qwen3", 512, 128, 256, 1, 4, 2, 32, tie_word_embeddings=True)
    engine = LocalEngine(qwen.init(config, 0), config, slots=128, max_length=64, prefill_chunks=(16,), decode_chunk=2)
    assert engine._agrees(64)
    real = decode.decode

    def other_bits(params, config, cache, rows, steps):
        cache, out = real(params, config, cache, rows, steps)
        return cache, out._replace(logprobs=out.logprobs * (1 if len(rows.slot) == 128 else 1 + 1e-6))

    monkeypatch.setattr(decode, "decode", other_bits)
    assert not engine._agrees(64)
    engine.close()


def test_chunks_are_full_or_more_than_half_full():
    assert cut(0, (16, 64)) == [] and cut(1, (16, 64)) == [16] and cut(16, (16, 64)) == [16]
    assert cut(17, (16, 64)) == [16, 16] and cut(33, (16, 64)) == [64] and cut(150, (16, 64)) == [64, 64, 16, 16]
    assert cut(129, (16, 64, 256)) == [256] and cut(300, (16,)) == [16] * 19
    for n in range(1, 600):
        assert 0 <= sum(cut(n, (16, 64, 256))) - n < 256
