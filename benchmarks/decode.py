"""The embedded engine against the machine: decoding against the bandwidth bound, prefill against the matmul rate.

    python -m launch.benchmark decode
    python -m launch.benchmark decode --model=qwen3_4b --batches=1,16,64 --lengths=512,4096     # an accelerator

All of a line is measured in one process, round by round, each round: prompts that have nothing in common (prefill),
more tokens of the same sessions (decode, no prefill in it), as many requests of one prompt (a group), and the machine.

decode: the bound is the bytes that a step must read over the rate at which the machine reads. The bytes are the weights
  once (of an embedding that is not the head too, only some rows) and the keys and values of every row; the rate is that
  of the faster of a sum and a matrix-vector product over an array of 1 GiB, or of 2 GiB off the CPU.
prefill: tokens/s until the last prompt has its first token; the operations are those of the layers' products and of the
  pairs of tokens that see each other, the machine's rate is that of a large square product in the same dtype.
group: seconds until all have their first token, over the seconds that prompts without a common prefix took.

Weights are random, in the dtype that a run would compute in. Requests go through `LocalEngine.generate`, so that the
engine's own work on the host is in every figure.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from open_agentrl_jax.models import int8, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel.sharding import path_name
from open_agentrl_jax.planning.shapes import SHAPES
from open_agentrl_jax.rollout.local import LocalEngine
from open_agentrl_jax.types import Completion, Sampling

# 61 M parameters: what it reads a step is several times a processor's caches, and two cores can prefill with it.
SMALL: dict[str, Any] = {"model_type": "qwen3", "hidden_size": 768, "intermediate_size": 2304, "num_layers": 8}
SMALL |= {"num_heads": 12, "num_kv_heads": 4, "head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {"small": SMALL, **SHAPES}
READ_BYTES = {"cpu": 2**30}  # of the array that gives the bandwidth; elsewhere 2 GiB, which outweighs a launch
SQUARE = {"cpu": 2048}  # of the product that gives the matmul rate; elsewhere 8,192


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of the device; each call measures once."""

    read: Callable[[], float]  # bytes/s
    multiply: Callable[[], float]  # operations/s


