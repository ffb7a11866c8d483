"""What the chunked head saves: XLA's temporary bytes and the time of log-prob, entropy and both gradients, by chunk.

    python -m launch.benchmark memory

Bytes are those of the compiled program at 4,096 tokens, a vocabulary of 151,936 and width 1,024 in float32; "naive"
holds all logits at once. Time is measured on fewer tokens; --rounds=0 skips it. `--tensor=2` splits the vocabulary over
two devices, parts of the same processor; bytes are then those of one device.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import harness
from open_agentrl_jax.algorithms.logprobs import token_logprobs
from open_agentrl_jax.parallel.mesh import make_mesh
from open_agentrl_jax.parallel.sharding import P

VOCAB, WIDTH = 151936, 1024


def naive(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same two results from [b t v] logits."""
    logp = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, head))
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    if jax.typeof(head).sharding.mesh.empty:
        return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0], entropy
    return jnp.where(jnp.arange(logp.shape[-1]) == targets[..., None], logp, 0).sum(-1), entropy


def compiled(head: Callable[..., Any], tokens: int, vocab: int, width: int) -> Any:
    """Value and gradients of a loss over `head`'s two results, for these shapes."""

    def loss(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> jax.Array:
        logprobs, entropy = head(hidden, unembedding, targets)
        return (logprobs + 0.01 * entropy).mean()

    shapes = ((1, tokens, width), jnp.float32), ((width, vocab), jnp.float32), ((1, tokens), jnp.int32)
    like = (jax.ShapeDtypeStruct(*s, sharding=lies) for s, lies in zip(shapes, layout(), strict=True))
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*like).compile()


def layout() -> tuple[jax.NamedSharding | None, ...]:
    """Shardings of hidden states, head and targets on the current mesh: the vocabulary over `tensor`."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return None, None, None
    return tuple(jax.NamedSharding(mesh, spec) for spec in (P(), P(None, "tensor"), P()))


def timed(programs: dict[str, Any], tokens: int, vocab: int, width: int, rounds: int) -> dict[str, float]:
    """Median seconds of each program on random arguments."""
    keys = jax.random.split(jax.random.key(0), 3)
    values = (
        jax.random.normal(keys[0], (1, tokens, width)),
        jax.random.normal(keys[1], (width, vocab)) / width,
        jax.random.randint(keys[2], (1, tokens), 0, vocab),
    )
    arguments = [jax.device_put(x, lies) for x, lies in zip(values, layout(), strict=True)]

    def side(program: Any) -> float:
        return harness.seconds(lambda: jax.block_until_ready(program(*arguments)))

    sides = {name: functools.partial(side, program) for name, program in programs.items()}
    return {name: statistics.median(values) for name, values in harness.in_turn(sides, rounds).items()}


def main(arguments: list[str]) -> None:
    """The command."""
    parser = harness.parser("memory", __doc__, rounds=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--chunks", default="256,512,1024")
    parser.add_argument("--timed_tokens", type=int, default=1024, help="naive takes 3 MB of host memory per token")
    parser.add_argument("--tensor", type=int, default=1, help="devices that the vocabulary is split over")
    options = parser.parse_args(arguments)
    if options.tensor > 1:
        jax.config.update("jax_num_cpu_devices", options.tensor)
        jax.set_mesh(make_mesh(fsdp=1, tensor=options.tensor))
    sides: dict[str, Callable[..., Any]] = {"naive": naive}
    for chunk in options.chunks.split(","):
        sides[f"chunk {chunk}"] = functools.partial(token_logprobs, chunk=int(chunk))
    shape, report = (options.vocab, options.width), harness.Report("memory", arguments)
    for name, head in sides.items():
        memory = compiled(head, options.tokens, *shape).memory_analysis()
        report.add(head=name, **{"temporaries GB": memory.temp_size_in_bytes / 1e9})
    if options.rounds:
        programs = {name: compiled(head, options.timed_tokens, *shape) for name, head in sides.items()}
        took = timed(programs, options.timed_tokens, *shape, options.rounds)
        for name in sides:
            report.add(head=name, seconds=took[name], **{"of naive": took[name] / took["naive"]})
    report.save(options.out)
