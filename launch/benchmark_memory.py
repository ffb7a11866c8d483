"""What the chunked head saves: XLA's temporary bytes and the time of log-prob, entropy and both gradients, by chunk.

    python -m launch.benchmark memory

Bytes are those of the compiled program at 4,096 tokens, a vocabulary of 151,936 and width 1,024 in float32, nothing is
run; "naive" holds all logits at once. Time is measured on fewer tokens, all sides in one process, round by round.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from open_agentrl_jax.algorithms.logprobs import token_logprobs

VOCAB, WIDTH = 151936, 1024


def naive(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same two results from [b t v] logits."""
    logp = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, head))
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], -(jnp.exp(logp) * logp).sum(-1)


def compiled(head: Callable[..., Any], tokens: int, vocab: int, width: int) -> Any:
    """Value and gradients of a loss over `head`'s two results, for these shapes."""

    def loss(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> jax.Array:
        logprobs, entropy = head(hidden, unembedding, targets)
        return (logprobs + 0.01 * entropy).mean()

    shapes = ((1, tokens, width), jnp.float32), ((width, vocab), jnp.float32), ((1, tokens), jnp.int32)
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()


def seconds(programs: dict[str, Any], tokens: int, vocab: int, width: int, rounds: int) -> dict[str, float]:
    """Each program's median over rounds in which every one has its turn; one round before is not counted."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, tokens, width))
    arguments = (
        hidden,
        jax.random.normal(keys[1], (width, vocab)) / width,
        jax.random.randint(keys[2], (1, tokens), 0, vocab),
    )
    took: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            took[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in took.items()}


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="launch.benchmark memory")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--chunks", default="256,512,1024")
    parser.add_argument("--timed_tokens", type=int, default=1024, help="naive takes 3 MB of host memory a token")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    sides: dict[str, Callable[..., Any]] = {"naive": naive}
    for chunk in options.chunks.split(","):
        sides[f"chunk {chunk}"] = functools.partial(token_logprobs, chunk=int(chunk))
    shape = options.vocab, options.width
    memory = {name: compiled(head, options.tokens, *shape).memory_analysis() for name, head in sides.items()}
    timed = {name: compiled(head, options.timed_tokens, *shape) for name, head in sides.items()}
    took = seconds(timed, options.timed_tokens, *shape, options.rounds)
    print(f"{'head':10} {'temporaries, GB':>16} {'seconds':>9} {'of naive':>9}")
    for name in sides:
        size, ratio = memory[name].temp_size_in_bytes / 1e9, took[name] / took["naive"]
        print(f"{name:10} {size:16.2f} {took[name]:9.2f} {ratio:9.2f}", flush=True)
