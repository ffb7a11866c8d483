"""Decoders (Qwen2.5, Qwen3, Qwen3-MoE, Llama, Mistral): stacked layers under lax.scan, parameters a nested dictionary.

The parameters are float32 masters {"embed", "layers": {...}, "norm", "head"?}; models/params.py lists their shapes and
shardings. Each layer is cast to the compute dtype and gathered where it is used.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from open_agentrl_jax.models import experts
from open_agentrl_jax.models.attention import attention
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.linear import FROZEN, TRAINING, Way, take_in_float32
from open_agentrl_jax.models.params import LORA_A, LORA_B, SCALE, TABLE, Params, Row, abstract_params, rows, shardings
from open_agentrl_jax.models.rope import frequencies
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.types import UserError

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Watch = Callable[[experts.Routing], Any]  # what to keep of the routing of a layer

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Block(nnx.Module):
    """One layer: attention and gated MLP, each on a normalised copy and added to the residual stream."""

    attn_norm: nnx.Param
    mlp_norm: nnx.Param
    q_bias: nnx.Param
    k_bias: nnx.Param
    v_bias: nnx.Param
    o_bias: nnx.Param
    q_norm: nnx.Param
    k_norm: nnx.Param

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        for path, (row, shape) in rows(c).items():
            if path.startswith("layers/") and not path.endswith(SCALE):
                setattr(self, path.removeprefix("layers/"), _start(c, row, shape[1:], rngs))
        self.config = c

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        attend: Attend,
        cache: Any,
        way: Way = TRAINING,
        scales: Params | None = None,
        given: jax.Array | None = None,
    ):
        """x [b t d] -> (x [b t d], (what `attend` returned second, routing of a mixture)).

        `scales` are those of 8-bit matrices; `given` are choices of experts, see `experts.route`.
        """
        times = functools.partial(self._times, way, scales or {})
        q, k, v = self._heads(rms_norm(x, self.attn_norm[...], self.config.rms_norm_eps), rope, times, way)
        mixed, cache = attend(q, k, v, cache)
        mixed = mixed.reshape(*x.shape[:2], -1, out_sharding=sharding.out(way.layout.wide))
        mixed = times("o", mixed)
        if self.config.o_bias:
            mixed = (mixed + self.o_bias[...]).astype(x.dtype)
        x = x + mixed
        y = rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps)
        if not self.config.num_experts:
            return x + times("down", jax.nn.silu(times("gate", y)) * times("up", y)), (cache, None)
        names = ("router", "expert_gate", "expert_up", "expert_down")
        weights = experts.Weights(*(getattr(self, name)[...] for name in names))
        y, routing = experts.mixture(y, weights, self.config, way, given)
        return x + y, (cache, routing)

    def _times(self, way: Way, scales: Params, name: str, x: jax.Array) -> jax.Array:
        narrows = name in ("o", "down")
        y = (way.narrow if narrows else way.widen)(x, getattr(self, name)[...])
        if name in scales:
            y = (y * scales[name]).astype(x.dtype)
        if (a := getattr(self, name + LORA_A, None)) is not None and self.config.lora is not None:
            adapt = way.adapt_narrow if narrows else way.adapt_wide
            y = y + self.config.lora.scale * adapt(x, a[...], getattr(self, name + LORA_B)[...])
        return y

    def _heads(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], times: Callable[[str, jax.Array], jax.Array], way: Way
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.config
        q, k, v = (times(name, x) for name in ("q", "k", "v"))
        if c.qkv_bias:
            q, k, v = (y + bias[...] for y, bias in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias)))
        shape, spec = (*x.shape[:2], -1, c.head_dim), sharding.out(way.layout.heads)
        q, k, v = (y.astype(x.dtype).reshape(shape, out_sharding=spec) for y in (q, k, v))
        if c.qk_norm:
            q, k = rms_norm(q, self.q_norm[...], c.rms_norm_eps), rms_norm(k, self.k_norm[...], c.rms_norm_eps)
        return rotate(q, *rope), rotate(k, *rope), v


class Qwen(nnx.Module):
    """All parameters, layers stacked."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs):
        for path, (row, shape) in rows(c).items():
            if not path.startswith("layers/"):
                setattr(self, path, _start(c, row, shape, rngs))
        keys = jax.random.split(rngs.params(), c.num_layers)
        self.layers = nnx.data(jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(Block(c, nnx.Rngs(key)))))(keys))


