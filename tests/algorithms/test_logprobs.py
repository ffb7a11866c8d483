import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_agentrl_jax.algorithms.entropy import update_coefficient
from open_agentrl_jax.algorithms.logprobs import token_logprobs


def plain(hidden, head, targets, temperature):
    logits = hidden @ head / temperature
    logp = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], -(jnp.exp(logp) * logp).sum(-1)


def inputs(b, t, d=8, v=13):
    keys = jax.random.split(jax.random.key(b * 100 + t), 3)
    return (
        jax.random.normal(keys[0], (b, t, d)),
        jax.random.normal(keys[1], (d, v)),
        jax.random.randint(keys[2], (b, t), 0, v),
    )


@settings(max_examples=7, deadline=None)
@given(b=st.integers(1, 4), t=st.integers(1, 17), chunk=st.integers(1, 40), temperature=st.sampled_from([1.0, 0.6]))
def test_chunks_change_nothing(b, t, chunk, temperature):
    hidden, head, targets = inputs(b, t)
    weights = jnp.arange(b * t, dtype=jnp.float32).reshape(b, t)

    def values_and_gradients(f):
        def loss(h, w):
            values = f(h, w)
            return sum((x * weights).sum() for x in values), values

        (_, values), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)
        return values, gradients

    got, got_gradients = values_and_gradients(
        lambda h, w: token_logprobs(h, w, targets, temperature=temperature, chunk=chunk)
    )
    want, want_gradients = values_and_gradients(lambda h, w: plain(h, w, targets, temperature))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
    for g, w in zip(got_gradients, want_gradients, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3)


def test_no_array_of_all_logits_is_ever_made():
    b, t, d, v, chunk = 1, 512, 16, 4096, 16
    hidden = jax.ShapeDtypeStruct((b, t, d), jnp.float32)
    head = jax.ShapeDtypeStruct((d, v), jnp.float32)
    targets = jax.ShapeDtypeStruct((b, t), jnp.int32)
    f = jax.jit(jax.grad(lambda h, w, y: token_logprobs(h, w, y, chunk=chunk)[0].sum(), (0, 1)))
    temporary = f.lower(hidden, head, targets).compile().memory_analysis().temp_size_in_bytes
    assert temporary < b * t * v * 4 / 2


def test_entropy_coefficient_holds_a_target_from_below():
    c = jnp.asarray(0.0)
    for _ in range(5):
        c = update_coefficient(c, jnp.asarray(0.1), 0.3)
    assert c == pytest.approx(5 * 1e-3 * 0.2, rel=1e-4)
    for _ in range(100):
        c = update_coefficient(c, jnp.asarray(2.0), 0.3)
    assert c == 0
