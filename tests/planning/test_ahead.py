"""What is planned and counted before a step is compiled."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.qwen3_4b_grpo_tcr import get_config
from open_agentrl_jax.planning import ahead, chips, memory, topologies, workload
from open_agentrl_jax.planning.shapes import SHAPES, shape_of
from open_agentrl_jax.types import UserError


def test_without_the_model_its_shape_comes_from_the_config_name():
    config = get_config()
    model = shape_of(config)
    assert (model.hidden_size, model.num_layers, model.num_kv_heads) == (2560, 36, 8)
    assert (model.compute_dtype, model.remat) == ("bfloat16", "full")
    assert shape_of(config, layers=2).num_layers == 2
    config.name = "other"
    with pytest.raises(UserError, match=f"starts with one of {', '.join(SHAPES)}$"):
        shape_of(config)


def test_adapters_are_planned_beside_frozen_weights():
    config = get_config()
    config.model.lora.rank, config.packing.rows = 32, 1
    made = ahead.plan(config, jax.devices()[:1], layers=2)
    state, frozen = made.arguments[0], made.arguments[3]
    weights = sum(x.size for x in jax.tree.leaves(frozen))
    assert ahead.bytes_of(frozen) == 2 * weights  # bfloat16
    assert 0 < ahead.bytes_of(state.params) < 0.02 * 4 * weights
    entries = {entry.name: entry.bytes for entry in memory.table(config, made.model, None)}
    assert entries["frozen weights"] == 2 * weights
    assert entries["gradients"] == entries["adapters (float32)"] == ahead.bytes_of(state.params)
    config.model.lora.base = "int8"
    smaller = ahead.plan(config, jax.devices()[:1], layers=2).arguments[3]
    assert ahead.bytes_of(smaller) < ahead.bytes_of(frozen)


def test_attention_cost_follows_the_packed_sequences():
    shares = ahead.attention_shares(23040, 4, 640)
    assert shares["exact"] < shares["packed"] < shares["causal"]
    assert shares["packed"] < shares["slowest"]  # the part at the row's end does more than the mean


@pytest.mark.parametrize(
    ("part", "topology"), [(2880, "h100:8"), (23040, "h200:1"), (23040, "v5p:2x2x1"), (2880, "v5e:8x8")]
)
def test_attention_blocks_divide_the_part_of_a_row(part, topology):
    """Rows of 23,040 tokens in 8 parts on GPUs: 128 does not divide 2,880, which raised a ValueError."""
    block = ahead.attention_block(part, chips.chip(topology))
    assert part % block == 0
    assert ahead.attention_shares(part * 8, 8, block)["slowest"] > 0


def test_agentic_lengths_have_the_requested_mean_and_cap():
    sizes = workload.lengths(20000)
    assert 3900 < sizes.mean() < 4150
    assert sizes.max() == 23040
    batch, used = workload.packed(sizes[:200], rows=2, length=23040)
    assert batch.segment_ids[:used].astype(bool).sum() == sizes[:200].sum()


def test_several_row_lengths_fill_256_devices():
    """A mini-batch of 256 trajectories on 32 row groups of 8 devices; one length leaves a nearly empty micro-batch."""
    fixed = workload.utilization(256, rows=32, lengths=(23040,))
    chosen = workload.utilization(256, rows=32, lengths=(23040, 28800, 34560, 40320), longest=23040)
    assert fixed < 0.75
    assert chosen >= 0.9


@dataclasses.dataclass
class Memory:
    """As a compiler reports it, with `on_host` among the arguments (GPU) or apart (TPU)."""

    argument_size_in_bytes: int
    host_argument_size_in_bytes: int
    peak_memory_in_bytes: int
    temp_size_in_bytes: int = 50
    output_size_in_bytes: int = 80
    alias_size_in_bytes: int = 80
    generated_code_size_in_bytes: int = 0
    host_temp_size_in_bytes: int = 0

    def memory_analysis(self):
        return self


@pytest.mark.parametrize("compiled", [Memory(80, 0, 130), Memory(16, 64, 130)], ids=["gpu", "tpu"])
def test_host_memory_is_not_counted_as_the_devices(compiled):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = [
        jax.ShapeDtypeStruct((n,), np.float32, sharding=s)
        for n, s in ((4, here), (16, here.with_memory_kind("pinned_host")))
    ]
    state = dataclasses.make_dataclass("State", ["params", "opt_state"])(arrays[:1], arrays[1:])
    jax.tree_util.register_dataclass(type(state), ["params", "opt_state"], [])
    made = ahead.StepPlan(None, None, None, (state, [], None, []), 1, 1, 1, 1)  # type: ignore[arg-type]
    sizes = ahead.memory_of(made, compiled)
    assert (sizes["arguments"], sizes["host"]) == (16, 64)
    assert sizes["peak"] == sizes["total"] == 66


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h100:none", "give the number of GPUs"),
        ("2xh100:8", "give the number of GPUs in one machine"),
        ("b9:8", "unknown kind 'b9'"),
        ("", "unknown kind ''"),
    ],
)
def test_an_unknown_topology_is_refused(topology, message):
    with pytest.raises(UserError, match=message):
        topologies.devices(topology)


def test_topology_names():
    assert chips.split("2xv5e:4x4") == (2, "v5e", "4x4")
    assert chips.split("h100:8") == (1, "h100", "8")


def test_the_packing_that_is_advised_fills_256_devices():
    """A row holds the longest sequence whole, so many rows with few parts each stay nearly empty."""
    for seq in (1, 2, 4):
        now = workload.utilization(256, rows=256 // seq, lengths=(23040,))
        useful, advised, more = workload.better_packing(256, groups=256 // seq, seq=seq, length=23040, longest=23040)
        assert now < 0.7 and useful >= 0.9 and advised == 8 and len(more) == 3
    assert workload.better_packing(256, groups=1, seq=8, length=23040, longest=23040) is None
