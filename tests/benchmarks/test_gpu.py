"""The parts of the GPU benchmark, tiny and on a CPU, so that the command is known to work before there is a GPU."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import gpu as module
from benchmarks import gpu_torch as in_torch
from benchmarks import harness

TINY = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
TINY |= {"num_kv_heads": 2, "head_dim": 8, "vocab_size": 64, "rope_theta": 1e4, "tie_word_embeddings": True}


@pytest.fixture
def work(monkeypatch):
    monkeypatch.setitem(module.SHAPES, "tiny", TINY)
    return module.Work(model="tiny", length=64, sequences=4, long=96, rounds=1)


def test_without_a_gpu_the_error_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "launch.benchmark", "gpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: launch.benchmark gpu: JAX finds no GPU here")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.timeout(600)
@pytest.mark.slow  # it compiles two whole updates
def test_the_parts_run(work):
    (row,) = module.attention_part(work, small=True)
    assert row["side"] == "blockwise"
    assert row["error"] < 0.02  # bfloat16
    square, layer = module.matmul_part(work, size=64)
    assert square["tflops"] > 0
    assert layer["side"] == "layer"
    (ours,) = module.train_part(work)
    assert ours["tokens/s"] == pytest.approx(work.useful / ours["seconds"])
    (fits,) = module.fits_part(work)
    assert fits["finite"]
    first, second = module.measured("train", [ours, {"side": "x", "failed": "why"}], 1e12, work)
    assert first["of matmul rate"] == pytest.approx(module.model_flops(work) / ours["seconds"] / 1e12)
    assert second == {"part": "train", "side": "x", "failed": "why"}


def test_torch_trains_on_the_same_tokens(work):
    (row,) = in_torch.train_part(work, "sdpa")
    assert row["rows"] == work.sequences
    assert row["tokens/s"] == pytest.approx(work.useful / row["seconds"])
    together = np.sort(np.concatenate([ids for members in in_torch.packed(work) for ids in members]))
    np.testing.assert_array_equal(together, np.sort(np.concatenate(work.rows)))


def test_torch_gets_the_ends_of_packed_sequences(work, monkeypatch):
    import torch

    seen = []

    def instead(q, k, v, ends, longest):  # the kernel is for GPUs alone
        seen.append((ends.tolist(), longest))
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
            ).transpose(0, 1)
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat(parts)

    monkeypatch.setattr(in_torch, "varlen", instead)
    (row,) = in_torch.train_part(work, "varlen")
    assert row["rows"] == len(in_torch.packed(work)) < work.sequences
    for ends, longest in seen:
        assert ends[0] == 0
        assert max(np.diff(ends)) == longest


def test_operations_are_those_of_the_pairs_that_see_each_other(work):
    segments = np.array([1, 1, 1, 2, 2, 0])
    pairs = 6 + 3
    assert module.attention_flops(segments, work) == 7 * 2 * pairs * 4 * 8
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 64 * 32
    exact = 6 * matrices * work.useful + 12 * sum(len(r) * (len(r) - 1) / 2 for r in work.rows) * 4 * 8 * 2
    assert module.model_flops(work) == pytest.approx(exact)


def test_a_side_that_fails_is_a_row_with_its_error():
    (row,) = harness.in_process("benchmarks.gpu", ["nothing", "{}"], environment={})
    assert row["side"] == "gpu nothing"
    assert "nothing" in row["failed"]
