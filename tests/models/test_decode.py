import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.models import attention, decode, flash_decode, kv, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.planning import topologies
from open_agentrl_jax.planning.shapes import SHAPES
from open_agentrl_jax.rollout import weights

# A wide initialisation: the log-probs must differ from token to token by far more than the tolerance.
QWEN3 = ModelConfig("qwen3", 97, 48, 64, 2, 4, 2, 16, rope_theta=1e4, tie_word_embeddings=True, initializer_range=0.2)
QWEN2 = ModelConfig("qwen2", 97, 48, 64, 2, 4, 2, 12, rope_theta=1e6, initializer_range=0.2)
SLOTS, LENGTH = 6, 80


@functools.cache
def params_of(config):
    params = qwen.init(config, 0)
    if config.qkv_bias:  # they start at 0
        for i, name in enumerate(("q_bias", "k_bias", "v_bias")):
            shape = params["layers"][name].shape
            params["layers"][name] = jax.random.normal(jax.random.key(i), shape)
    return params


@functools.partial(jax.jit, static_argnums=1)
def padded(params, config, tokens):
    positions = jnp.arange(LENGTH)[None]
    hidden = qwen.forward(params, config, tokens[None], positions, jnp.ones_like(positions))
    return jax.nn.log_softmax(qwen.logits(params, config, hidden)[0])


def whole(config, tokens):
    """Log-probs [t v] of the training forward over one sequence [t]."""
    filled_up = np.zeros(LENGTH, np.int32)
    filled_up[: len(tokens)] = tokens
    return np.asarray(padded(params_of(config), config, filled_up))[: len(tokens)]


def rows_of(
    token, position, *, slot=None, left=1000, size=SLOTS, stop=(), seed=None, temperature=1.0, top_p=1.0, top_k=0
):
    a = max(size, len(token))
    token = np.pad(np.asarray(token, np.int32), (0, a - len(token)))
    full = lambda value, dtype: np.full(a, value, dtype)  # noqa: E731
    keys = np.zeros((a, 2), np.uint32)
    keys[:, 1] = np.arange(a) if seed is None else seed
    stops = np.full((a, decode.STOPS), -1, np.int32)
    stops[:, : len(stop)] = stop
    return decode.Rows(
        np.arange(a, dtype=np.int32) if slot is None else np.asarray(slot, np.int32),
        token,
        np.resize(np.asarray(position, np.int32), a),
        full(left, np.int32),
        stops,
        keys,
        full(temperature, np.float32),
        full(top_p, np.float32),
        full(top_k, np.int32),
    )


def filled(config, prompts, slots=None, chunk=16, params=None):
    """A cache in which slot i holds all but the last token of prompts[i]."""
    params = params_of(config) if params is None else params
    slots = range(len(prompts)) if slots is None else slots
    cache = kv.init_cache(config, SLOTS, LENGTH)
    for slot, prompt in zip(slots, prompts, strict=True):
        for start in range(0, len(prompt) - 1, chunk):
            part = prompt[start : min(start + chunk, len(prompt) - 1)]
            tokens = np.zeros((1, chunk), np.int32)
            tokens[0, : len(part)] = part
            at = np.array([slot], np.int32), np.array([start], np.int32), np.array([len(part)], np.int32)
            cache = decode.prefill(params, config, cache, tokens, *at)
    return cache


@pytest.mark.parametrize("config", [QWEN3, QWEN2], ids=lambda c: c.model_type)
def test_sampled_logprobs_are_those_of_the_training_forward(config):
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 97, n) for n in (1, 2, 17, 33, 50, 64)]
    cache = filled(config, prompts)
    rows = rows_of([p[-1] for p in prompts], [len(p) - 1 for p in prompts])
    cache, out = decode.decode(params_of(config), config, cache, rows, 8)
    assert out.count.tolist() == [8] * 6 and int(out.steps) == 8
    for i, prompt in enumerate(prompts):
        new = np.asarray(out.tokens[:, i])
        expected = whole(config, np.concatenate([prompt, new]))[np.arange(len(prompt) - 1, len(prompt) + 7), new]
        assert np.ptp(expected) > 0.5
        np.testing.assert_allclose(out.logprobs[:, i], expected, atol=2e-5)  # asked for: 1e-4


