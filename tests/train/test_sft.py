"""The loop of the warm start, around a step that only records its batches."""

import types

import numpy as np

from open_agentrl_jax.config import Packing
from open_agentrl_jax.train.packing import Example
from open_agentrl_jax.train.sft import train_sft


def test_each_step_takes_the_cheapest_row_length():
    """As in RL: `packing.more_lengths` serves both phases."""
    sizes = [95, 95, 95, 95, 40, 40, 40, 40]
    examples = [Example(np.ones(n, np.int32), np.ones(n, bool)) for n in sizes]
    shapes, written = [], []

    def step(state, batch, used):
        shapes.append((batch.tokens.shape, int(used)))
        return state, {"actor/tokens": 1.0, "actor/loss": 0.0}

    quiet = lambda *_: None  # noqa: E731
    run = types.SimpleNamespace(
        mark=quiet,
        bar=quiet,
        save=quiet,
        every=100,
        writer=types.SimpleNamespace(metrics=lambda step, phase, values: written.append(values["packing/useful"])),
        stopper=types.SimpleNamespace(agree=quiet, asked=False),
        checkpoints=types.SimpleNamespace(wait=quiet),
    )
    train_sft(
        None, step, examples, run, steps=2, batch_size=4, packing=Packing(2, 100, (190,)), place=lambda batch: batch,
        rates=np.zeros(2),
    )  # fmt: skip
    assert shapes == [((2, 2, 190), 1), ((2, 2, 100), 1)]
    assert written == [4 * 94 / 380, 4 * 39 / 200]
