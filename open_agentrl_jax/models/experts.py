"""Mixtures of experts: a float32 router, the products of the chosen experts, and how experts are split over a mesh.

No token is dropped. In training the devices along `expert` gather their tokens, each computes its own experts, and the
sums are scattered back: with k choices per token this moves no more than an all-to-all as long as `expert` is at most
k, and needs no buffer for the worst imbalance. In generation the experts stay where they are (models/linear.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from open_agentrl_jax.models.attention import platform
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.linear import Way, at_rest
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.parallel.mesh import current_mesh

P = sharding.P

# With at most so many tokens nearly all experts are read whatever the choices, and accelerators wait for memory: then
# computing every expert for every token takes no longer, and needs no sort.
_FEW = 256


class Weights(NamedTuple):
    """The matrices of one layer, as products take them; a device may hold part of e and f."""

    router: jax.Array  # [d e]
    gate: jax.Array  # [e d f]
    up: jax.Array  # [e d f]
    down: jax.Array  # [e f d]


class Routing(NamedTuple):
    """The choices of one layer."""

    experts: jax.Array  # [b t k] int32, best first
    weights: jax.Array  # [b t k] float32
    probs: jax.Array  # [b t e] float32, of all experts


def route(logits: jax.Array, c: ModelConfig, given: jax.Array | None = None) -> Routing:
    """Choose experts by router logits [... e] in float32.

    Args:
      logits: of each token.
      c: the model.
      given: [... k] choices to use instead of the best ones (router replay); rows that begin with -1 are chosen here.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(probs), c.experts_per_token)
    if given is not None:
        experts = jnp.where(given[..., :1] >= 0, given, experts)
    weights = jnp.where(experts[..., None] == jnp.arange(c.num_experts), probs[..., None, :], 0).sum(-1)
    if c.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdims=True)
    return Routing(experts, weights, probs)


def mixture(x: jax.Array, w: Weights, c: ModelConfig, way: Way, given: jax.Array | None) -> tuple[jax.Array, Routing]:
    """The MLP of a mixture: x [b t d] -> (y [b t d], its routing).

    Args:
      x: laid out as `way.layout.hidden`.
      w: as `way.take` returns them.
      c: the model.
      way: TRAINING, GENERATION or APART of models/linear.py.
      given: see `route`.
    """
    if current_mesh() is None:
        routing = route(jnp.einsum("btd,de->bte", x, w.router, preferred_element_type=jnp.float32), c, given)
        return _local(x, routing, w, 0), routing
    return (_moved if way.layout is sharding.SPLIT else _at_rest)(x, w, c, given)


class Load(NamedTuple):
    """How evenly the experts of one layer are used: means over real tokens."""

    chosen: jax.Array  # [e] choices of each expert per token; they sum to k
    probs: jax.Array  # [e] float32, the router's


def load(routing: Routing, real: jax.Array) -> Load:
    """The load of one layer, over the tokens where `real` [b t]."""
    chosen = (routing.experts[..., None] == jnp.arange(routing.probs.shape[-1])).sum(-2)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(real[..., None], x, 0).sum((0, 1)) / jnp.maximum(real.sum(), 1)

    return Load(mean(chosen.astype(jnp.float32)), mean(routing.probs))