def test_the_cache_of_an_accelerator_holds_and_gives_the_same(monkeypatch):
    prompts = [np.random.default_rng(1).integers(0, 97, n) for n in (40, 31, 2)]
    told = []
    for kind, inner in (("cpu", (32, 16)), ("tpu", (16, 32))):
        monkeypatch.setattr(kv, "platform", lambda kind=kind: kind)
        cache = filled(QWEN3, prompts)
        assert cache.v.shape[-2:] == inner
        rows = rows_of([p[-1] for p in prompts], [*(len(p) - 1 for p in prompts), 0, 0, 0], slot=[0, 1, 2, 6, 6, 6])
        cache, out = decode.decode(params_of(QWEN3), QWEN3, cache, rows, 8)
        told.append((cache.k, cache.v if kind == "cpu" else cache.v.swapaxes(-1, -2), out.logprobs[:, :3]))
    assert np.count_nonzero(told[0][1]) == 2 * 2 * 16 * (40 + 31 + 2 - 3 + 3 * 8)  # layers, heads, D, positions
    for one, other in zip(*told, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_decoding_through_the_gpu_kernel_gives_the_same(monkeypatch):
    prompts = [np.random.default_rng(1).integers(0, 97, n) for n in (70, 31, 2, 1)]
    rows = rows_of([p[-1] for p in prompts], [*(len(p) - 1 for p in prompts), 0, 0], slot=[3, 1, 2, 0, 6, 6])
    cache, found = filled(QWEN3, prompts, slots=[3, 1, 2, 0]), []
    for serves in (False, True):
        monkeypatch.setattr(decode, "_kernel_serves", lambda *_, serves=serves: serves)
        monkeypatch.setattr(decode, "flash_decode", functools.partial(flash_decode.flash_decode, interpret=True))
        step = jax.jit(decode.decode.__wrapped__, static_argnames=("model_config", "steps"))
        after, out = step(params_of(QWEN3), QWEN3, cache, rows, steps=8)
        found.append((*after, out.tokens[:, :4], out.logprobs[:, :4]))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(("h", "K", "n"), [(8, 2, 32), (7, 1, 256)])
def test_the_gpu_kernel_reads_what_each_row_sees(h, K, n):
    rng, D, blocks, slots = np.random.default_rng(n), 16, 3, 5
    counts = np.array([0, 1, n, 2 * n + 5, 3 * n], np.int32)
    slot = np.array([4, 0, 3, 1, 2], np.int32)
    q, k, v = (jnp.asarray(rng.standard_normal((5, m, D)), jnp.float32) for m in (h, K, K))
    keys = jnp.asarray(rng.standard_normal((2, blocks, slots, K, D, n)), jnp.float32)
    values = jnp.asarray(rng.standard_normal((2, blocks, slots, K, n, D)), jnp.float32)
    got = flash_decode.flash_decode(q, k, v, keys, values, slot, counts, 1, interpret=True)
    for r, (at, count) in enumerate(zip(slot, counts, strict=True)):
        seen_k = jnp.concatenate([keys[1, :, at].transpose(1, 0, 3, 2).reshape(K, -1, D)[:, :count], k[r][:, None]], 1)
        seen_v = jnp.concatenate([values[1, :, at].swapaxes(0, 1).reshape(K, -1, D)[:, :count], v[r][:, None]], 1)
        weights = jax.nn.softmax(jnp.einsum("kgD,knD->kgn", q[r].reshape(K, -1, D), seen_k) / D**0.5)
        expected = jnp.einsum("kgn,knD->kgD", weights, seen_v).reshape(h, D)
        np.testing.assert_allclose(got[r], expected, atol=2e-6)


@pytest.mark.parametrize("config", [QWEN3, QWEN2], ids=lambda c: c.model_type)
def test_layers_apart_give_what_stacked_ones_give(config):
    prompts = [np.random.default_rng(1).integers(0, 97, n) for n in (40, 31, 2)]
    rows = rows_of([p[-1] for p in prompts], [*(len(p) - 1 for p in prompts), 0, 0, 0], slot=[0, 1, 2, 6, 6, 6])
    told = []
    for layout in (lambda params: params, qwen.apart):
        params = layout(params_of(config))
        cache = filled(config, prompts, params=params)
        cache, out = decode.decode(params, config, cache, rows, 8)
        told.append((*cache, out.tokens[:, :3], out.logprobs[:, :3]))
    assert np.ptp(told[0][3]) > 0.5
    for one, other in zip(*told, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_with_layers_apart_a_step_copies_neither_a_matrix_nor_the_cache():
    """Seen in what XLA on a CPU compiles; a stacked layer's matrices it does copy."""
    length = 2048
    cache = jax.eval_shape(lambda: kv.init_cache(QWEN3, SLOTS, length))
    text, held = {}, {}
    for name, layout in (("stacked", lambda params: params), ("apart", qwen.apart)):
        params = jax.eval_shape(layout, qwen.abstract_params(QWEN3))
        program = decode.decode.lower(params, QWEN3, cache, rows_of([1], 9), 8).compile()
        text[name], held[name] = program.as_text(), program.memory_analysis().temp_size_in_bytes
    assert "f32[1,48,64]" in text["stacked"] and "f32[1,48,64]" not in text["apart"]
    assert held["apart"] < cache.k.size * 4 / 2, held


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs pip install 'jax[cuda12]'")
def test_on_a_gpu_a_step_copies_neither_matrices_nor_cache_and_waits_for_no_loop(monkeypatch):
    for module in (attention, decode, kv):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    here = jax.sharding.SingleDeviceSharding(topologies.devices("h100:1")[0])
    config = ModelConfig(**SHAPES["qwen3_4b"] | {"num_layers": 2}, compute_dtype="bfloat16")
    place = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)  # noqa: E731
    params = jax.eval_shape(lambda p: weights.cast(qwen.apart(p), np.dtype("bfloat16")), qwen.abstract_params(config))
    cache = place(jax.eval_shape(lambda: kv.init_cache(config, 16, 4096)))
    step = jax.jit(decode.decode.__wrapped__, static_argnames=("model_config", "steps"), donate_argnames="cache")
    rows = place(rows_of([1], 9, size=16))
    program = step.lower(place(params), model_config=config, cache=cache, rows=rows, steps=16).compile()
    assert program.memory_analysis().temp_size_in_bytes < config.hidden_size * config.intermediate_size * 2
    text = program.as_text()
    body = re.search(r"while\(.*body=(%[\w.]+)", text[text.index("ENTRY") :])
    assert body
    (of_step,) = (part for part in re.split(r"\n(?=%|ENTRY)", text) if part.startswith(body[1] + " "))
    assert " while(" not in of_step
    assert of_step.count("flash_decode") >= 2  # one per layer


def test_greedy_takes_the_argmax():
    random = np.random.default_rng(1)
    prompt = random.integers(0, 97, 20)
    rows = rows_of([prompt[-1]], 19, temperature=0.0)
    _, out = decode.decode(params_of(QWEN3), QWEN3, filled(QWEN3, [prompt]), rows, 8)
    logprobs = whole(QWEN3, np.concatenate([prompt, out.tokens[:, 0]]))[19:27]
    assert (out.tokens[:, 0] == logprobs.argmax(-1)).all()
    np.testing.assert_allclose(out.logprobs[:, 0], logprobs.max(-1), atol=2e-5)


@pytest.mark.parametrize("layout", [lambda params: params, qwen.apart], ids=["stacked", "apart"])
def test_bits_do_not_depend_on_slot_row_or_company(layout):
    params = layout(params_of(QWEN3))
    random = np.random.default_rng(2)
    prompts = [random.integers(0, 97, n) for n in (5, 9, 17, 33, 50, 64)]
    _, together = decode.decode(
        params,
        QWEN3,
        filled(QWEN3, prompts, params=params),
        rows_of([p[-1] for p in prompts], [len(p) - 1 for p in prompts]),
        8,
    )
    order = random.permutation(SLOTS)
    cache = filled(QWEN3, prompts, slots=order, params=params)
    for i, prompt in enumerate(prompts):
        rows = rows_of([0] * SLOTS, 0, slot=[SLOTS] * SLOTS, seed=i)  # the others do nothing
        rows.slot[order[i] - 1], rows.token[order[i] - 1], rows.position[order[i] - 1] = (
            order[i],
            prompt[-1],
            len(prompt) - 1,
        )
        cache, alone = decode.decode(params, QWEN3, cache, rows, 8)
        assert (alone.tokens[:, order[i] - 1] == together.tokens[:, i]).all()
        assert (alone.logprobs[:, order[i] - 1] == together.logprobs[:, i]).all()


def test_prefill_bits_do_not_depend_on_company():
    random = np.random.default_rng(3)
    tokens = random.integers(0, 97, (4, 16)).astype(np.int32)
    empty = kv.init_cache(QWEN3, SLOTS, LENGTH)
    counts = np.array([16, 16, 11, 16], np.int32)
    starts = np.zeros(4, np.int32)
    fill = functools.partial(decode.prefill, params_of(QWEN3), QWEN3)
    full = fill(jax.tree.map(jnp.copy, empty), tokens, np.arange(4, dtype=np.int32), starts, counts)
    for i in range(4):
        alone = np.zeros_like(tokens)
        alone[3 - i] = tokens[i]
        slots, count = np.full(4, SLOTS, np.int32), np.zeros(4, np.int32)
        slots[3 - i], count[3 - i] = 5, counts[i]
        one = fill(jax.tree.map(jnp.copy, empty), alone, slots, starts, count)
        for a, b in zip(one, full, strict=True):
            assert np.abs(b[:, :, i]).sum() > 0
            assert (a[:, :, 5] == b[:, :, i]).all() and not np.asarray(a[:, :, :5]).any()


def test_prefill_writes_only_what_is_real():
    prompt = np.arange(12)
    cache = filled(QWEN3, [prompt])
    held = np.asarray(cache.v[:, :, 0]).swapaxes(1, 2).reshape(2, 2, -1, 16)  # [l k t D]
    assert np.abs(held[:, :, :11]).min(-1).all() and not held[:, :, 11:].any()


def test_stop_ids_and_budget_end_a_row():
    prompt = np.arange(10)
    cache = filled(QWEN3, [prompt] * 3)
    _, free = decode.decode(params_of(QWEN3), QWEN3, cache, rows_of([9] * 3, 9), 8)
    tokens = np.asarray(free.tokens)
    rows = rows_of([9] * 3, 9)
    n = next(i for i in range(2, 8) if tokens[i, 0] not in tokens[:i, 0])
    rows.stop[0, 1], rows.left[1], rows.left[3:] = tokens[n, 0], 2, 0
    _, out = decode.decode(params_of(QWEN3), QWEN3, filled(QWEN3, [prompt] * 3), rows, 8)
    assert out.count.tolist() == [n + 1, 2, 8, 0, 0, 0] and out.left.tolist() == [0, 0, 1000 - 8, 0, 0, 0]
    for i, count in enumerate(out.count[:3]):
        assert (out.tokens[:count, i] == tokens[:count, i]).all()
    rows.left[2] = 1
    _, early = decode.decode(params_of(QWEN3), QWEN3, filled(QWEN3, [prompt] * 3), rows, 8)
    assert int(early.steps) == n + 1


def test_slots_are_copied_in_order_and_read_back():
    random = np.random.default_rng(4)
    empty = kv.init_cache(QWEN3, SLOTS, LENGTH)
    content = [random.standard_normal(x.shape, np.float32) for x in empty]
    cache = kv.Cache(*map(jnp.asarray, content))
    cache = kv.copy_slots(cache, np.array([0, 1, 9]), np.array([3, 0, 9]), np.int32(2))
    one = jax.device_get(kv.read_slot(cache, np.int32(3)))
    for got, was in zip(one, content, strict=True):
        assert (got == was[:, :, 0]).all()
    cache = kv.write_slot(cache, np.int32(5), one)
    for got, was in zip(cache, content, strict=True):
        for slot, source in enumerate([1, 1, 2, 0, 4, 0]):
            assert (got[:, :, slot] == was[:, :, source]).all()


def reference(scores, temperature, top_k, top_p):
    """The log-probs, one row at a time in float64."""
    out = np.full(scores.shape, -np.inf)
    for row, s in enumerate(scores.astype(np.float64) / temperature):
        order = np.argsort(-s)[: top_k or None]
        p = np.exp(s[order] - s.max())
        p /= p.sum()
        before = np.concatenate([[0], np.cumsum(p)[:-1]])
        order = order[before < top_p]
        out[row, order] = s[order] - s[order].max()
        out[row, order] -= np.log(np.exp(out[row, order]).sum())
    return out


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.6, 0, 1.0),
        (1.7, 7, 1.0),
        (1.0, 0, 0.6),
        (0.8, 10, 0.8),
        (1.0, 1, 1.0),
        (1.0, 0, 1e-6),
        (1.0, 500, 0.9),
    ],
)
def test_draws_follow_the_truncated_distribution(temperature, top_k, top_p):
    n, v = 4000, 40
    scores = np.random.default_rng(5).normal(0, 2, v).astype(np.float32)
    rows = rows_of([0] * n, 7, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, logprobs = map(np.asarray, jax.jit(decode.sample)(np.tile(scores, (n, 1)), rows))
    expected = reference(scores[None], temperature, top_k, top_p)[0]
    np.testing.assert_allclose(logprobs, expected[tokens], atol=2e-5)  # -inf nowhere: only what is kept is drawn
    p = np.exp(expected)
    common = p * n > 5
    counts = np.bincount(tokens, minlength=v)
    chi2 = ((counts - p * n)[common] ** 2 / (p * n)[common]).sum()
    freedom = common.sum() - 1
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom) + 1e-9


