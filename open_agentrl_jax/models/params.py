"""The table of parameters: path -> shape, PartitionSpec, Hugging Face name, initializer, 8-bit axis.

Modules, shardings, reader, writer and quantisation all read it. Parameters are nested dictionaries of arrays; those
under "layers" are stacked along a leading axis of layers, which is never split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel.sharding import EXPERTS, PARTS, VOCABULARY, P, check_divides, path_name
from open_agentrl_jax.types import UserError

Params = dict[str, Any]


def _always(_: ModelConfig) -> bool:
    return True


def _sparse(c: ModelConfig) -> bool:
    return c.num_experts > 0


def _dense(c: ModelConfig) -> bool:
    return not _sparse(c)


class Row(NamedTuple):
    """One parameter."""

    axes: str  # letters of its axes, see `sizes`; matrices are [in out]
    spec: jax.sharding.PartitionSpec
    name: str  # in Hugging Face files; "{}" is the layer number, a second one that of the expert
    transposed: bool = False  # the file holds [out in]
    start: str = "normal"  # or "ones", "zeros", "uniform": within 1 / sqrt(inputs)
    int8: int | None = None  # axis that one 8-bit scale covers; None: never quantised
    when: Callable[[ModelConfig], bool] = _always  # models that have it


_WIDE = P(None, PARTS, "tensor")
_NARROW = P(None, ("tensor", *PARTS), None)
_VECTOR = P(None, None)
_SPLIT_VECTOR = P(None, "tensor")


def _layer(axes: str, spec: jax.sharding.PartitionSpec, name: str, **fields: Any) -> Row:
    return Row("l" + axes, spec, f"model.layers.{{}}.{name}", **fields)


def _matrix(axes: str, spec: jax.sharding.PartitionSpec, name: str, **fields: Any) -> Row:
    return _layer(axes, spec, name + ".weight", **({"transposed": True, "int8": -2} | fields))


def _experts(axes: str, spec: jax.sharding.PartitionSpec, name: str) -> Row:
    return _matrix("e" + axes, spec, f"mlp.experts.{{}}.{name}", int8=None, when=_sparse)


TABLE: dict[str, Row] = {
    "embed": Row("vd", P(("seq", "fsdp"), "tensor"), "model.embed_tokens.weight"),
    "norm": Row("d", P(None), "model.norm.weight", start="ones"),
    "head": Row(
        "dv", P("fsdp", VOCABULARY), "lm_head.weight", transposed=True, when=lambda c: not c.tie_word_embeddings
    ),
    "layers/attn_norm": _layer("d", _VECTOR, "input_layernorm.weight", start="ones"),
    "layers/mlp_norm": _layer("d", _VECTOR, "post_attention_layernorm.weight", start="ones"),
    "layers/q": _matrix("dh", _WIDE, "self_attn.q_proj"),
    "layers/k": _matrix("dk", _WIDE, "self_attn.k_proj"),
    "layers/v": _matrix("dk", _WIDE, "self_attn.v_proj"),
    "layers/o": _matrix("hd", _NARROW, "self_attn.o_proj"),
    "layers/q_bias": _layer("h", _SPLIT_VECTOR, "self_attn.q_proj.bias", start="zeros", when=lambda c: c.qkv_bias),
    "layers/k_bias": _layer("k", _SPLIT_VECTOR, "self_attn.k_proj.bias", start="zeros", when=lambda c: c.qkv_bias),
    "layers/v_bias": _layer("k", _SPLIT_VECTOR, "self_attn.v_proj.bias", start="zeros", when=lambda c: c.qkv_bias),
    "layers/o_bias": _layer("d", _VECTOR, "self_attn.o_proj.bias", start="zeros", when=lambda c: c.o_bias),
    "layers/q_norm": _layer("D", _VECTOR, "self_attn.q_norm.weight", start="ones", when=lambda c: c.qk_norm),
    "layers/k_norm": _layer("D", _VECTOR, "self_attn.k_norm.weight", start="ones", when=lambda c: c.qk_norm),
    "layers/gate": _matrix("df", _WIDE, "mlp.gate_proj", when=_dense),
    "layers/up": _matrix("df", _WIDE, "mlp.up_proj", when=_dense),
    "layers/down": _matrix("fd", _NARROW, "mlp.down_proj", when=_dense),
    "layers/router": _matrix("de", P(None, PARTS, None), "mlp.gate", int8=None, when=_sparse),
    "layers/expert_gate": _experts("dm", P(None, EXPERTS, None, "tensor"), "gate_proj"),
    "layers/expert_up": _experts("dm", P(None, EXPERTS, None, "tensor"), "up_proj"),
    "layers/expert_down": _experts("md", P(None, EXPERTS, "tensor", None), "down_proj"),
}


LORA_A, LORA_B, SCALE = "_lora_a", "_lora_b", "_scale"  # suffixes of what stands beside a matrix


def _beside(path: str, row: Row) -> dict[str, Row]:
    """The rows of a matrix's adapter, A [in r] and B [out r] with PEFT's names, and of its scales in 8 bits."""
    layers, inner, outer = row.axes
    kept: Any = row.spec
    module = row.name.removesuffix(".weight")
    peft = f"base_model.model.{module}"
    # The long axis leads and is split over PARTS, so gradients are reduce-scattered; `tensor` splits the wide side.
    parts = [PARTS, ("tensor", *PARTS)][:: 1 if kept[1] == PARTS else -1]

    def adapted(c: ModelConfig) -> bool:
        return row.when(c) and c.lora is not None and c.lora.adapts(module.rsplit(".", 1)[-1])

    def quantized(c: ModelConfig) -> bool:
        return row.when(c) and c.lora is not None and c.lora.int8

    a, b, scale = (P(None, parts[0], None), P(None, parts[1], None), P(None, kept[2]))
    return {
        path + LORA_A: Row(
            layers + inner + "r", a, f"{peft}.lora_A.weight", transposed=True, start="uniform", when=adapted
        ),
        path + LORA_B: Row(layers + outer + "r", b, f"{peft}.lora_B.weight", start="zeros", when=adapted),
        path + SCALE: Row(layers + outer, scale, f"{module}.scale", start="ones", when=quantized),
    }


for _path, _row in list(TABLE.items()):
    if _row.int8 is not None and len(_row.axes) == 3:
        TABLE |= _beside(_path, _row)


def is_adapter(path: str) -> bool:
    """Whether a path names a part of an adapter."""
    return path.endswith((LORA_A, LORA_B))


def sizes(c: ModelConfig) -> dict[str, int]:
    """Sizes of the axes by letter; h and k are all query heads and all key heads, laid flat."""
    return {
        "l": c.num_layers,
        "v": c.vocab_size,
        "d": c.hidden_size,
        "f": c.intermediate_size,
        "e": c.num_experts,
        "m": c.expert_size,
        "h": c.num_heads * c.head_dim,
        "k": c.num_kv_heads * c.head_dim,
        "D": c.head_dim,
        "r": c.lora.rank if c.lora else 0,
    }


def rows(c: ModelConfig) -> dict[str, tuple[Row, tuple[int, ...]]]:
    """The rows and shapes of the parameters that a model has."""
    size = sizes(c)
    return {path: (row, tuple(size[axis] for axis in row.axes)) for path, row in TABLE.items() if row.when(c)}


def abstract_params(model_config: ModelConfig) -> Params:
    """The tree of parameters as float32 ShapeDtypeStructs."""
    tree: Params = {}
    for path, (_, shape) in rows(model_config).items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def spec(name: str) -> jax.sharding.PartitionSpec:
    """The spec of a parameter, or of anything shaped like it (an optimizer moment at ".../layers/q")."""
    parts = name.split("/")
    for start in range(len(parts)):
        if (row := TABLE.get("/".join(parts[start:]))) is not None:
            return row.spec
    raise UserError(f"sharding: {name}: unknown parameter; add it to TABLE in open_agentrl_jax/models/params.py")


def shardings(tree: Any, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Any:
    """The sharding of every leaf of `tree` (arrays or ShapeDtypeStructs; scalars are replicated).

    Raises:
      UserError: a leaf that the table does not list, or an axis that the mesh does not divide.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())  # pyright: ignore[reportArgumentType]
        found = spec(name := path_name(path))
        check_divides(name, leaf.shape, found, mesh)
        return NamedSharding(mesh, found)  # pyright: ignore[reportArgumentType]

    return jax.tree_util.tree_map_with_path(of, tree)
