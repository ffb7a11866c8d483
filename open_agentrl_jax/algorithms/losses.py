"""Policy losses of GRPO-TCR and its ablations, as pure functions of per-token streams.

Sources: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), clip-higher and token-level loss (DAPO, arXiv
    2503.14476), GSPO (arXiv 2507.18071), clip-cov and kl-cov (arXiv 2505.22617), KL estimators (J. Schulman,
    "Approximating KL divergence").
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOG_RATIO_BOUND = 20.0  # e^20 is finite in every dtype we use; beyond it a ratio carries no information
Metrics = dict[str, Any]


def masked_sum(values: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """Sum over the mask. `where`, not a product: what is off the mask may be infinite."""
    return jnp.where(mask, values, 0).sum()


def masked_mean(values: Float[Array, "b t"], mask: Bool[Array, "b t"]) -> Float[Array, ""]:
    """Mean over the mask; 0 for an empty one."""
    return masked_sum(values, mask) / jnp.maximum(mask.sum(), 1)


def segment_sum(
    values: Float[Array, "b t"], mask: Bool[Array, "b t"], segment_ids: Int[Array, "b t"] | None = None
) -> Float[Array, "b t"]:
    """At each token the sum over the mask of the sequence it belongs to.

    A row is one sequence, or, where `segment_ids` is given, several packed ones (0 is padding).
    """
    values = jnp.where(mask, values, 0)
    if segment_ids is None:
        return jnp.broadcast_to(values.sum(1, keepdims=True), values.shape)

    def one_row(row, segments):
        return jax.ops.segment_sum(row, segments, num_segments=row.shape[0] + 1)[segments]

    return jax.vmap(one_row)(values, segment_ids)


def segment_mean(
    values: Float[Array, "b t"], mask: Bool[Array, "b t"], segment_ids: Int[Array, "b t"] | None = None
) -> Float[Array, "b t"]:
    """At each token the mean over the mask of the sequence it belongs to; 0 for a sequence without masked tokens."""
    counts = segment_sum(jnp.ones_like(values), mask, segment_ids)
    return segment_sum(values, mask, segment_ids) / jnp.maximum(counts, 1)


def aggregate(
    values: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    mode: str = "token-mean",
    *,
    token_count: Any = None,
    sequence_count: Any = None,
    segment_ids: Int[Array, "b t"] | None = None,
    width: int | None = None,
) -> Float[Array, ""]:
    """One number out of per-token losses.

    Args:
        values: per-token loss.
        mask: tokens that count.
        mode: "token-mean" | "seq-mean-token-sum" | "seq-mean-token-mean" | "seq-mean-token-sum-norm".
        token_count: tokens of the WHOLE mini-batch, over all micro-batches and devices; the parts then add up to the
            loss of the whole however it is split. Default: those of `mask`.
        sequence_count: likewise the sequences of the whole mini-batch.
        segment_ids: packed rows: which sequence each token belongs to, 0 for padding; default: one sequence a row.
        width: what "seq-mean-token-sum-norm" divides by; default: the width of the mask.
    """
    if mode == "token-mean":
        return masked_sum(values, mask) / jnp.maximum(mask.sum() if token_count is None else token_count, 1)
    if mode == "seq-mean-token-sum-norm":
        return masked_sum(values, mask) / (width or mask.shape[1])
    if mode not in ("seq-mean-token-sum", "seq-mean-token-mean"):
        raise ValueError(f"unknown aggregation mode {mode!r}")
    # Each masked token weighs 1 / (masked tokens of its sequence): the weights of a sequence add up to 1.
    weights = 1.0 / jnp.maximum(segment_sum(jnp.ones_like(values), mask, segment_ids), 1)
    if sequence_count is None:
        sequence_count = masked_sum(weights, mask)
    if mode == "seq-mean-token-mean":
        values = values * weights
    return masked_sum(values, mask) / jnp.maximum(sequence_count, 1)


def clipped_policy_loss(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    advantages: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    ratio: str = "token",
    segment_ids: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t"], Metrics]:
    """The clipped surrogate, per token.

    With d = clamp(logprobs - old_logprobs, -20, 20) and r = e^d: x = max(-A r, -A clamp(r, 1 - clip_low, 1 +
    clip_high)); where A < 0 and dual_clip > 0, x = min(x, -A dual_clip). `ratio="sequence"` uses the exponential of
    the sequence's mean d, with the gradient of each token's own log-prob (GSPO), and no dual clip.

    Returns:
        The loss a token (not masked) and metrics; each metric is a mean over the mask.
    """
    difference = jnp.clip(logprobs - old_logprobs, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    log_ratio = difference
    if ratio == "sequence":
        sequence = segment_mean(difference, mask, segment_ids)
        log_ratio = jax.lax.stop_gradient(sequence) + logprobs - jax.lax.stop_gradient(logprobs)
        log_ratio = jnp.minimum(log_ratio, 10.0)
    elif ratio != "token":
        raise ValueError(f"unknown ratio {ratio!r}")
    r = jnp.exp(log_ratio)
    unclipped = -advantages * r
    clipped = -advantages * jnp.clip(r, 1 - clip_low, 1 + clip_high)
    loss = jnp.maximum(unclipped, clipped)
    lower = jnp.zeros_like(mask)
    if dual_clip > 0 and ratio == "token":
        bound = -advantages * dual_clip
        lower = (advantages < 0) & (loss > bound)
        loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
    metrics = {
        "actor/pg_clipfrac": masked_mean((clipped > unclipped).astype(jnp.float32), mask),
        "actor/pg_clipfrac_lower": masked_mean(lower.astype(jnp.float32), mask),
        "actor/ppo_kl": masked_mean(-difference, mask),
    }
    return loss, metrics


def covariance_selection(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    advantages: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    *,
    kind: str,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    share: float = 2e-4,
    band: tuple[float, float] = (1.0, 5.0),
) -> Bool[Array, "b t"]:
    """The tokens that `covariance_policy_loss` treats; give it a whole mini-batch, so that no split changes them.

    Args:
        logprobs: current log-probs.
        old_logprobs: of the policy that is improved.
        advantages: per token.
        mask: tokens that count.
        kind: "clip_cov": a `share` of the tokens, from those whose covariance is in `band`, evenly spread over their
            order instead of drawn, so that a run repeats. "kl_cov": the `share` of highest covariance.
        clip_low: of the surrogate of "clip_cov"; tokens that it clips are not treated.
        clip_high: likewise.
        share: of the masked tokens.
        band: limits of the covariance.
    """
    current = jax.lax.stop_gradient(logprobs)
    covariance = (advantages - masked_mean(advantages, mask)) * (current - masked_mean(current, mask))
    wanted = jnp.maximum(jnp.floor(share * jnp.maximum(mask.sum(), 1)), 1).astype(jnp.int32)
    if kind == "kl_cov":
        ordered = jnp.sort(jnp.where(mask, covariance, -jnp.inf).reshape(-1))
        return mask & (covariance >= ordered[ordered.shape[0] - wanted])
    if kind != "clip_cov":
        raise ValueError(f"unknown covariance loss {kind!r}")
    r = jnp.exp(jnp.clip(current - old_logprobs, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    clipped = -advantages * jnp.clip(r, 1 - clip_low, 1 + clip_high)
    eligible = mask & (covariance > band[0]) & (covariance < band[1]) & (clipped <= -advantages * r)
    order = jnp.argsort(jnp.where(eligible, covariance, jnp.inf).reshape(-1))
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(1, order.size + 1, dtype=order.dtype)).reshape(mask.shape)
    stride = jnp.maximum(eligible.sum() // wanted, 1)
    return eligible & (rank % stride == 0) & (rank // stride <= wanted)


def covariance_policy_loss(
    logprobs: Float[Array, "b t"],
    old_logprobs: Float[Array, "b t"],
    advantages: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    *,
    kind: str,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    share: float = 2e-4,
    band: tuple[float, float] = (1.0, 5.0),
    kl_coef: float = 1.0,
    treated: Bool[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t"], Metrics]:
    """The entropy-keeping losses: tokens whose log-prob and advantage vary most together lose their gradient
    ("clip_cov"), or pay |d| on top ("kl_cov").

    Args:
        logprobs: current log-probs.
        old_logprobs: of the policy that is improved.
        advantages: per token.
        mask: tokens that count.
        kind: "clip_cov" | "kl_cov".
        clip_low: of the surrogate of "clip_cov".
        clip_high: likewise.
        share: see `covariance_selection`.
        band: likewise.
        kl_coef: of the penalty of "kl_cov".
        treated: the selected tokens; default: `covariance_selection` of these tokens alone.
    """
    if treated is None:
        settings: dict[str, Any] = {"clip_low": clip_low, "clip_high": clip_high, "share": share, "band": band}
        treated = covariance_selection(logprobs, old_logprobs, advantages, mask, kind=kind, **settings)
    difference = jnp.clip(logprobs - old_logprobs, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    r = jnp.exp(difference)
    if kind == "clip_cov":
        clipped = -advantages * jnp.clip(r, 1 - clip_low, 1 + clip_high)
        loss = jnp.where(treated, 0.0, jnp.maximum(-advantages * r, clipped))
    else:
        loss = -advantages * r + jnp.where(treated, kl_coef * jnp.abs(difference), 0.0)
    metrics = {
        "actor/pg_clipfrac": masked_mean(treated.astype(jnp.float32), mask),
        "actor/ppo_kl": masked_mean(-difference, mask),
    }
    return loss, metrics


def kl_penalty(logprobs: Float[Array, "b t"], ref_logprobs: Float[Array, "b t"], kind: str) -> Float[Array, "b t"]:
    """Estimators of the divergence from a reference policy, per token: "k1" | "abs" | "k2" | "k3"."""
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "abs":
        return jnp.abs(difference)
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        x = jnp.clip(-difference, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        return jnp.clip(jnp.exp(x) - x - 1, -10.0, 10.0)
    raise ValueError(f"unknown KL estimator {kind!r}")


def importance_weights(
    old_logprobs: Float[Array, "b t"],
    rollout_logprobs: Float[Array, "b t"],
    mask: Bool[Array, "b t"],
    *,
    level: str = "token",
    cap: float = 2.0,
    mode: str = "clip",
    segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t"]:
    """Truncated importance weights from the engine's policy to the trainer's; no gradient flows through them.

    w = exp(old - rollout) a token, or of the sequence's summed difference ("sequence"). `mode="clip"` is min(w, cap),
    "mask" gives w where w <= cap and 0 elsewhere. 1 off the mask.
    """
    difference = jnp.where(mask, old_logprobs - rollout_logprobs, 0.0)
    if level == "sequence":
        difference = segment_sum(difference, mask, segment_ids)
    elif level != "token":
        raise ValueError(f"unknown importance level {level!r}")
    weights = jnp.exp(jnp.clip(difference, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    if mode == "clip":
        weights = jnp.minimum(weights, cap)
    elif mode == "mask":
        weights = jnp.where(weights <= cap, weights, 0.0)
    else:
        raise ValueError(f"unknown importance mode {mode!r}")
    return jax.lax.stop_gradient(jnp.where(mask, weights, 1.0))


def importance_metrics(weights: Float[Array, "b t"], mask: Bool[Array, "b t"], *, cap: float) -> Metrics:
    """What the importance weights cost: mean, effective sample size as a share of the tokens, share at the cap."""
    mean = masked_mean(weights, mask)
    return {
        "importance/mean": mean,
        "importance/effective": jnp.square(mean) / jnp.maximum(masked_mean(jnp.square(weights), mask), 1e-12),
        "importance/clipped": masked_mean(((weights >= cap) | (weights == 0)).astype(jnp.float32), mask),
    }
