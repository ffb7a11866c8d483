"""LoRA: the trained adapters and the frozen weights beside them, as two trees that together are the parameters.

Only the adapters have gradients, moments and checkpoints. The frozen tree is in the compute dtype, or its layers'
matrices in 8 bits. models/params.py lists both; a policy without adapters has no frozen tree (None), and everything is
trained.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from open_agentrl_jax.models import int8, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.params import LORA_A, LORA_B, SCALE, TABLE, Params, abstract_params, is_adapter
from open_agentrl_jax.parallel.mesh import current_mesh
from open_agentrl_jax.types import UserError

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def split(params: Params) -> tuple[Params, Params]:
    """(frozen, adapters) of a whole tree; works for arrays, abstract values and shardings."""
    layers: Params = params["layers"]
    adapters = {name: w for name, w in layers.items() if is_adapter(name)}
    frozen = {name: w for name, w in layers.items() if name not in adapters}
    return dict(params, layers=frozen), {"layers": adapters}


def join(frozen: Params | None, trained: Params) -> Params:
    """The whole tree of a policy."""
    if frozen is None:
        return trained
    return dict(frozen, layers=frozen["layers"] | trained["layers"])


def without(model_config: ModelConfig) -> ModelConfig:
    """The config of the merged model."""
    return dataclasses.replace(model_config, lora=None)


def check(model_config: ModelConfig) -> None:
    """Raises a UserError for targets that no matrix of the model has, and for a model without any."""
    lora = model_config.lora
    assert lora is not None
    found = sorted(
        {
            row.name.rsplit(".", 2)[-2]
            for path, row in TABLE.items()
            if path + LORA_A in TABLE and row.when(model_config)
        }
    )
    for target in lora.targets:
        if target not in found:
            raise UserError(f"model.lora.targets: {target}: no such matrix; choose of {', '.join(found)}")


def init(model_config: ModelConfig, seed: int, mesh: Mesh | None = None) -> Params:
    """New adapters, float32: A random, B zero, so that the policy equals the base."""
    places = () if mesh is None else (split(qwen.param_shardings(model_config, mesh))[1],)
    return qwen.draw(model_config, seed, split(abstract_params(model_config))[1], *places)


def abstract(model_config: ModelConfig) -> tuple[Params | None, Params]:
    """(frozen, trained) as ShapeDtypeStructs; without adapters, frozen is None."""
    whole = abstract_params(model_config)
    if model_config.lora is None:
        return None, whole
    frozen, adapters = split(whole)

    def stored(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        quantized = name + SCALE in frozen["layers"]
        return jax.ShapeDtypeStruct(leaf.shape, jnp.int8 if quantized else model_config.compute_dtype)

    layers = {name: stored(name, leaf) for name, leaf in frozen["layers"].items()}
    rest = {name: stored(name, leaf) for name, leaf in frozen.items() if name != "layers"}
    return rest | {"layers": layers}, adapters


def freeze(params: Params, model_config: ModelConfig) -> Params:
    """The frozen tree of base parameters, which are in the compute dtype: as they are, or their layers in 8 bits."""
    if model_config.lora is None or not model_config.lora.int8:
        return params
    return dict(params, layers=int8.quantize_layers(params["layers"]))


def merge(params: Params, model_config: ModelConfig) -> Params:
    """A copy of the base parameters with the adapters added, see `merged_matrix`; the other parameters are shared."""
    if model_config.lora is None:
        return params
    layers: Params = {}
    for name, stack in params["layers"].items():
        if is_merged(params, name):
            layers[name] = jnp.stack([merged_matrix(params, model_config, name, i) for i in range(len(stack))])
        elif not (is_adapter(name) or name.endswith(SCALE)):
            layers[name] = stack
    return dict(params, layers=layers)


def is_merged(params: Params, name: str) -> bool:
    """Whether a parameter of the layers differs from the one of the merged model."""
    return any(name + suffix in params["layers"] for suffix in (LORA_A, SCALE))


def merged_matrix(params: Params, model_config: ModelConfig, name: str, layer: int) -> jax.Array:
    """One matrix [in out] of a layer with its adapter added in float32, then rounded to the compute dtype.

    One compiled function computes it for exports, published files and merged copies, so their bits agree.
    """
    assert model_config.lora is not None
    parts = [params["layers"].get(name + suffix) for suffix in ("", LORA_A, LORA_B, SCALE)]
    return _merged(*parts, layer, factor=model_config.lora.scale, dtype=model_config.compute_dtype)


@functools.partial(jax.jit, static_argnames=("factor", "dtype"))
def _merged(
    w: jax.Array,
    a: jax.Array | None,
    b: jax.Array | None,
    scale: jax.Array | None,
    layer: Any,
    *,
    factor: float,
    dtype: str,
) -> jax.Array:
    def one(stack: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)

    matrix = one(w)
    meshed = current_mesh() is not None
    spec: Any = jax.typeof(matrix).sharding.spec if meshed else None
    total = matrix.astype(jnp.float32)
    if scale is not None:
        total = total * one(scale).astype(jnp.float32)
    if a is not None and b is not None:
        low, high = one(a).astype(jnp.float32), one(b).astype(jnp.float32)
        if meshed:
            low, high = jax.reshard(low, jax.P(spec[0], None)), jax.reshard(high, jax.P(spec[1], None))
        added = jnp.einsum("ir,or->io", low, high, precision="highest", out_sharding=spec)
        total = total + factor * added
    return total.astype(dtype)
