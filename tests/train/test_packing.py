import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_agentrl_jax.config import Config, Packing
from open_agentrl_jax.models.splash import block_size
from open_agentrl_jax.train.packing import (
    Example,
    choose_length,
    choose_packing,
    first_fit_decreasing,
    most_micro_batches,
    pack,
)
from open_agentrl_jax.train.shares import Rows, pack_share
from open_agentrl_jax.types import UserError


def examples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(1, 99, n).astype(np.int32),
            rng.random(n) < 0.5,
            float(rng.normal()),
            rng.normal(size=n).astype(np.float32),
        )
        for n in lengths
    ]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 33), min_size=1, max_size=40), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_token_is_there_once_with_its_streams(lengths, rows, seed):
    given_examples = examples(lengths, seed)
    batch, used = pack(given_examples, rows=rows, length=32, micro_batches=most_micro_batches(len(lengths), rows))
    assert used <= most_micro_batches(len(lengths), rows)
    assert not batch.segment_ids[used:].any()
    found = []
    for row in range(rows * batch.tokens.shape[0]):
        flat = {name: getattr(batch, name).reshape(-1, 32)[row] for name in vars(batch)}
        for segment in range(1, flat["segment_ids"].max() + 1):
            where = np.flatnonzero(flat["segment_ids"] == segment)
            assert (np.diff(where) == 1).all()
            assert flat["positions"][where].tolist() == list(range(len(where)))
            found.append(
                tuple(flat[n][where].tolist() for n in ("tokens", "targets", "mask", "rollout_logprobs", "advantages"))
            )
        assert not flat["mask"][flat["segment_ids"] == 0].any()
    expected = [
        (
            e.tokens[:-1].tolist(),
            e.tokens[1:].tolist(),
            e.mask[1:].tolist(),
            np.where(e.mask[1:], e.rollout_logprobs[1:], 0).tolist(),
            np.where(e.mask[1:], np.float32(e.advantage), 0).tolist(),
        )
        for e in given_examples
    ]
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_agentic_lengths_waste_less_than_three_percent():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(4000) - 0.5, 1.0, 1024), 64, 23040).astype(int).tolist()
    bins = first_fit_decreasing(lengths, 23040)
    assert sum(lengths) / (len(bins) * 23040) >= 0.97


def test_a_sequence_that_fits_no_row_is_refused():
    with pytest.raises(ValueError, match="33 tokens does not fit a row of 32"):
        first_fit_decreasing([33], 32)
    with pytest.raises(ValueError, match="fewer than 2"):
        pack(examples([1]), rows=1, length=8)
    with pytest.raises(ValueError, match="do not fit the 1"):
        pack(examples([8, 8, 8]), rows=1, length=8, micro_batches=1)


def test_the_cheapest_row_length_is_taken():
    # 46 full rows on 32 row groups: two micro-batches of 32 rows, or one of rows that are half as long again.
    assert choose_length([23040] * 46, rows=32, lengths=(23040,)) == (23040, 2)
    assert choose_length([11520] * 92, rows=32, lengths=(23040, 34560)) == (34560, 1)
    assert choose_length([100] * 8, rows=8, lengths=(512, 128)) == (128, 1)
    assert choose_length([100, 300], rows=2, lengths=(512, 128)) == (512, 1)  # 128 cannot hold 300
    assert choose_length([], rows=2, lengths=(512,)) == (512, 0)


def test_a_mini_batch_has_one_of_the_row_lengths_and_every_token():
    batch, used, useful = pack_share(examples([90] * 6), Packing(2, 100, (270,)), Rows((0, 1), (2,)), micro_batches=4)
    assert batch.tokens.shape == (4, 2, 270)
    assert (used, (batch.segment_ids > 0).sum()) == (1, 6 * 89)
    assert useful == batch.useful


def mesh(platform="cpu", **sizes):
    """What `choose_packing` reads of a mesh."""
    devices = np.array([types.SimpleNamespace(platform=platform)], object)
    return types.SimpleNamespace(
        shape={"data": 1, "fsdp": 1, "seq": 1, "tensor": 1, "expert": 1} | sizes, devices=devices
    )


@pytest.mark.parametrize(
    ("longest", "sizes", "expected"),
    [
        (2000 + 8000, {}, 10240),  # 10,000 is no multiple of 128: attention would silently be blockwise
        (2000 + 8000, {"seq": 4}, 10240),
        (2560 + 20480, {}, 23040),
        (2560 + 20480, {"seq": 8}, 23552),  # parts of 2,944 = 23 x 128
        (300, {"seq": 2}, 512),
    ],
)
def test_tpu_rows_are_rounded_up_to_what_its_attention_takes(longest, sizes, expected):
    on_tpu = choose_packing(Config(), longest, mesh("tpu", **sizes))
    parts = sizes.get("seq", 1)
    assert on_tpu.length == expected
    assert block_size(expected // parts)
    elsewhere = choose_packing(Config(), longest, mesh("gpu", **sizes))
    assert elsewhere.length == -(-longest // parts) * parts


def test_packing_follows_the_mesh():
    config = Config(packing=Packing(0, 1024, (2048,)))
    assert choose_packing(config, 1, mesh(data=2, fsdp=4)) == Packing(8, 1024, (2048,))
    config.packing = Packing(3, 1024)
    with pytest.raises(UserError, match=r"packing\.rows=3 does not divide by mesh data x fsdp x expert = 2"):
        choose_packing(config, 1, mesh(fsdp=2))
    config.packing = Packing(2, 1024, (1500,))
    with pytest.raises(UserError, match=r"packing\.length=1500 does not divide by mesh seq x tensor = 8"):
        choose_packing(config, 1, mesh(seq=4, tensor=2))
