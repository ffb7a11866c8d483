"""One optimizer update over a packed mini-batch, for any algorithm: log-probs -> objective -> gradient -> AdamW.

One compiled function loops over the micro-batches. The number of occupied ones is an argument, so one shape serves
every batch and padding costs nothing. Every mean is divided by the count of the WHOLE mini-batch, so the split into
micro-batches and devices does not change the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from open_agentrl_jax.algorithms import losses
from open_agentrl_jax.algorithms.entropy import update_coefficient
from open_agentrl_jax.algorithms.logprobs import token_logprobs
from open_agentrl_jax.config import Loss
from open_agentrl_jax.models import experts, lora, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel.sharding import HIDDEN, P, constrain
from open_agentrl_jax.train.optimizer import Optimizer, update
from open_agentrl_jax.train.packing import Batch
from open_agentrl_jax.train.state import TrainState

Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Totals:
    """Counts over the whole mini-batch, the entropy coefficient, and the selected tokens of this micro-batch."""

    tokens: Float[Array, ""]
    sequences: Float[Array, ""]
    entropy_coef: Float[Array, ""]
    selected: Bool[Array, "b t"] | None = None  # see `selection`


class Objective(Protocol):
    """The algorithm."""

    def __call__(
        self, logprobs: Array, entropy: Array, batch: Batch, totals: Totals
    ) -> tuple[Float[Array, ""], Metrics]:
        """Log-probs and entropy [b t] of one micro-batch -> its share of the loss, and means over its mask."""
        ...


def likelihood(logprobs: Array, entropy: Array, batch: Batch, totals: Totals) -> tuple[Float[Array, ""], Metrics]:
    """SFT: the mean negative log-likelihood of the masked tokens."""
    loss = losses.aggregate(-logprobs, batch.mask, token_count=totals.tokens)
    return loss, {"actor/entropy": losses.masked_mean(entropy, batch.mask)}


def policy_gradient(loss: Loss, *, width: int) -> Objective:
    """The objective of GRPO-TCR and its ablations.

    Args:
        loss: the terms of the objective.
        width: response budget in tokens, the divisor of "seq-mean-token-sum-norm".
    """

    def objective(logprobs: Array, entropy: Array, batch: Batch, totals: Totals) -> tuple[Float[Array, ""], Metrics]:
        mask, segments = batch.mask, batch.segment_ids
        reduce = functools.partial(
            losses.aggregate,
            mask=mask,
            mode=loss.aggregate,
            token_count=totals.tokens,
            sequence_count=totals.sequences,
            segment_ids=segments,
            width=width,
        )
        clips: dict[str, Any] = {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
        if loss.policy == "clip":
            clips |= {"dual_clip": loss.dual_clip, "ratio": loss.ratio, "segment_ids": segments}
            surrogate = losses.clipped_policy_loss
        else:
            clips |= {"kind": loss.policy, "treated": totals.selected}
            surrogate = losses.covariance_policy_loss
        per_token, metrics = surrogate(logprobs, batch.old_logprobs, batch.advantages, mask, **clips)
        if loss.importance_level != "off":
            weights = losses.importance_weights(
                batch.old_logprobs,
                batch.rollout_logprobs,
                mask,
                level=loss.importance_level,
                cap=loss.importance_cap,
                mode=loss.importance_mode,
                segment_ids=segments,
            )
            per_token = per_token * weights
            metrics |= losses.importance_metrics(weights, mask, cap=loss.importance_cap)
        total = reduce(per_token)
        metrics["actor/pg_loss"] = losses.masked_mean(per_token, mask)
        if loss.kl_coef > 0:
            divergence = losses.kl_penalty(logprobs, batch.ref_logprobs, loss.kl_kind)
            total += loss.kl_coef * reduce(divergence)
            metrics["actor/kl"] = losses.masked_mean(divergence, mask)
        if loss.entropy_coef > 0 or loss.entropy_target > 0:
            total -= totals.entropy_coef * reduce(entropy)
        metrics["actor/entropy"] = losses.masked_mean(entropy, mask)
        # With old_logprobs=rollout the difference of the two would be 0 by construction.
        trainers = jax.lax.stop_gradient(logprobs) if loss.old_logprobs == "rollout" else batch.old_logprobs
        difference = jnp.abs(trainers - batch.rollout_logprobs)
        metrics["rollout/logprob_difference"] = losses.masked_mean(difference, mask)
        return total, metrics

    return objective


def selection(loss: Loss) -> Callable[..., Array] | None:
    """The function that selects tokens of a whole mini-batch before its update, where the loss needs one.

    Returns:
        (log-probs, old log-probs, advantages, mask) of [b t] -> [b t] bool, or None.
    """
    if loss.policy == "clip":
        return None
    clips = {"clip_low": loss.clip_low, "clip_high": loss.clip_high}
    return functools.partial(losses.covariance_selection, kind=loss.policy, **clips)


@jax.custom_vjp
def _one_after_the_other(hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A barrier: the head is gathered after the layers, and its gradient is scattered before their backward pass.

    Without it XLA gathers the head once for all micro-batches and keeps it whole beside the layers. The derivative is
    written out because that of jax 0.12 fails where a gradient accumulates in place.
    """
    return jax.lax.optimization_barrier((hidden, table))


