"""Log-probs and entropy of the next token, with the logits of one chunk of tokens in memory at a time."""

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

    The sequence is processed in slices of `chunk` tokens per device, and the backward pass recomputes each slice's
    logits: memory is chunk x v instead of b x t x v. Logits, sums and the head's gradient are fp32 for any dtype of
    `hidden`. A masked sum selects the target's logit, which also works with a sharded vocabulary. If the vocabulary is
    split over an axis that splits the sequence, the devices of that axis process slices together, each with its part
    of the logits.

    Args:
        hidden: hidden states after the final norm.
        unembedding: the output matrix.
        targets: the token at each position whose log-prob is returned.
        temperature: divides the logits.
        chunk: tokens per slice and device.
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

    # The head is a constant of the scan: its gradient is summed over slices in its own dtype (fp32). A carry would be
    # saved once per slice.
    def step(_, inputs):
        return None, one_slice(unembedding, *inputs)

    _, (logprobs, entropy) = jax.lax.scan(step, None, (split(hidden), split(constrain(targets, _leading(hidden, 2)))))
    where = _leading(targets, 2)
    return constrain(join(logprobs), where), constrain(join(entropy), where)


def _leading(x: Array, axes: int) -> jax.sharding.PartitionSpec | None:
    """The spec of an array with the leading axes sharded as those of `x` and the others whole; None without a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else jax.P(*sharding.spec[:axes])


def _seen_by_all(x: Array, head: Array) -> Array:
    """Gathers the parts of x [parts b ...] over the axes that split the head's vocabulary.

    Each device holds a partial sum of the gradient of such an `x`: `reduced=` makes it a reduce-scatter, not an
    all-reduce. TPU compilers scatter along a leading axis only, hence the leading axis of parts.
    """
    here, split = jax.typeof(x).sharding, names(jax.typeof(head).sharding.spec.partitions[1])
    if here.mesh.empty:
        return x
    parts, *rest = here.spec
    left = tuple(name for name in names(parts) if name not in split)
    reduced = frozenset(split if jnp.issubdtype(x.dtype, jnp.floating) else ())
    return jax.reshard(x, jax.P(left or None, *rest, reduced=reduced))


def _layout(x: Array) -> tuple[int, int]:
    """Rows of the leading axis per device, and the number of parts of the second axis (explicit sharding)."""
    sharding = jax.typeof(x).sharding
    rows, parts = (math.prod(sharding.mesh.shape[n] for n in names(axis)) for axis in (*sharding.spec, None, None)[:2])
    return max(1, x.shape[0] // rows), parts
