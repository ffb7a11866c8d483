"""How processes divide a mini-batch: each fills the rows of its own devices, and nothing is lost or trained twice."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from open_agentrl_jax.train.packing import pack
from open_agentrl_jax.train.shares import Rows, balanced, micro_batches_of, unbalanced
from tests.devices import fake
from tests.train.two_hosts import CASES, examples, figure


def test_rows_are_handed_over_only_where_that_saves_a_micro_batch():
    rows = Rows((0, 1), (2, 2))
    for needed, kept, handed in [([4, 4], 2, 2), ([4, 3], 2, 2), ([6, 2], 3, 2), ([5, 0], 3, 2), ([0, 0], 0, 0)]:
        assert (unbalanced(np.array(needed), rows), balanced(np.array(needed), rows)) == (kept, handed)
    assert micro_batches_of([8, 5], rows) == 4
    assert micro_batches_of([8, 5], Rows((0, 1, 2, 3), (4, 4), shared=True)) == 4


@pytest.mark.timeout(240)
def test_two_processes_train_the_tokens_of_both(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    program = pathlib.Path(__file__).with_name("two_hosts.py")
    started = [
        subprocess.Popen(
            [sys.executable, program, str(rank), port, tmp_path],
            env=os.environ | fake(2) | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs[0][1][-3000:] + outputs[1][1][-3000:]
    lines = [[line.split("|") for line in out.splitlines() if "|" in line] for out, _ in outputs]
    assert lines[0] == lines[1] and [name for name, *_ in lines[0]] == list(CASES)
    used = [1, 4, 1, 1]  # "uneven" would need six if no row moved, "idle" two
    for (name, micro_batches, useful, value), expected in zip(lines[0], used, strict=True):
        lengths = CASES[name][0]
        everything = [example for rank in range(2) for example in examples(lengths[rank], rank)]
        whole, _ = pack(everything, rows=4, length=8)
        assert int(micro_batches) == expected, name
        assert float(value) == pytest.approx(float(figure(whole)), rel=1e-4), name
        tokens = sum(length - 1 for part in lengths for length in part)
        assert float(useful) == pytest.approx(tokens / (expected * 4 * 8), abs=1e-5)
    tokens = np.concatenate([e.tokens for rank in range(2) for e in examples(CASES[name][0][rank], rank)])
    for rank in range(2):
        assert np.load(tmp_path / f"{rank}.npy").tolist() == tokens.tolist()
