"""The key-value cache of s slots, and its layout on a mesh.

On a mesh a device holds a contiguous range of slots and a part of their heads. The owner of a slot computes what
concerns it; the others add zeros, which changes no bit, or receive the result. Without a mesh there is one owner.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from open_agentrl_jax.models.attention import platform
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.parallel.mesh import current_mesh
from open_agentrl_jax.parallel.sharding import SLOTS, P


class Cache(NamedTuple):
    """Rotated keys and values in blocks of n positions, in the layout that the products of attention read."""

    k: Any  # [l blocks s k D n]
    v: Any  # [l blocks s k n D], on a TPU as the keys: see `turned`


ROWS = P(SLOTS)  # one row per slot, on the slot's device
_SLOTS = P(None, None, SLOTS, "tensor", None, None)
_WHERE = Cache(_SLOTS, _SLOTS)
_ONE = Cache(*[P(None, None, "tensor", None, None)] * 2)  # one slot, on all devices
_NEW = Cache(*[P(None, None, None, "tensor", None)] * 2)  # [l p c k D]


def turned() -> bool:
    """Whether positions are the innermost axis of values too.

    Otherwise a TPU compiler (v5e, seen in the compiled program) changes the layout of all values at every step.
    """
    return platform() == "tpu"


def groups(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """The number of ranges into which a mesh divides the slots."""
    return math.prod(mesh.shape[axis] for axis in SLOTS)


def block_size(length: int) -> int:
    """Positions per block: at least 32, so that there are at most 16 blocks."""
    return max(32, 1 << max(0, math.ceil(length / 16) - 1).bit_length())


def init_cache(model_config: ModelConfig, slots: int, length: int, device: Any = None) -> Cache:
    """Allocates a cache in the compute dtype, with `length` positions rounded up to whole blocks.

    Args:
      model_config: the model.
      slots: number of slots; on a mesh a multiple of `groups`.
      length: positions per slot.
      device: a mesh, a sharding, or None.
    """
    c, block = model_config, block_size(length)
    shape = (c.num_layers, -(-length // block), slots, c.num_kv_heads)
    where = jax.NamedSharding(device, _SLOTS) if isinstance(device, jax.sharding.Mesh) else device
    keys, values = (c.head_dim, block), (c.head_dim, block) if turned() else (block, c.head_dim)
    return Cache(*(jnp.zeros((*shape, *inner), c.compute_dtype, device=where) for inner in (keys, values)))


def _owned(slots: jax.Array, count: int) -> jax.Array:
    """Maps slots to this device's numbering of its `count` slots; those of other devices become `count`."""
    if current_mesh() is None:
        return slots
    first = jax.lax.axis_index(SLOTS) * count
    return jnp.where((slots >= first) & (slots < first + count), slots - first, count)


