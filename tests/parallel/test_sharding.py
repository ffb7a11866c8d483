import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from open_agentrl_jax.models import params, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.parallel.mesh import AXES
from open_agentrl_jax.types import UserError
from tests.devices import fake

P = jax.P


def _mesh(*sizes):
    sizes += (1,) * (len(AXES) - len(sizes))
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _config(**changes):
    return ModelConfig(
        **{
            "model_type": "qwen3",
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 32,
        }
        | changes
    )


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2"}, {"model_type": "llama", "attention_bias": True}])
def test_modules_and_table_agree(changes):
    config = _config(**changes)
    made = jax.eval_shape(lambda: nnx.to_pure_dict(nnx.state(qwen.Qwen(config, nnx.Rngs(0)))))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params.abstract_params(config)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(made):
        assert len(params.spec(sharding.path_name(path))) == leaf.ndim


def test_moments_lie_like_their_parameters():
    tree = {"opt_state": ({"mu": {"layers": {"q": jax.ShapeDtypeStruct((2, 64, 128), jnp.float32)}}},)}
    tree["count"] = jax.ShapeDtypeStruct((), jnp.int32)
    found = params.shardings(tree, _mesh(1, 4, 1, 2))
    assert found["opt_state"][0]["mu"]["layers"]["q"].spec == P(None, ("fsdp", "seq", "expert"), "tensor")
    assert found["count"].spec == P()


def test_what_it_does_not_know_is_refused():
    with pytest.raises(UserError, match="layers/adapter: unknown parameter"):
        params.shardings({"layers": {"adapter": jnp.zeros((2, 2))}}, _mesh(1, 1, 1, 1))


@pytest.mark.parametrize(
    ("changes", "sizes", "named"),
    [
        ({"vocab_size": 97}, (1, 8, 1, 1), "embed: axis 0 of (97, 64) is 97, which does not divide by fsdp=8"),
        ({"intermediate_size": 36}, (1, 4, 1, 2), "layers/down: axis 1 of (2, 36, 64) is 36"),
        ({}, (1, 2, 1, 4), "tensor=4 does not divide num_kv_heads 2"),
    ],
)
def test_what_does_not_divide_is_refused(changes, sizes, named):
    with pytest.raises(UserError) as raised:
        qwen.param_shardings(_config(**changes), _mesh(*sizes))
    assert named in str(raised.value)
    assert "choose" in str(raised.value)


def test_a_rank_the_table_does_not_have_is_refused():
    with pytest.raises(UserError, match="embed: shape"):
        params.shardings({"embed": jnp.zeros(4)}, _mesh(1, 1, 1, 1))


def test_any_mix_of_axes_gives_the_loss_and_gradients_of_one_device():
    program = pathlib.Path(__file__).with_name("eight_devices.py")
    done = subprocess.run([sys.executable, program], env=os.environ | fake(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["cases"]) == 9
    for case in result["cases"]:
        assert np.isfinite(case["value"]), case
        assert case["loss"] < 1e-5, case
        assert case["gradient"] < 1e-5, case
        assert case["sharded_like_parameters"], case
    assert result["init"] < 1e-6 and result["logits"] < 1e-5
    assert result["reductions"]["float32"] < 1e-6 < 1e-4 < result["reductions"]["compute"]