_one_after_the_other.defvjp(
    lambda hidden, table: (_one_after_the_other(hidden, table), None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)


@jax.custom_vjp
def _after_frozen(hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same barrier for a head that is not trained."""
    return jax.lax.optimization_barrier((hidden, table))


_after_frozen.defvjp(
    lambda hidden, table: (_after_frozen(hidden, table), None), lambda _, gradients: (gradients[0], None)
)


def _score(params: Any, model_config: ModelConfig, batch: Batch, temperature: float, chunk: int):
    """Log-probs and entropy [b t], and the loads of the experts where their balance is trained."""
    watch = None
    if model_config.num_experts and model_config.balance:
        watch = functools.partial(experts.load, real=constrain(batch.segment_ids > 0, P(*HIDDEN[:2])))
    hidden, loads = qwen.watched_forward(
        params, model_config, batch.tokens, batch.positions, batch.segment_ids, watch=watch
    )
    name = "embed" if model_config.tie_word_embeddings else "head"
    if model_config.lora is None:
        hidden, table = _one_after_the_other(hidden, params[name])
    else:
        hidden, table = _after_frozen(hidden, params[name])
        table = jax.lax.stop_gradient(table)
    head = qwen.unembedding({name: table}, model_config)
    return *token_logprobs(hidden, head, batch.targets, temperature=temperature, chunk=chunk), loads


def _micro(batch: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch)


def _scores(params: Any, model_config: ModelConfig, batch: Batch, used: Any, temperature: float, chunk: int):
    def body(index, out):
        micro = _micro(batch, index)
        logprobs, _, _ = _score(params, model_config, micro, temperature, chunk)
        return jax.lax.dynamic_update_index_in_dim(out, jnp.where(micro.mask, logprobs, 0), index, 0)

    return jax.lax.fori_loop(0, used, body, jnp.zeros_like(batch.old_logprobs))


def make_score(model_config: ModelConfig, *, temperature: float = 1.0, chunk: int = 1024) -> Callable[..., Any]:
    """Compiles (params, batch, used, frozen=None) -> log-probs of `batch.targets` [m b t]; 0 off the mask.

    `params` are what is trained and `frozen` the rest, see models/lora.py.
    """

    @jax.jit
    def score(params: Any, batch: Batch, used: Int[Array, ""], frozen: Any = None) -> Float[Array, "m b t"]:
        return _scores(lora.join(frozen, params), model_config, batch, used, temperature, chunk)

    return score


def make_step(
    model_config: ModelConfig,
    optimizer: Optimizer,
    objective: Objective,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
    entropy_target: float = 0.0,
    token_count: Callable[[Any, Any], Any] | None = None,
    select: Callable[..., Array] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compiles the update (state, batch, used, frozen=None) -> (state, metrics); the state's buffers are donated.

    The state holds what is trained, `frozen` the other parameters (see models/lora.py), which have no gradient. An
    update whose gradient norm is not finite leaves parameters and moments unchanged and is counted.

    Args:
        model_config: shapes, compute dtype and rematerialisation.
        optimizer: see train/optimizer.py.
        objective: the algorithm.
        temperature: divides the logits.
        chunk: tokens per slice of the head.
        entropy_target: nats; above 0, the entropy coefficient is adapted to it.
        token_count: (tokens of a micro-batch, number of micro-batches) -> divisor of its token losses; default: the
            tokens of the mini-batch.
        select: see `selection`; costs one more forward pass. None: the objective selects in each micro-batch.
    """

    def loss_of(params: Any, micro: Batch, totals: Totals) -> tuple[Float[Array, ""], Metrics]:
        logprobs, entropy, loads = _score(params, model_config, micro, temperature, chunk)
        # Only a few numbers per token remain. Every device gets all of them: objectives sum over sequences.
        logprobs, entropy, micro = jax.tree.map(lambda x: constrain(x, P()), (logprobs, entropy, micro))
        loss, metrics = objective(logprobs, entropy, micro, totals)
        if loads is not None:
            uneven, of_experts = experts.balance(loads)
            share = micro.mask.sum() / jnp.maximum(totals.tokens, 1)
            loss, metrics = loss + model_config.balance * share * uneven, metrics | of_experts
        return loss, metrics

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch, used: Int[Array, ""], frozen: Any = None) -> tuple[TrainState, Metrics]:
        whole = Totals(
            tokens=batch.mask.sum().astype(jnp.float32),
            sequences=batch.segment_ids.max(axis=-1).sum().astype(jnp.float32),
            entropy_coef=state.entropy_coef,
        )

        selected = None
        if select is not None:
            logprobs = _scores(lora.join(frozen, state.params), model_config, batch, used, temperature, chunk)
            streams = (logprobs, batch.old_logprobs, batch.advantages, batch.mask)
            whole_rows = (constrain(x, P()).reshape(-1, x.shape[-1]) for x in streams)
            selected = select(*whole_rows).reshape(batch.mask.shape)

        # The backward pass accumulates in place, layer by layer; no micro-batch's gradient is held as a whole.
        sums = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), state.params)

        def add_gradient(index) -> Metrics:
            micro = _micro(batch, index)
            share = micro.mask.sum() / jnp.maximum(whole.tokens, 1)
            totals = whole
            if token_count is not None:
                totals = dataclasses.replace(whole, tokens=token_count(micro.mask.sum(), used))
            if selected is not None:
                totals = dataclasses.replace(totals, selected=_micro(selected, index))
            loss, backward, metrics = jax.vjp(
                lambda p: loss_of(lora.join(frozen, p), micro, totals), state.params, has_aux=True
            )
            backward.with_refs(sums)(jnp.ones_like(loss))
            return jax.tree.map(lambda x: x * share, metrics) | {"actor/loss": loss}

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda: add_gradient(0)))
        metrics = jax.lax.fori_loop(0, used, lambda i, total: jax.tree.map(jnp.add, total, add_gradient(i)), zeros)
        grads = jax.tree.map(jax.freeze, sums)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm)
        params, opt_state = update(optimizer, grads, state, finite)
        coefficient = state.entropy_coef
        if entropy_target > 0:
            moved = update_coefficient(coefficient, metrics["actor/entropy"], entropy_target)
            coefficient = jnp.where(finite, moved, coefficient)
        new = TrainState(
            params=params,
            opt_state=opt_state,
            updates=state.updates + 1,
            skipped=state.skipped + (1 - finite.astype(jnp.int32)),
            entropy_coef=coefficient,
        )
        metrics |= {
            "actor/grad_norm": norm,
            "actor/skipped": new.skipped,
            "actor/entropy_coef": state.entropy_coef,
            "actor/tokens": whole.tokens,
        }
        return new, metrics

    return step