def test_rows_of_one_batch_are_sampled_as_each_asks():
    scores = np.random.default_rng(6).normal(0, 2, (4, 97)).astype(np.float32)
    plain = rows_of([0] * 4, 3, size=4)
    how = {"temperature": np.array([1, 0, 1, 1], np.float32), "top_k": np.array([0, 0, 1, 0], np.int32)}
    mixed = plain._replace(**how)
    t1, l1 = jax.jit(decode.sample)(scores, plain)
    t2, l2 = jax.jit(decode.sample)(scores, mixed)
    assert (t1[0], l1[0], t1[3], l1[3]) == (t2[0], l2[0], t2[3], l2[3])  # another row's truncation changes no bit
    assert t2[1] == scores[1].argmax() and t2[2] == scores[2].argmax()
    assert l2[1] < -0.01 and l2[2] == 0  # greedy reports temperature 1; of one candidate the log-prob is 0


def test_no_token_of_probability_zero_is_drawn_whatever_the_mark():
    weights = jnp.tile(jnp.array([0, 0, 3e-8, 0, 1, 0.25, 0, 0], jnp.float32), (7, 1))
    marks = jnp.array([0, 2.9e-8, 3.1e-8, 0.9, 1.2, 1.25, 2], jnp.float32)
    places, rest = decode._pick(weights, marks)
    assert places.tolist() == [2, 2, 4, 4, 5, 5, 5]
    np.testing.assert_allclose(rest[:5], [0, 2.9e-8, 1e-9, 0.9, 0.2], atol=2e-7)