def balance(loads: Load) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The load-balance loss of Fedus et al. (arXiv 2101.03961, equation 4) and metrics, of loads stacked [l e].

    The loss is a mean over layers, k if all experts are used evenly; transformers scales it alike but pools the layers.
    """
    count = loads.chosen.shape[-1]
    loss = (loads.chosen * loads.probs).sum(-1).mean() * count
    busiest = (loads.chosen.max(-1) / loads.chosen.sum(-1)).max() * count
    return loss, {"router/balance_loss": loss, "router/busiest_expert": busiest}


def _moved(x: jax.Array, w: Weights, c: ModelConfig, given: jax.Array | None) -> tuple[jax.Array, Routing]:
    """Each device routes its own tokens; the devices along `expert` and `tensor` share the products."""
    shares = ("expert", "tensor")
    specs: Any = Weights(*(jax.typeof(part).sharding.spec for part in w))

    def local(x: jax.Array, w: Weights, given: jax.Array | None) -> tuple[jax.Array, Routing]:
        # The transpose of this cast leaves the gradient as the device's part of the sum, to be scattered outside.
        w = Weights(*(jax.lax.pcast(part, _axes(s.reduced), to="varying") for part, s in zip(w, specs, strict=True)))
        routing = route(jnp.einsum("btd,de->bte", x, w.router, preferred_element_type=jnp.float32), c, given)
        rows = jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), (x, routing))
        every, chosen = jax.tree.map(lambda part: jax.lax.all_gather(part, shares, tiled=True), rows)
        y = _local(every, chosen, w, jax.lax.axis_index("expert") * len(w.gate))
        return jax.lax.psum_scatter(y, shares, tiled=True).reshape(x.shape), routing

    layout = sharding.HIDDEN
    call = jax.shard_map(local, in_specs=(layout, specs, layout), out_specs=(layout, _routing(layout)))
    return call(x, w, given)


def _at_rest(x: jax.Array, w: Weights, c: ModelConfig, given: jax.Array | None) -> tuple[jax.Array, Routing]:
    """All devices have all tokens; each adds what its experts, and its part of their hidden units, contribute."""
    routing = route(at_rest(x, w.router, jnp.float32), c, given)
    specs: Any = Weights(*(jax.typeof(part).sharding.spec for part in w))
    first = sharding.names(specs.gate[0])

    def local(x: jax.Array, routing: Routing, w: Weights) -> jax.Array:
        y = _local(x, routing, w, jax.lax.axis_index(first) * len(w.gate))
        return jax.lax.psum(y, (*first, "tensor"))

    whole = P(None, None, None)
    call = jax.shard_map(local, in_specs=(whole, _routing(whole), specs), out_specs=whole, check_vma=False)
    return call(x, routing, w), routing


def _routing(spec: Any) -> Any:
    return Routing(spec, spec, spec)


def _local(x: jax.Array, routing: Routing, w: Weights, first: Any) -> jax.Array:
    """What the experts that a device holds, numbered from `first`, add to tokens x [... d]."""
    tokens, (experts, weights) = x.reshape(-1, x.shape[-1]), (y.reshape(-1, y.shape[-1]) for y in routing[:2])
    return pick(len(tokens))(tokens, experts - first, weights, w).reshape(x.shape)


def pick(tokens: int) -> Callable[..., jax.Array]:
    """The products for so many tokens; on a CPU XLA expands a ragged product to one with every expert."""
    return every_expert if platform() == "cpu" or tokens <= _FEW else chosen_experts


def every_expert(x: jax.Array, experts: jax.Array, weights: jax.Array, w: Weights) -> jax.Array:
    """Computes every expert for every token and weights the unchosen ones with 0.

    Args:
      x: [n d].
      experts: [n k]; a number that `w` does not hold adds nothing.
      weights: [n k] float32.
      w: of e experts.
    """
    share = jnp.where(experts[..., None] == jnp.arange(len(w.gate)), weights[..., None], 0).sum(1)  # [n e]
    gate, up = (jnp.einsum("nd,edf->nef", x, part) for part in (w.gate, w.up))
    hidden = jax.nn.silu(gate) * up * share[..., None].astype(x.dtype)
    return jnp.einsum("nef,efd->nd", hidden, w.down)


def chosen_experts(x: jax.Array, experts: jax.Array, weights: jax.Array, w: Weights) -> jax.Array:
    """As `every_expert`, by ragged products over the tokens sorted by expert."""
    (n, k), count = experts.shape, len(w.gate)
    group = jnp.where((experts >= 0) & (experts < count), experts, count).reshape(-1)  # others go last
    order = jnp.argsort(group)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(n * k), unique_indices=True)
    sizes = (group[:, None] == jnp.arange(count)).sum(0, dtype=jnp.int32)

    def permuted(y: jax.Array, order: jax.Array) -> jax.Array:
        return y.at[order].get(unique_indices=True, mode="promise_in_bounds")

    rows = permuted(jnp.repeat(x, k, axis=0), order)
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, w.gate, sizes)) * jax.lax.ragged_dot(rows, w.up, sizes)
    y = jax.lax.ragged_dot(hidden, w.down, sizes)
    # Rows of other devices' experts are in no group; what ragged products leave there is not specified.
    y = jnp.where((group < count)[:, None], permuted(y, back), 0)
    return (y * weights.reshape(-1, 1)).reshape(n, k, -1).sum(1).astype(x.dtype)


def _axes(names: frozenset[str]) -> tuple[str, ...]:
    return tuple(sorted(names))
