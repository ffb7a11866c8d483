"""One optimizer update (forward, backward, AdamW) here, in transformers on torch, and in Tunix, on the same sequences.

    python -m launch.benchmark train --tunix_python=path/of/python

Every side is a process that keeps its compiled step; rounds alternate between the sides. The model is a Qwen3 of 4
layers, width 128, vocabulary 512, in float32. "8x512" is eight sequences of 512 tokens. "agentic" is 24 sequences of
log-normal length, mean 4,096, cap 23,040, and "mix" the same at an eighth of the size: packed into rows here, padded to
the longest of each micro-batch of 4 in torch (as its collator does), padded to the cap in Tunix (as its SFT trainer
does; its RL trainer packs). Tunix (PyPI google-tunix) needs its own environment, and holds the scores of whole rows:
8.5 GB per row and layer for "agentic", which is therefore left out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import harness

MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
}
HIDDEN, THETA, EPS = 384, 1e6, 1e-6
MIXES = {"mix": (24, 512, 2880), "agentic": (24, 4096, 23040)}  # sequences, mean length, cap
ROWS = 4  # per padded micro-batch of a mix
RATE, DECAY = 1e-4, 0.01


def sequences(shape: str) -> list[np.ndarray]:
    """The token sequences of a shape such as "8x512", or of a mix."""
    from open_agentrl_jax.planning import workload

    if shape in MIXES:
        count, mean, cap = MIXES[shape]
        sizes = workload.lengths(count, mean=mean, cap=cap)
    else:
        count, length = map(int, shape.split("x"))
        sizes = np.full(count, length)
    rng = np.random.default_rng(0)
    return [rng.integers(1, MODEL["vocab_size"], size).astype(np.int32) for size in sizes]


def ours(shape: str) -> Callable[[], Any]:
    """This project's step."""
    import jax

    from open_agentrl_jax.config import Optim
    from open_agentrl_jax.models import qwen
    from open_agentrl_jax.models.config import ModelConfig
    from open_agentrl_jax.train import state as states
    from open_agentrl_jax.train.optimizer import make_optimizer
    from open_agentrl_jax.train.packing import Example, pack
    from open_agentrl_jax.train.step import likelihood, make_step

    model = ModelConfig(
        "qwen3", intermediate_size=HIDDEN, rope_theta=THETA, rms_norm_eps=EPS, tie_word_embeddings=True, **MODEL
    )
    examples = [Example(ids, np.ones(len(ids), bool)) for ids in sequences(shape)]
    longest = MIXES[shape][2] if shape in MIXES else len(examples[0].tokens) - 1
    batch, used = pack(examples, rows=1 if shape in MIXES else len(examples), length=longest)
    optimizer = make_optimizer(Optim(lr=RATE, weight_decay=DECAY), 1000)
    step = make_step(model, optimizer, likelihood)
    holder = [states.create(qwen.init(model, 0), optimizer)]
    batch = jax.tree.map(jax.numpy.asarray, batch)

    def run() -> None:
        holder[0], _ = jax.block_until_ready(step(holder[0], batch, jax.numpy.int32(used)))

    return run


def padded(shape: str, *, to_cap: bool) -> list[np.ndarray]:
    """Micro-batches [b t] of the sequences, padded with -1 to their longest, or to the cap."""
    rows = sequences(shape)
    size, cap = (ROWS, MIXES[shape][2]) if shape in MIXES else (len(rows), 0)
    batches = []
    for part in (rows[i : i + size] for i in range(0, len(rows), size)):
        batch = np.full((len(part), cap if to_cap and cap else max(map(len, part))), -1, np.int32)
        for row, ids in zip(batch, part, strict=True):
            row[: len(ids)] = ids
        batches.append(batch)
    return batches