def test_truncation_keeps_exactly_the_best_of_any_scores():
    random = np.random.default_rng(8)
    scores = random.normal(0, 3, (64, 151)).astype(np.float32) * np.float32(10.0) ** random.integers(-6, 3, (64, 1))
    for top_k in (1, 2, 150, 151, 1000):
        cut = jax.jit(decode.truncate)(scores, np.full(64, top_k), np.ones(64, np.float32))
        assert (np.isfinite(cut) == (scores >= -np.sort(-scores)[:, min(top_k, 151) - 1 :][:, :1])).all()
    ties = np.array([[1, 3, 3, -2, 3]], np.float32)
    kept = np.isfinite(decode.truncate(ties, np.array([2]), np.array([0.1], np.float32)))
    assert kept.tolist() == [[False, True, True, False, True]]


def test_the_draw_depends_on_seed_and_position_alone():
    scores = np.tile(np.random.default_rng(7).normal(0, 1, 97).astype(np.float32), (64, 1))
    draw = lambda rows: np.asarray(jax.jit(decode.sample)(scores, rows)[0])  # noqa: E731
    seeds = np.arange(64)
    first = draw(rows_of([0] * 64, 5, seed=seeds))
    assert (first == draw(rows_of([1] * 64, 5, seed=seeds, slot=seeds[::-1]))).all()
    assert len(set(first)) > 20
    assert (first != draw(rows_of([0] * 64, 6, seed=seeds))).mean() > 0.5
    high = rows_of([0] * 64, 5, seed=seeds)
    high.key[:, 0] = 1
    assert (first != draw(high)).mean() > 0.5


def test_blocks_are_few_and_whole():
    assert [kv.block_size(n) for n in (1, 192, 512, 513, 1024, 20480)] == [32, 32, 32, 64, 64, 2048]
    cache = kv.init_cache(QWEN3, 2, 70)
    assert cache.k.shape == (2, 3, 2, 2, 16, 32) and cache.v.shape == (2, 3, 2, 2, 32, 16)
