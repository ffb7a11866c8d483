"""How the embedded engine holds the parameters: shared with the trainer, or a copy whose layers lie apart."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from open_agentrl_jax.models import qwen
from open_agentrl_jax.models.config import ModelConfig

_MOST_COPIED = 10**9  # parameters of the largest model whose layers a CPU copies: 4 GB in float32
_SMALL_SHARE = 1 / 8  # of a GPU's memory: a copy of the layers that is smaller is made


def copies_layers(params: qwen.Params, config: ModelConfig, slots: int) -> bool:
    """Whether decoding is faster with a copy of unstacked layers, for XLA copies each layer's matrices out of a stack.

    A CPU copies them if a step mostly moves weights; a GPU if a copy is made anyway, for its dtype, or is small. A TPU
    compiler reads them where they are.
    """
    size = sum(x.size for x in jax.tree.leaves(params))
    if jax.default_backend() == "cpu":
        return size <= _MOST_COPIED and 2 * slots < config.hidden_size
    if jax.default_backend() != "gpu":
        return False
    dtype = np.dtype(config.compute_dtype)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return any(x.dtype != dtype for x in jax.tree.leaves(params)) or size * dtype.itemsize <= limit * _SMALL_SHARE


def cast(params: Any, dtype: np.dtype) -> Any:
    """Parameters in `dtype`; arrays that have it are shared, 8-bit matrices stay."""
    return jax.tree.map(lambda x: x if x.dtype == np.int8 else x.astype(dtype), params)


def apart(params: Any, dtype: np.dtype) -> Any:
    """Parameters in `dtype`, each layer a copy, as `linear.APART` takes them; the others are shared as in `cast`."""
    rest = {name: x for name, x in params.items() if name != "layers"}
    return cast(rest, dtype) | {"layers": _layers_apart(params["layers"], dtype)}


@functools.partial(jax.jit, static_argnames="dtype")  # in one program: no layer is held twice
def _layers_apart(layers: Any, dtype: np.dtype) -> Any:
    return qwen.apart({"layers": cast(layers, dtype)})["layers"]