def _start(c: ModelConfig, row: Row, shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    if row.start == "normal":
        return nnx.Param(c.initializer_range * jax.random.normal(rngs.params(), shape))
    if row.start == "uniform":
        return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-1, maxval=1) * shape[-2] ** -0.5)
    return nnx.Param(jnp.ones(shape) if row.start == "ones" else jnp.zeros(shape))


def init(model_config: ModelConfig, seed: int | nnx.Rngs, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Random float32 parameters, made in their sharding.

    Matrices are normal with `initializer_range`, norms 1, biases 0, and adapters as in PEFT: A uniform within the
    inverse root of its inputs, B 0.

    The values depend only on the seed and the parameter's path, not on mesh or backend. numpy draws them, one parameter
    at a time: compiling a generator for every shape takes longer.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    if isinstance(seed, nnx.Rngs):
        seed = int(jax.random.bits(seed.params(), dtype="uint32"))
    places = () if mesh is None else (param_shardings(model_config, mesh),)
    return draw(model_config, seed, abstract_params(model_config), *places)


def draw(model_config: ModelConfig, seed: int, abstract: Params, *places: Params) -> Params:
    """The values of `init` for the leaves of `abstract`, a part of the tree of parameters, in the shardings given."""

    def start(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, where: Any = None) -> jax.Array:
        name = sharding.path_name(path)
        kind, random = TABLE[name].start, np.random.default_rng([seed, zlib.crc32(name.encode())])
        if kind == "normal":
            values = random.standard_normal(leaf.shape, np.float32) * np.float32(model_config.initializer_range)
        elif kind == "uniform":
            values = (2 * random.random(leaf.shape, np.float32) - 1) * np.float32(leaf.shape[-2] ** -0.5)
        else:
            values = np.full(leaf.shape, float(kind == "ones"), np.float32)
        return jax.device_put(values, where)

    return jax.tree_util.tree_map_with_path(start, abstract, *places)


def param_shardings(model_config: ModelConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Params:
    """The sharding of every parameter on `mesh`; a UserError where something does not divide."""
    if model_config.num_kv_heads % mesh.shape["tensor"]:
        raise UserError(
            f"mesh: tensor={mesh.shape['tensor']} does not divide num_kv_heads {model_config.num_kv_heads}; "
            "choose a divisor of it"
        )
    return shardings(abstract_params(model_config), mesh)


def forward(
    params: Params,
    model_config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    stored: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`watched_forward` for the hidden states alone."""
    return watched_forward(params, model_config, tokens, positions, segment_ids, stored=stored)[0]


def watched_forward(
    params: Params,
    model_config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    stored: Callable[[jax.Array], jax.Array] | None = None,
    choices: jax.Array | None = None,
    watch: Watch | None = None,
) -> tuple[jax.Array, Any]:
    """Hidden states [b t d] after the final norm, in the compute dtype.

    Args:
      params: see the head of this file.
      model_config: its compute_dtype, remat and attention say how to run.
      tokens: [b t].
      positions: [b t], from 0 in each segment.
      segment_ids: [b t], equal within a segment; 0 is padding.
      stored: elementwise, of every weight where it is used: what a file that is not as exact would give back.
      choices: [l b t k] experts to use in mixtures; see `experts.route`.
      watch: what to return of the routing of each layer.

    Returns:
      hidden, and what `watch` returned, stacked over layers.
    """

    segment_ids, positions = (sharding.constrain(jnp.asarray(x), sharding.TOKENS) for x in (segment_ids, positions))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: None) -> tuple[jax.Array, None]:
        return attention(q, k, v, segment_ids, positions, backend=model_config.attention), cache

    way = TRAINING if model_config.lora is None else FROZEN
    ran = run_layers(
        params, model_config, tokens, positions, attend, way=way, stored=stored, choices=choices, watch=watch
    )
    return ran[0], ran[2]


def run_layers(
    params: Params,
    model_config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
    cache: Any = None,
    *,
    way: Way = TRAINING,
    stored: Callable[[jax.Array], jax.Array] | None = None,
    choices: jax.Array | None = None,
    watch: Watch | None = None,
) -> tuple[jax.Array, Any, Any]:
    """Embedding, all layers and the final norm, with the attention given from outside.

    Args:
      params: see the head of this file; laid out as `way` takes them.
      model_config: its compute_dtype and remat say how to run.
      tokens: [b t].
      positions: [b t]; they turn q and k before `attend` sees them.
      attend: (q [b t h D], k [b t k D], v [b t k D], layer_cache) -> (o [b t h D], new), called once a
        layer. What it returns as `new` may be any tree of arrays, the updated layer_cache or just the new k and v.
      cache: a tree of arrays stacked over layers [l ...]; `attend` gets one layer of it. None where there is none.
      way: what travels on a mesh, and how the layers lie, see models/linear.py; without a mesh it changes no number.
      stored, choices, watch: see `watched_forward`.

    Returns:
      hidden [b t d] after the final norm, and every layer's `new` and what `watch` returned, stacked [l ...].
    """
    dtype = jnp.dtype(model_config.compute_dtype)
    stored = stored or (lambda weight: weight)
    graph = _block_graph(model_config)
    tokens, positions = (sharding.constrain(jnp.asarray(x), way.layout.tokens) for x in (tokens, positions))
    rope = rope_table(positions, model_config)

    def layer(x: jax.Array, of_layer: tuple[Params, Any]) -> tuple[jax.Array, Any]:
        x = checkpoint_name(x, "layer_input")
        scales = {name.removesuffix(SCALE): w for name, w in of_layer[0].items() if name.endswith(SCALE)}
        names = [name for name in of_layer[0] if not name.endswith(SCALE)]
        weights = {
            name: _prepare(f"layers/{name}", stored(of_layer[0][name]), dtype, way, model_config.reduce_dtype)
            for name in names
        }
        block = nnx.merge(graph, nnx.State(weights))
        x, (new, routing) = block(x, rope, attend, of_layer[1][0], way, scales, of_layer[1][1])
        return x, (new, watch(routing) if watch and routing else None)

    if model_config.remat != "none":
        layer = jax.checkpoint(layer, policy=_POLICIES[model_config.remat], prevent_cse=False)
    # Looked up in float32: the gradient of a frequent token is a sum of thousands, which bfloat16 would stop short.
    x = stored(way.look_up(params["embed"], tokens))
    if (scale := params.get("embed" + SCALE)) is not None:
        x = x * scale.at[tokens].get()[..., None]
    x = sharding.constrain(x.astype(dtype), way.layout.hidden)
    x, (new, watched) = way.over(layer, x, (params["layers"], (cache, choices)))
    return rms_norm(x, stored(params["norm"]), model_config.rms_norm_eps), new, watched


def apart(params: Params) -> Params:
    """Parameters as `linear.APART` takes them: `layers` a tuple of trees, one a layer, which are copies."""
    layers: Params = params["layers"]
    count = len(layers["attn_norm"])
    return dict(params, layers=tuple({name: w[i] for name, w in layers.items()} for i in range(count)))


def unembedding(params: Params, model_config: ModelConfig) -> jax.Array:
    """The matrix [d v] from hidden states to logits, float32, its vocabulary split over VOCABULARY, whole otherwise."""
    if model_config.tie_word_embeddings:
        # [v/(seq fsdp) d/tensor] -> [v/(seq tensor) d]: the vocabulary is what is split, never the contraction.
        return sharding.gather_as(params["embed"], sharding.P(sharding.VOCABULARY, None)).T
    return sharding.gather_as(params["head"], sharding.P(None, sharding.VOCABULARY))


def logits(params: Params, model_config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Float32 logits [b t v] of hidden states [b t d]; for short rows, the chunked head never makes them whole."""
    weights = unembedding(params, model_config).astype(hidden.dtype)
    hidden = sharding.constrain(hidden, sharding.P(sharding.BATCH, None, None))  # `seq` splits the vocabulary
    return jnp.einsum("btd,dv->btv", hidden, weights, preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis; computed in float32, scaled and returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def rope_table(positions: jax.Array, model_config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin [b t 1 D/2] of the rotary angles, float32."""
    c = model_config
    frequency, factor = frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (i, i + D/2) of x [b t h D]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _prepare(name: str, weight: jax.Array, dtype: jnp.dtype, way: Way, reduce_dtype: str) -> jax.Array:
    # Norms and biases stay float32, so that their gradients are summed over the tokens in it. A matrix is cast first:
    # it travels between devices in the compute dtype, and its gradient in that or in float32.
    if weight.ndim == 1:
        return weight
    take = functools.partial(way.take, name)
    if weight.dtype in (dtype, jnp.int8):
        return take(weight)

    def cast(weight: jax.Array) -> jax.Array:
        # The same rounding, said twice: a bare cast TPU compilers take out of the loops, and hold all layers cast.
        precision = jnp.finfo(dtype)
        return jax.lax.reduce_precision(weight, precision.nexp, precision.nmant).astype(dtype)

    if reduce_dtype == "float32" and way is TRAINING:
        return take_in_float32(take, cast)(weight)
    return take(cast(weight))


def _pure(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.state(module))


@functools.cache
def _block_graph(model_config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Block(model_config, nnx.Rngs(0))))[0]