def by_owner(
    mix: Callable[..., jax.Array], *, aligned: bool
) -> Callable[[jax.Array, jax.Array, jax.Array, Cache, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Computes the attention of each row on the device of its slot; all devices get the result.

    Args:
      mix: (q [p c h D], k [p c k D], v [p c k D], cache, slots [p], starts [p], layer, blocks) -> [p c h D].
      aligned: row i belongs to slot i or is idle: a device computes its own rows only.
    """
    if current_mesh() is None:
        return mix

    def local(q, k, v, cache: Cache, slots, starts, layer, blocks) -> jax.Array:
        count = cache.k.shape[2]
        slots = _owned(slots, count)
        if aligned:
            rows = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=jax.lax.axis_index(SLOTS) * count, slice_size=count
            )
            mixed = mix(*map(rows, (q, k, v)), cache, rows(slots), rows(starts), layer, blocks)
            return jax.lax.all_gather(mixed, SLOTS, tiled=True)
        mixed = mix(q, k, v, cache, slots, starts, layer, blocks)
        return jax.lax.psum(jnp.where((slots < count)[:, None, None, None], mixed, 0), SLOTS)

    heads = sharding.WHOLE.heads
    specs = heads, heads, heads, _WHERE, P(None), P(None), P(), P()
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)


def each_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps `function` from arrays [a ...] to arrays [a], each row on its slot's device; all devices get the result."""
    if current_mesh() is None:
        return function
    mapped = jax.shard_map(function, in_specs=ROWS, out_specs=ROWS, check_vma=False)

    def split(x: jax.Array) -> jax.Array:
        # First split over the free axes, for which a device drops rows; then move the other axes to the rows.
        rest = jax.typeof(x).sharding.spec[1:]
        free = tuple(axis for axis in SLOTS if not any(axis in sharding.names(part) for part in rest))
        x = jax.reshard(x, P(free or None, *rest))
        return jax.reshard(x, P(SLOTS, *[None] * (x.ndim - 1)))

    def call(*rows: Any) -> Any:
        return jax.tree.map(lambda x: jax.reshard(x, P(None)), mapped(*jax.tree.map(split, rows)))

    return call


def write(cache: Cache, new: Cache, slots: jax.Array, at: jax.Array, within: jax.Array) -> Cache:
    """Writes new keys and values [l p c k D] of the rows in `slots` [p] to block `at` and place `within`, both [p c].

    Indices out of range are dropped.
    """

    def local(cache: Cache, new: Cache, slots: jax.Array, at: jax.Array, within: jax.Array) -> Cache:
        to = _owned(slots, cache.k.shape[2])[:, None]
        if at.shape[1] == 1 and turned():
            # Writes whole blocks with one new position each: for a scatter of single positions the TPU compiler copies
            # the whole cache, before and after.
            at, to, here = at[:, 0], to[:, 0], within == jnp.arange(cache.k.shape[-1])  # [p n]
            old = (of[:, at, to] for of in cache)
            some = (jnp.where(here[:, None, None], x[:, :, 0, ..., None], y) for x, y in zip(new, old, strict=True))
            return Cache(*(of.at[:, at, to].set(x, mode="drop") for of, x in zip(cache, some, strict=True)))
        values = [jnp.moveaxis(x, (1, 2), (0, 1)) for x in new]  # [p c l k D]
        k = cache.k.at[:, at, to, :, :, within]
        v = cache.v.at[:, at, to, :, :, within] if turned() else cache.v.at[:, at, to, :, within]
        return Cache(*(of.set(x, mode="drop") for of, x in zip((k, v), values, strict=True)))

    return _on_mesh(local, (_WHERE, _NEW, P(None), P(None, None), P(None, None)), _WHERE)(cache, new, slots, at, within)


@functools.partial(jax.jit, donate_argnames="cache")
def copy_slots(cache: Cache, sources: jax.Array, targets: jax.Array, count: jax.Array) -> Cache:
    """Copies slots `sources` [s] to `targets` [s], one after the other, for the first `count` pairs."""

    def local(cache: Cache, sources: jax.Array, targets: jax.Array, count: jax.Array) -> Cache:
        def copy(i: jax.Array, cache: Cache) -> Cache:
            return _put(cache, targets[i], _take(cache, sources[i]))

        return jax.lax.fori_loop(0, count, copy, cache)

    return _on_mesh(local, (_WHERE, P(None), P(None), P()), _WHERE)(cache, sources, targets, count)


@jax.jit
def read_slot(cache: Cache, slot: jax.Array) -> Cache:
    """One slot of the cache."""
    return _on_mesh(_take, (_WHERE, P()), _ONE)(cache, slot)


@functools.partial(jax.jit, donate_argnames="cache")
def write_slot(cache: Cache, slot: jax.Array, values: Cache) -> Cache:
    """Replaces one slot of the cache."""
    return _on_mesh(_put, (_WHERE, P(), _ONE), _WHERE)(cache, slot, values)


def _on_mesh(function: Callable[..., Cache], in_specs: Any, out_spec: Any) -> Callable[..., Cache]:
    if current_mesh() is None:
        return function
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_spec, check_vma=False)
    return lambda *arguments: mapped(*jax.tree.map(jax.reshard, arguments, in_specs))


def _take(cache: Cache, slot: jax.Array) -> Cache:
    count = cache.k.shape[2]
    slot = _owned(slot, count)
    content = Cache(*(jax.lax.dynamic_index_in_dim(of, slot, 2, keepdims=False) for of in cache))
    if current_mesh() is None:
        return content
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(slot < count, x, 0), SLOTS), content)


def _put(cache: Cache, slot: jax.Array, values: Cache) -> Cache:
    count = cache.k.shape[2]
    slot = _owned(slot, count)
    if current_mesh() is not None:
        there = (jax.lax.dynamic_index_in_dim(of, slot, 2, keepdims=False) for of in cache)
        values = Cache(*(jnp.where(slot < count, x, old) for x, old in zip(values, there, strict=True)))
    pairs = zip(cache, values, strict=True)
    return Cache(*(jax.lax.dynamic_update_index_in_dim(of, value, slot, 2) for of, value in pairs))
