"""Log-probs and entropy of the next token without ever holding [b t v] logits for more than one chunk of tokens."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from open_agentrl_jax.parallel.sharding import constrain, names


def token_logprobs(
    hidden: Float[Array, "b t d"],
    unembedding: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """The log-prob of each target and the entropy of its distribution, in nats.

    The sequence is taken in slices of `chunk` tokens a device, and each slice's logits are computed again in the
    backward pass: memory is chunk x v instead of b x t x v. Logits, sums and the head's gradient are fp32 whatever the
    dtype of `hidden`. The chosen logit is a masked sum, which also works where the vocabulary is sharded. Where it is
    over an axis that splits the sequence, the devices of that axis take slices together, each its part of the logits.

    Args:
        hidden: after the final norm.
        unembedding: the head.
        targets: the token whose log-prob is wanted at each place.
        temperature: logits are divided by it.
        chunk: tokens a slice and device.
    """
    b, t, _ = hidden.shape
    rows, parts = _layout(hidden)
    part = t // parts
    width = min(part, max(1, chunk // rows))
    slices = math.ceil(part / width)
    padding = slices * width - part

    def split(x: Array) -> Array:
        """[b t ...] -> [slices parts b width ...]: each device slices the part of the sequence that it holds."""
        rest = x.shape[2:]
        x = x.reshape(b, parts, part, *rest, out_sharding=_leading(x, 2))
        x = jnp.pad(x, ((0, 0), (0, 0), (0, padding)) + ((0, 0),) * len(rest))
        x = x.reshape(b, parts, slices, width, *rest, out_sharding=_leading(x, 2))
        return jnp.moveaxis(x, (2, 1), (0, 1))

    def join(x: Array) -> Array:
        """[slices parts b width] -> [b t]."""
        x = jnp.moveaxis(x, (0, 1), (2, 1))
        x = x.reshape(b, parts, slices * width, out_sharding=_leading(x, 2))[..., :part]
        return x.reshape(b, t, out_sharding=_leading(x, 2))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_slice(head, x, ids):
        where = _leading(x, 2)
        x, ids = _seen_by_all(x, head), _seen_by_all(ids, head)
        logits = jnp.einsum("pbtd,dv->pbtv", x, head.astype(x.dtype), preferred_element_type=jnp.float32) / temperature
        logp = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = jnp.where(jnp.arange(logits.shape[-1]) == ids[..., None], logp, 0).sum(-1)
        return constrain(chosen, where), constrain(-(jnp.exp(logp) * logp).sum(-1), where)

    # The head is a constant of the scan: its gradient adds up across slices in its own dtype (fp32), and nothing of its
    # size is saved a slice, as would be the case for a carry.
    def step(_, inputs):
        return None, one_slice(unembedding, *inputs)

    _, (logprobs, entropy) = jax.lax.scan(step, None, (split(hidden), split(constrain(targets, _leading(hidden, 2)))))
    where = _leading(targets, 2)
    return constrain(join(logprobs), where), constrain(join(entropy), where)


def _leading(x: Array, axes: int) -> jax.sharding.PartitionSpec | None:
    """The spec of an array whose leading axes lie as those of `x` and whose others are whole; None without a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else jax.P(*sharding.spec[:axes])


def _seen_by_all(x: Array, head: Array) -> Array:
    """[parts b ...], the parts gathered over the axes that split the head's vocabulary.

    A gradient of such an `x` is a part of a sum on each device: `reduced=` has it scattered, not summed everywhere.
    TPU compilers do so along a leading axis only, which is why the parts are there.
    """
    here, split = jax.typeof(x).sharding, names(jax.typeof(head).sharding.spec.partitions[1])
    if here.mesh.empty:
        return x
    parts, *rest = here.spec
    left = tuple(name for name in names(parts) if name not in split)
    reduced = frozenset(split if jnp.issubdtype(x.dtype, jnp.floating) else ())
    return jax.reshard(x, jax.P(left or None, *rest, reduced=reduced))


def _layout(x: Array) -> tuple[int, int]:
    """Rows of the leading axis that one device holds, and parts that the second is split into (explicit sharding)."""
    sharding = jax.typeof(x).sharding
    rows, parts = (math.prod(sharding.mesh.shape[n] for n in names(axis)) for axis in (*sharding.spec, None, None)[:2])
    return max(1, x.shape[0] // rows), parts
