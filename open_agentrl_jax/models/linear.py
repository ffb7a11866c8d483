"""The matrix products of a layer, their layouts on a mesh, and a backward pass without transposed copies.

Training and generation compute layers in different ways. In TRAINING rows are split over the devices and hold thousands
of tokens: parameters travel, gathered layer by layer. FROZEN is TRAINING of adapters beside matrices without gradients.
In GENERATION there are a few tokens, and each reads all weights: parameters stay where the trainer has them, every
device has all rows, multiplies them with its part, and the partial sums are added up. Without a mesh all compute the
same. APART is GENERATION without a mesh, with parameters as `qwen.apart` makes them: XLA on CPUs and GPUs copies each
layer's matrices out of a stack before it multiplies with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from open_agentrl_jax.models import params
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.parallel.mesh import current_mesh


def _whole(x: jax.Array) -> jax.Array:
    return sharding.constrain(x, sharding.ROWS)


def _gathered(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """A product of the stream, whose parts of rows over `tensor` are gathered, with columns of w: HIDDEN to WIDE."""
    return jnp.einsum(equation, _whole(x), w, out_sharding=sharding.out(sharding.WIDE))


def _scattered(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Products with rows of w, their sums over `tensor` scattered into parts of rows: WIDE to HIDDEN."""
    if (mesh := current_mesh()) is None:
        return jnp.einsum(equation, x, w)
    b, t, _ = x.shape
    P, (rows, seq, tensor) = sharding.P, sharding.WIDE
    parts = (b, mesh.shape["seq"], mesh.shape["tensor"], -1)
    # The parts lead while they are summed: TPU compilers scatter along a leading axis only.
    x = jnp.moveaxis(x.reshape(*parts, x.shape[-1], out_sharding=P(rows, seq, None, None, tensor)), 2, 0)
    sums = P(None, rows, seq, None, None, unreduced=frozenset({tensor}))
    y = jnp.einsum(equation.replace("bt", "pbst"), x, w, out_sharding=sums)
    y = jnp.moveaxis(jax.reshard(y, P(tensor, rows, seq, None, None)), 0, 2)
    return y.reshape(b, t, y.shape[-1], out_sharding=sharding.HIDDEN)


def _linear(*, widens: bool, frozen: bool = False) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """x [b t i] times w [i o] -> y [b t o], with its derivative; between products the stream is a part of each row.

    The derivative is written out because JAX's own computes that of w as [o i] and turns it over; on a CPU, XLA then
    copies the whole cotangent transposed, element by element, which took more time than all products together (4
    layers of width 128 on 4,096 tokens, forward and backward: 0.54 s against 0.43 s). Products are computed in x's
    dtype; the derivative of w is summed in its own. `frozen`: w has no derivative.
    """
    there, back = (_gathered, _scattered) if widens else (_scattered, _gathered)

    def forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        cast = w.astype(x.dtype)
        return there("bti,io->bto", x, cast), (x, cast, jnp.zeros((), w.dtype))

    def backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        x, w, like = saved
        dx = back("bto,io->bti", dy, w)
        if frozen:
            return dx, None
        x, dy = (_whole(x), dy) if widens else (x, _whole(dy))
        spec = sharding.unreduced(w)
        return dx, jnp.einsum("bti,bto->io", x, dy, out_sharding=spec, preferred_element_type=like.dtype)

    linear = jax.custom_vjp(lambda x, w: forward(x, w)[0])
    linear.defvjp(forward, backward)
    return linear


# From the stream [b t d] to heads or hidden units, and back; on a mesh `tensor` splits the wide side.
widen = _linear(widens=True)
narrow = _linear(widens=False)


def _low_rank(*, widens: bool) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """x [b t i] times A [i r] times B [o r] transposed -> y [b t o], laid out as the product of the matrix beside it.

    The values between A and B are whole over `tensor`: they are few.
    """
    inner, outer = (sharding.ROWS, sharding.WIDE) if widens else (sharding.WIDE, sharding.ROWS)

    def product(equation: str, x: jax.Array, w: jax.Array, spec: jax.sharding.PartitionSpec) -> jax.Array:
        return jnp.einsum(equation, x, w, out_sharding=sharding.out(spec))

    def forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        low = product("bti,ir->btr", sharding.constrain(x, inner), a, sharding.ROWS)
        y = product("btr,or->bto", low, b, outer)
        return y if widens else sharding.constrain(y, sharding.HIDDEN), (x, a, b, low)

    def backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
        x, a, b, low = saved
        x, dy = sharding.constrain(x, inner), sharding.constrain(dy, outer)
        dlow = product("bto,or->btr", dy, b, sharding.ROWS)
        dx = product("btr,ir->bti", dlow, a, inner)
        da = jnp.einsum("bti,btr->ir", x, dlow, out_sharding=sharding.unreduced(a))
        db = jnp.einsum("bto,btr->or", dy, low, out_sharding=sharding.unreduced(b))
        return sharding.constrain(dx, sharding.HIDDEN) if widens else dx, da, db

    adapt = jax.custom_vjp(lambda x, a, b: forward(x, a, b)[0])
    adapt.defvjp(forward, backward)
    return adapt