def open_machine(dtype: str, *, read_bytes: int = 0, square: int = 0) -> Machine:
    """Compiles the probes; see the head of this file."""
    read_bytes = read_bytes or READ_BYTES.get(jax.default_backend(), 2**31)
    square = square or SQUARE.get(jax.default_backend(), 8192)
    width = 1 << (read_bytes // jnp.dtype(dtype).itemsize).bit_length() // 2
    table = jnp.ones((read_bytes // jnp.dtype(dtype).itemsize // width, width), dtype)
    row, factor = jnp.ones((1, len(table)), dtype), jnp.ones((square, square), dtype)
    total, vector = jax.jit(lambda x: x.sum(dtype=jnp.float32)), jax.jit(lambda v, x: v @ x)
    product = jax.jit(lambda x: x @ x)

    def seconds(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
        return harness.seconds(lambda: jax.block_until_ready(function(*arguments)))

    def read() -> float:
        return table.nbytes / min(seconds(total, table), seconds(vector, row, table))

    def multiply() -> float:
        return 2.0 * square**3 / seconds(product, factor)

    machine = Machine(read, multiply)
    for probe in (machine.read, machine.multiply):
        probe()  # compiles
    return machine


def random_params(config: ModelConfig) -> qwen.Params:
    """Parameters in the compute dtype, drawn on the device a layer at a time: a real model fits once, not twice."""

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        name = path_name(path)
        if name.endswith(("norm", "bias")):
            return jnp.full(like.shape, float(name.endswith("norm")), config.compute_dtype)
        layers = like.shape[0] if name.startswith("layers/") else 1

        def draw(key: jax.Array) -> jax.Array:
            values = config.initializer_range * jax.random.normal(key, (like.size // layers,), jnp.float32)
            return values.astype(config.compute_dtype)

        keys = jax.random.split(jax.random.key(like.size), layers)
        return jax.jit(lambda keys: jax.lax.map(draw, keys).reshape(like.shape))(keys)

    return jax.tree_util.tree_map_with_path(leaf, qwen.abstract_params(config))


def weight_bytes(params: qwen.Params, config: ModelConfig, weights: str = "same") -> int:
    """What of the weights a step reads."""
    held = jax.eval_shape(int8.quantize, params) if weights == "int8" else params
    read = {name: part for name, part in held.items() if config.tie_word_embeddings or name != "embed"}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(read))


def cache_bytes(config: ModelConfig, tokens: float) -> float:
    """Keys and values of so many tokens."""
    c = config
    return tokens * 2 * c.num_layers * c.num_kv_heads * c.head_dim * jnp.dtype(c.compute_dtype).itemsize


def prefill_flops(config: ModelConfig, length: int) -> float:
    """Operations of the layers over one prompt; nothing for the head, which prefill does not compute."""
    c = config
    wide, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    matrices = c.hidden_size * (2 * wide + 2 * narrow + 3 * c.intermediate_size)
    return c.num_layers * (2.0 * matrices * length + 4.0 * wide * length * (length + 1) / 2)


async def ask(engine: LocalEngine, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[Completion]]:
    """One request a prompt, all at once, each in its session: seconds, and what came."""
    started = time.perf_counter()
    how = [Sampling(tokens, seed=i) for i in range(len(prompts))]
    done = await asyncio.gather(
        *(engine.generate(ids, one, session=str(i)) for i, (ids, one) in enumerate(zip(prompts, how, strict=True)))
    )
    return time.perf_counter() - started, done


async def one_round(engine: LocalEngine, batch: int, length: int, tokens: int, seed: int) -> dict[str, float]:
    """Seconds of prefill, decode and a group."""
    draw = np.random.default_rng(seed)
    prompts = draw.integers(0, engine.config.vocab_size, (batch, length)).tolist()

    async def release() -> None:
        await asyncio.gather(*(engine.release(str(i)) for i in range(batch)))

    prefill, first = await ask(engine, prompts, 1)
    before = engine.stats()
    decode, _ = await ask(engine, [[*ids, *c.ids.tolist()] for ids, c in zip(prompts, first, strict=True)], tokens)
    after = engine.stats()
    await release()
    if after["prefill_tokens"] != before["prefill_tokens"] or after["decode_steps"] - before["decode_steps"] != tokens:
        raise RuntimeError(f"a decode round did something else: {before} {after}")
    group, _ = await ask(engine, [draw.integers(0, engine.config.vocab_size, length).tolist()] * batch, 1)
    await release()
    return {"prefill": prefill, "decode": decode, "group": group}


def measure(
    params: qwen.Params,
    config: ModelConfig,
    machine: Machine,
    *,
    batch: int,
    length: int,
    tokens: int,
    rounds: int,
    weights: str = "same",
) -> dict[str, float]:
    """One line: medians over rounds, after one that is not counted; ratios with their lowest and highest."""
    sizes: dict[str, Any] = {"slots": batch, "max_length": length + tokens + 1, "decode_chunk": min(16, tokens)}
    engine = LocalEngine(params, config, **sizes, weights=weights)
    engine.warmup()
    must = weight_bytes(params, config, weights) + cache_bytes(config, batch * (length + (tokens + 1) / 2))
    rows = []
    for number in range(rounds + 1):
        took = asyncio.run(one_round(engine, batch, length, tokens, number))
        rows.append(
            {
                "decode tokens/s": batch * tokens / took["decode"],
                "bandwidth GB/s": (bandwidth := machine.read()) / 1e9,
                "bound tokens/s": batch * bandwidth / must,
                "of the bound": tokens * must / took["decode"] / bandwidth,
                "prefill tokens/s": batch * length / took["prefill"],
                "matmul Gflop/s": (rate := machine.multiply()) / 1e9,
                "of the matmul rate": batch * prefill_flops(config, length) / took["prefill"] / rate,
            }
            | ({"group / apart": took["group"] / took["prefill"]} if batch > 1 else {})
        )
    engine.close()
    rows = rows[1:]
    line = harness.medians(rows)
    ratios = [row["of the bound"] for row in rows]
    spread = {"lowest of the bound": min(ratios), "highest of the bound": max(ratios)}
    return {"batch": batch, "length": length, "GB per step": must / 1e9, **line, **spread}


def main(arguments: list[str]) -> None:
    """The command."""
    parser = harness.parser("decode", __doc__, rounds=5)
    parser.add_argument("--model", default="small", choices=MODELS, help="a shape; the weights are random")
    parser.add_argument("--dtype", default="", help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--weights", default="same", choices=("same", "int8"), help="as rollout.weights")
    parser.add_argument("--layers", type=int, default=0, help="number of layers instead of all")
    parser.add_argument("--batches", default="1,8", help="parallel requests")
    parser.add_argument("--lengths", default="128,1024", help="tokens in the cache")
    parser.add_argument("--tokens", type=int, default=64, help="decoded per request and round")
    options = parser.parse_args(arguments)
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config = ModelConfig(**MODELS[options.model], compute_dtype=dtype)
    if options.layers:
        config = dataclasses.replace(config, num_layers=options.layers)
    params, machine = jax.block_until_ready(random_params(config)), open_machine(dtype)
    read = weight_bytes(params, config, options.weights) / 1e9
    print(f"{options.model}, {dtype}, {read:.3f} GB of weights per step; {jax.devices()[0].device_kind}")
    report = harness.Report("decode", arguments)
    sizes: dict[str, Any] = {"tokens": options.tokens, "rounds": options.rounds, "weights": options.weights}
    for batch in map(int, options.batches.split(",")):
        for length in map(int, options.lengths.split(",")):
            report.add(**measure(params, config, machine, batch=batch, length=length, **sizes))
    report.save(options.out)
