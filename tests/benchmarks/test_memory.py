import functools

import jax
import numpy as np

from benchmarks import memory as module
from open_agentrl_jax.algorithms.logprobs import token_logprobs


def test_both_sides_compute_the_same_and_the_chunked_one_holds_less():
    tokens, vocab, width = 256, 2048, 16
    sides = {"naive": module.naive, "chunk": functools.partial(token_logprobs, chunk=16)}
    programs = {name: module.compiled(head, tokens, vocab, width) for name, head in sides.items()}
    keys = jax.random.split(jax.random.key(0), 3)
    arguments = (
        jax.random.normal(keys[0], (1, tokens, width)),
        jax.random.normal(keys[1], (width, vocab)),
        jax.random.randint(keys[2], (1, tokens), 0, vocab),
    )
    want, got = (programs[name](*arguments) for name in sides)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), got, want)
    held = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    assert held["chunk"] < held["naive"] / 3