def take_in_float32(
    take: Callable[[jax.Array], jax.Array], cast: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    """Casts and gathers a float32 matrix, whose gradient is summed between devices in float32.

    Without it the gradient takes the dtype of the gathered matrix: a sum of 256 parts in bfloat16 is off by 1 to 2 %.

    Args:
      take: gathers a matrix of any dtype.
      cast: float32 to the compute dtype.
    """
    taken = jax.custom_vjp(lambda w: take(cast(w)).astype(w.dtype))
    taken.defvjp(
        lambda w: (taken(w), w),
        lambda w, dy: jax.vjp(take, w)[1](dy),  # `take` is linear: only its transpose is computed
    )
    return taken


class Way(NamedTuple):
    """How layers are computed on a mesh."""

    layout: sharding.Layout  # of activations
    take: Callable[[str, jax.Array], jax.Array]  # (path, parameter of one layer, cast) -> as products take it
    look_up: Callable[[jax.Array, jax.Array], jax.Array]  # (embed [v d], tokens [b t]) -> [b t d], laid out as `wide`
    widen: Callable[[jax.Array, jax.Array], jax.Array]
    narrow: Callable[[jax.Array, jax.Array], jax.Array]
    adapt_wide: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x, A, B): the adapter's part of `widen`
    adapt_narrow: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    over: Callable[..., Any] = jax.lax.scan  # (function of a layer, x, what there is of each layer) -> as jax.lax.scan


def _gather(name: str, weight: jax.Array) -> jax.Array:
    kept = params.spec(name)
    kept = sharding.P(*kept[1:]) if name.startswith("layers/") else kept
    split = sharding.EXPERTS[1:] if kept[0] == sharding.EXPERTS else sharding.PARTS
    return sharding.gather(weight, kept, split)


def _look_up_gathered(embed: jax.Array, tokens: jax.Array) -> jax.Array:
    """Each device looks a whole row up in the part of the vocabulary that is its own by `seq`."""
    if current_mesh() is None:
        return embed.at[tokens].get()

    def local(embed: jax.Array, tokens: jax.Array) -> jax.Array:
        whole = jax.lax.all_gather(tokens, "seq")  # [parts b t]: TPU compilers scatter along a leading axis only
        return jax.lax.psum_scatter(_own_rows(_over_fsdp(embed), whole, "seq"), "seq")

    return _on_mesh(local, sharding.SPLIT)(embed, tokens)


def _look_up_at_rest(embed: jax.Array, tokens: jax.Array) -> jax.Array:
    if current_mesh() is None:
        return embed.at[tokens].get()
    parts = sharding.names(params.spec("embed")[0])
    return _on_mesh(lambda embed, tokens: jax.lax.psum(_own_rows(embed, tokens, parts), parts), sharding.WHOLE)(
        embed, tokens
    )


def _on_mesh(local: Callable[..., jax.Array], layout: sharding.Layout) -> Callable[..., jax.Array]:
    specs = params.spec("embed"), layout.tokens
    return jax.shard_map(local, in_specs=specs, out_specs=layout.wide, check_vma=False)


def _own_rows(table: jax.Array, tokens: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    """Rows of the device's part of a table that `axes` split; 0 for a token that another device has."""
    at = tokens - jax.lax.axis_index(axes) * len(table)
    return table.at[at].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@jax.custom_vjp
def _over_fsdp(embed: jax.Array) -> jax.Array:
    """Gathers a table; its gradient is scattered in each micro-batch, and not held whole until after the last one.

    TPU compilers would take a plain scatter out of the loop over micro-batches, at the price of the whole sum.
    """
    return jax.lax.all_gather(embed, "fsdp", tiled=True)


_over_fsdp.defvjp(
    lambda embed: (_over_fsdp(embed), None),
    lambda _, dy: (jax.lax.optimization_barrier(jax.lax.psum_scatter(dy, "fsdp", tiled=True)),),
)


def at_rest(x: jax.Array, w: jax.Array, dtype: Any = None) -> jax.Array:
    """x [b t i], however it lies, times w [i o] where it lies -> y [b t o], split as o is; in `dtype`, if given.

    w may be in 8 bits: then it is an operand of the product as it is. A cast of it would be an operation of its own,
    which compilers take out of the loop over steps: they read, and hold, the cast matrix.
    """
    spec = None
    if current_mesh() is not None:
        inner, outer = jax.typeof(w).sharding.spec
        x, spec = jax.reshard(x, sharding.P(None, None, inner)), sharding.P(None, None, outer)
    if w.dtype == jnp.int8:
        return jax.lax.dot_general(
            x, w, (((2,), (0,)), ((), ())), preferred_element_type=dtype or x.dtype, out_sharding=spec
        )
    return jnp.einsum("bti,io->bto", x, w.astype(x.dtype), preferred_element_type=dtype, out_sharding=spec)


def _adapt_at_rest(*, widens: bool) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    def adapt(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        y = at_rest(at_rest(x, a), b.T)
        return sharding.constrain(y, sharding.P(None, None, "tensor" if widens else None))

    return adapt


def _unrolled(layer: Callable[..., tuple[jax.Array, Any]], x: jax.Array, xs: tuple[Any, Any]) -> tuple[jax.Array, Any]:
    """As jax.lax.scan, but the first of `xs` is a tuple, one element a layer; the second is stacked."""
    new = []
    for i, weights in enumerate(xs[0]):
        x, of_layer = layer(x, (weights, jax.tree.map(lambda part, i=i: part[i], xs[1])))
        new.append(of_layer)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *new)


TRAINING = Way(
    sharding.SPLIT, _gather, _look_up_gathered, widen, narrow, _low_rank(widens=True), _low_rank(widens=False)
)
FROZEN = TRAINING._replace(widen=_linear(widens=True, frozen=True), narrow=_linear(widens=False, frozen=True))
GENERATION = Way(
    sharding.WHOLE,
    lambda name, weight: weight,
    _look_up_at_rest,
    at_rest,
    at_rest,
    _adapt_at_rest(widens=True),
    _adapt_at_rest(widens=False),
)
APART = GENERATION._replace(over=_unrolled)