def in_torch(shape: str) -> Callable[[], Any]:
    """transformers' Qwen3ForCausalLM with scaled-dot-product attention, and torch's fused AdamW."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        vocab_size=MODEL["vocab_size"],
        hidden_size=MODEL["hidden_size"],
        intermediate_size=HIDDEN,
        num_hidden_layers=MODEL["num_layers"],
        num_attention_heads=MODEL["num_heads"],
        num_key_value_heads=MODEL["num_kv_heads"],
        head_dim=MODEL["head_dim"],
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(Qwen3Config(**settings)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    batches = [torch.from_numpy(batch).long() for batch in padded(shape, to_cap=False)]
    total = sum(int((batch[:, 1:] >= 0).sum()) for batch in batches)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            real = batch >= 0
            mask = None if bool(real.all()) else real.long()  # without one, sdpa takes its causal path
            logits = model(input_ids=batch.clamp(min=0), attention_mask=mask, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-1, reduction="sum"
            )
            (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def in_tunix(shape: str) -> Callable[[], Any]:
    """Tunix' Qwen3 with its own masks, compiled as one donated step; optax's AdamW."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3  # pyright: ignore[reportMissingImports]
    from tunix.sft import utils  # pyright: ignore[reportMissingImports]

    config = qwen3.ModelConfig(
        num_layers=MODEL["num_layers"],
        vocab_size=MODEL["vocab_size"],
        embed_dim=MODEL["hidden_size"],
        hidden_dim=HIDDEN,
        num_heads=MODEL["num_heads"],
        head_dim=MODEL["head_dim"],
        num_kv_heads=MODEL["num_kv_heads"],
        rope_theta=int(THETA),
        norm_eps=EPS,
        use_tied_embedding=True,
    )
    graph, params = nnx.split(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=DECAY))
    holder = [params, optimizer.init(params)]
    batches = [jnp.asarray(batch) for batch in padded(shape, to_cap=True)]
    total = sum(int((batch[:, 1:] >= 0).sum()) for batch in batches)

    def loss_of(params: Any, batch: jax.Array) -> jax.Array:
        real = batch >= 0
        mask, positions = utils.make_causal_attn_mask(real), utils.build_positions_from_mask(real)
        logits, _ = nnx.merge(graph, params)(jnp.maximum(batch, 0), positions, None, mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.maximum(batch[:, 1:], 0))
        return jnp.where(real[:, 1:], losses, 0).sum() / total

    @functools.partial(jax.jit, donate_argnums=0)
    def accumulate(gradient: Any, params: Any, batch: jax.Array) -> Any:
        return jax.tree.map(jnp.add, gradient, jax.grad(loss_of)(params, batch))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def run() -> None:
        gradient = jax.tree.map(jnp.zeros_like, holder[0])
        for batch in batches:
            gradient = accumulate(gradient, holder[0], batch)
        holder[:] = jax.block_until_ready(update(*holder, gradient))

    return run


SIDES = {"ours": ours, "torch": in_torch, "tunix": in_tunix}


def measure(shape: str, pythons: dict[str, str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's updates, in turn."""
    commands = {side: [python, "-m", "benchmarks.train", "--worker", side, shape] for side, python in pythons.items()}
    with harness.workers(commands) as sides:
        return harness.in_turn(sides, rounds, warmup=0)


def main(arguments: list[str]) -> None:
    """The command."""
    parser = harness.parser("train", __doc__, rounds=7)
    parser.add_argument("--shapes", default="8x512,2x2048,mix")
    parser.add_argument("--tunix_python", default="", help="interpreter of an environment with google-tunix")
    options = parser.parse_args(arguments)
    pythons = {"ours": sys.executable, "torch": sys.executable}
    if options.tunix_python:
        pythons["tunix"] = options.tunix_python
    report = harness.Report("train", arguments)
    for shape in options.shapes.split(","):
        useful = sum(map(len, sequences(shape)))
        sides = {side: python for side, python in pythons.items() if (side, shape) != ("tunix", "agentic")}
        measured = {side: harness.spread(values) for side, values in measure(shape, sides, options.rounds).items()}
        for side, row in measured.items():
            rates = {"tokens/s": useful / row["seconds"], "of ours": row["seconds"] / measured["ours"]["seconds"]}
            report.add(shape=shape, side=side, **row, **rates)
    report.save(options.out)


if __name__ == "__main__":
    _, _, side, shape = sys.argv
    harness.serve(SIDES[side](shape))
