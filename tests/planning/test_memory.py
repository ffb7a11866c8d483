"""The memory table against compiled programs, and the refusal that names a field."""

import types

import jax
import pytest

from configs import qwen2_5_7b_grpo_tcr, qwen3_4b_grpo_tcr
from open_agentrl_jax.config import Config
from open_agentrl_jax.planning import memory
from open_agentrl_jax.planning.shapes import shape_of
from open_agentrl_jax.types import UserError

GIB = 2**30


def mesh(platform="tpu", **sizes):
    device = types.SimpleNamespace(platform=platform)
    shape = {"data": 1, "fsdp": 1, "seq": 1, "tensor": 1, "expert": 1} | sizes
    return types.SimpleNamespace(shape=shape, devices=types.SimpleNamespace(flat=[device]))


# (peak - arguments - gradients) of docs/measurements.md, GiB per device.
@pytest.mark.parametrize(
    ("module", "sizes", "remat", "compiled"),
    [
        (qwen3_4b_grpo_tcr, {"fsdp": 4}, "full", 23.07 - 11.29 - 3.76),
        (qwen3_4b_grpo_tcr, {"fsdp": 4}, "attention", 29.79 - 11.29 - 3.76),
        (qwen3_4b_grpo_tcr, {"fsdp": 4}, "dots", 66.12 - 11.29 - 3.76),
        (qwen3_4b_grpo_tcr, {"fsdp": 2, "seq": 2}, "full", 18.99 - 11.29 - 3.76),
        (qwen3_4b_grpo_tcr, {"fsdp": 16, "seq": 4}, "full", 3.17 - 0.71 - 0.24),
        (qwen2_5_7b_grpo_tcr, {"fsdp": 4}, "full", 37.42 - 21.33 - 7.11),
        (qwen2_5_7b_grpo_tcr, {"fsdp": 16, "seq": 4}, "full", 4.44 - 1.34 - 0.45),
    ],
)
def test_activations_are_those_of_the_compiled_programs(module, sizes, remat, compiled):
    config = module.get_config()
    config.model.remat, config.packing.rows = remat, 0
    estimate = memory.activations(config, shape_of(config), mesh(**sizes)) / GIB
    assert estimate == pytest.approx(compiled, rel=0.25)


def test_the_engine_cache_of_a_4b_model():
    """3.4 GiB per slot of 23,040 tokens: the default 64 slots need 216 GiB."""
    config = qwen3_4b_grpo_tcr.get_config()
    config.rollout.slots = 64
    cache, slots = memory.engine_cache(config, shape_of(config), None)
    assert slots == 64
    assert cache >= 64 * 36 * 2 * 8 * 128 * 2 * 23040
    on_mesh, slots = memory.engine_cache(config, shape_of(config), mesh(fsdp=8, tensor=2))
    assert (on_mesh, slots) == (cache // 16, 64)


def test_what_cannot_fit_is_refused_with_the_field_to_change():
    config = qwen3_4b_grpo_tcr.get_config()
    config.rollout.engine, config.rollout.slots = "local", 64
    entries = memory.table(config, shape_of(config), None)
    assert [entry.name for entry in entries][:3] == ["weights (float32)", "optimizer", "gradients"]
    assert entries[1].bytes == pytest.approx(2 * entries[0].bytes, abs=64)
    with pytest.raises(UserError, match=r"reduce engine cache \(64 slots\) by rollout\.slots=\d+"):
        memory.check(entries, 139 * GIB)
    memory.check(entries, 2000 * GIB)
    memory.check(entries, 0)  # the device does not report its memory


def test_offloaded_moments_are_not_on_the_device():
    config = Config(name="qwen3_4b")
    config.rl.steps, config.rl.optim.offload, config.rollout.engine = 1, True, "sglang"
    entries = {entry.name: entry for entry in memory.table(config, shape_of(config, layers=2), None)}
    assert entries["optimizer"].bytes < 1024
    assert entries["publishing (largest matrix)"].bytes == 151936 * 2560 * 2


def test_the_suggested_slots_fit():
    entries = [memory.Entry("weights", 10, "x"), memory.Entry("engine cache (8 slots)", 80, "rollout.slots")]
    with pytest.raises(UserError, match=r"rollout\.slots=4"):
        memory.check(entries, 50)


def test_the_machine_has_memory():
    assert memory.device_bytes() * jax.local_device_count() > GIB
