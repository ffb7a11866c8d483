"""The update: splits change nothing, tool tokens get no gradient, what is not finite is skipped."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from open_agentrl_jax.config import Loss, Optim
from open_agentrl_jax.models import lora, qwen
from open_agentrl_jax.models.config import Lora
from open_agentrl_jax.planning import flops
from open_agentrl_jax.reference.behaviour import REFERENCE
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.optimizer import make_optimizer, rates
from open_agentrl_jax.train.packing import Example, pack
from open_agentrl_jax.train.step import likelihood, make_score, make_step, policy_gradient, selection
from tests.devices import fake
from tests.train.tiny import MODEL, examples

ROOT = pathlib.Path(__file__).parents[2]


SGD = optax.sgd(1.0)
sgd_step = functools.cache(functools.partial(make_step, MODEL, SGD))  # compiled once for each shape of a batch


def gradient(batch_and_used, objective, **kwargs):
    """The gradient, read off a plain SGD step."""
    params = qwen.init(MODEL, 0)
    batch, used = batch_and_used
    new, metrics = sgd_step(objective, **kwargs)(
        states.create(jax.tree.map(jnp.copy, params), SGD), jax.tree.map(jnp.asarray, batch), np.int32(used)
    )
    return jax.tree.map(lambda a, b: np.asarray(a - b), params, new.params), metrics


def difference(a, b):
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(a)


OBJECTIVES = {
    "sft": likelihood,
    "tcr": policy_gradient(Loss(), width=16),
    "scr": policy_gradient(
        Loss(ratio="sequence", aggregate="seq-mean-token-mean", dual_clip=0.0, clip_low=0.5, clip_high=0.5), width=16
    ),
    "everything": policy_gradient(
        Loss(
            kl_coef=0.1,
            entropy_coef=0.01,
            aggregate="seq-mean-token-sum",
            importance_level="sequence",
            importance_cap=5.0,
        ),
        width=16,
    ),
}


@pytest.mark.parametrize("name", ["q", "down"])
def test_a_step_of_full_rank_adapters_is_the_full_step_of_their_matrix(name):
    """With A the identity, B zero and scale 1, the gradient of B is that of the matrix."""
    module = {"q": "q_proj", "down": "down_proj"}[name]
    base = qwen.init(MODEL, 0)
    rank = base["layers"][name].shape[1]
    model = dataclasses.replace(MODEL, lora=Lora(rank, alpha=rank, targets=(module,)))
    layers = lora.init(model, 0)["layers"]
    a = jnp.tile(jnp.eye(rank), (MODEL.num_layers, 1, 1))
    state = states.create({"layers": layers | {name + "_lora_a": jnp.copy(a)}}, SGD)
    batch, used = pack(examples(8), rows=2, length=28, micro_batches=4)
    new, _ = make_step(model, SGD, likelihood)(state, jax.tree.map(jnp.asarray, batch), np.int32(used), frozen=base)
    np.testing.assert_array_equal(new.params["layers"][name + "_lora_a"], a)
    moved = base["layers"][name] - lora.merge(lora.join(base, new.params), model)["layers"][name]
    full = gradient((batch, used), likelihood)[0]["layers"][name]
    np.testing.assert_allclose(moved, full, atol=1e-5 * np.abs(full).max())


def test_gradients_moments_and_checkpoints_are_of_adapters_alone():
    model = dataclasses.replace(MODEL, lora=Lora(2))
    optimizer = make_optimizer(Optim(), 10)
    frozen, adapters = lora.abstract(model)
    state = states.abstract(adapters, optimizer, None)
    numbers = sum(x.size for x in jax.tree.leaves(adapters))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * numbers
    batch, used = pack(examples(8), rows=2, length=28, micro_batches=4)
    traced = make_step(model, optimizer, likelihood).trace(state, batch, used, frozen=frozen)
    plain = make_step(MODEL, optimizer, likelihood)
    whole = plain.trace(states.abstract(qwen.abstract_params(MODEL), optimizer, None), batch, used)
    assert jax.tree.structure(traced.out_info[0].params) == jax.tree.structure(adapters)
    # Forward and backward take 2 operations each per weight and token; a third 2 are for the gradients of weights.
    assert flops.count(traced.jaxpr).products < 0.9 * flops.count(whole.jaxpr).products


@pytest.mark.parametrize("kind", ["clip_cov", "kl_cov"])
def test_covariances_are_of_the_whole_mini_batch(kind):
    loss, examples_ = Loss(policy=kind), examples(8)
    for example in examples_:
        example.advantage *= 9.0  # covariances within the band
    select = functools.partial(selection(loss), share=0.05)
    layouts = [{"rows": 8, "length": 14, "micro_batches": 1}, {"rows": 1, "length": 28, "micro_batches": 8}]
    objective = policy_gradient(loss, width=16)
    (one, numbers), (split, others) = (gradient(pack(examples_, **x), objective, select=select) for x in layouts)
    assert numbers["actor/pg_clipfrac"] > 0
    assert float(others["actor/pg_clipfrac"]) == pytest.approx(float(numbers["actor/pg_clipfrac"]), rel=1e-5)
    assert difference(one, split) < 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_and_micro_batches_do_not_change_the_gradient(name):
    """Fault 1 of the reference; and packing equals one sequence a row."""
    batches = examples(8)
    layouts = [(8, 14, 1), (2, 28, 4)] + [(1, 14, 8), (3, 40, None)] * (name == "tcr")
    grads = [gradient(pack(batches, rows=r, length=t, micro_batches=m), OBJECTIVES[name])[0] for r, t, m in layouts]
    for other in grads[1:]:
        assert difference(grads[0], other) < 1e-5


def test_the_reference_does_depend_on_the_split():
    batches = examples(8)
    objective = policy_gradient(Loss(), width=16)
    grads = [
        gradient(pack(batches, rows=r, length=14), objective, token_count=REFERENCE.rl_token_count)[0] for r in (8, 1)
    ]
    assert difference(*grads) > 1e-2
    summed = [
        gradient(pack(batches, rows=r, length=14), likelihood, token_count=REFERENCE.sft_token_count)[0] for r in (8, 2)
    ]
    norms = [np.sqrt(sum((x * x).sum() for x in jax.tree.leaves(g))) for g in summed]
    assert norms[1] > 2 * norms[0]  # fault 3: four micro-batches add up


def test_only_masked_targets_matter():
    """Tool tokens never train; the stop token, last of a turn, does."""
    one = examples(1)[0]
    base, _ = gradient(pack([one], rows=1, length=14), likelihood)
    tokens = one.tokens.copy()
    tokens[-1] = (tokens[-1] + 1) % 64  # the stop token: masked
    changed, _ = gradient(pack([dataclasses.replace(one, tokens=tokens)], rows=1, length=14), likelihood)
    assert difference(base, changed) > 1e-3
    mask = one.mask.copy()
    mask[-1] = False
    unmasked = dataclasses.replace(one, mask=mask)
    a, _ = gradient(pack([unmasked], rows=1, length=14), likelihood)
    b, _ = gradient(pack([dataclasses.replace(unmasked, tokens=tokens)], rows=1, length=14), likelihood)
    assert difference(a, b) == 0


def test_log_probs_equal_the_forward_pass():
    batch, used = pack(examples(5), rows=2, length=20, micro_batches=4)
    params = qwen.init(MODEL, 1)
    scores = make_score(MODEL, temperature=0.7)(params, jax.tree.map(jnp.asarray, batch), np.int32(used))
    hidden = qwen.forward(
        params, MODEL, *(getattr(batch, n).reshape(-1, 20) for n in ("tokens", "positions", "segment_ids"))
    )
    logp = jax.nn.log_softmax(qwen.logits(params, MODEL, hidden) / 0.7)
    expected = np.take_along_axis(np.asarray(logp), batch.targets.reshape(-1, 20, 1), -1)[..., 0]
    expected = np.where(batch.mask.reshape(-1, 20), expected, 0).reshape(scores.shape)
    np.testing.assert_allclose(scores, expected, atol=2e-5)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted():
    optimizer = make_optimizer(Optim(lr=1e-2), 10)
    step = make_step(MODEL, optimizer, policy_gradient(Loss(), width=16))
    batch, used = pack(examples(4), rows=2, length=28)
    batch.advantages[batch.mask] = np.inf
    state = states.create(qwen.init(MODEL, 0), optimizer)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, metrics = step(state, jax.tree.map(jnp.asarray, batch), np.int32(used))
    assert int(state.skipped) == 1 and int(state.updates) == 1 and not np.isfinite(metrics["actor/grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.opt_state))


def test_moments_in_host_memory_change_no_bit():
    """Three updates, the second of which is skipped; the moments stay where they are."""
    batch, used = pack(examples(4), rows=2, length=28)
    spoilt = dataclasses.replace(batch, advantages=np.where(batch.mask, np.inf, 0).astype(np.float32))

    def after(offload):
        optimizer = make_optimizer(Optim(lr=1e-2, warmup=2, offload=offload), 10)
        step = make_step(MODEL, optimizer, policy_gradient(Loss(), width=16))
        state = states.create(qwen.init(MODEL, 0), optimizer)
        for each in (batch, spoilt, batch):
            state, _ = step(state, jax.tree.map(jnp.asarray, each), np.int32(used))
        assert int(state.skipped) == 1
        return state

    here, there = after(False), after(True)
    # XLA is free to contract sums in a loop otherwise: on jax 0.12 a parameter's last bit differs, on 0.10.2 none.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal if jax.__version__ == "0.10.2" else close, here, there)
    kinds = {x.ndim > 0: x.sharding.memory_kind for x in jax.tree.leaves(there.opt_state)}
    assert kinds == {True: "pinned_host", False: "device"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves((here, there.params))} == {"device"}


def test_one_gradient_is_held_however_many_micro_batches_there_are():
    """Accumulated in the backward pass itself; beside a sum of its own it would be two (2.3 times the parameters)."""
    model = dataclasses.replace(MODEL, hidden_size=128, intermediate_size=512, num_layers=6, remat="full")
    state = jax.eval_shape(lambda p: states.create(p, optax.sgd(1.0)), qwen.abstract_params(model))
    batch, _ = pack(examples(4), rows=1, length=14)
    step = make_step(model, optax.sgd(1.0), likelihood, chunk=16)
    memory = step.lower(state, jax.tree.map(jnp.asarray, batch), np.int32(4)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.7 * sum(x.size * 4 for x in jax.tree.leaves(state.params))


def test_entropy_is_pushed_towards_its_target():
    optimizer = optax.sgd(1e-2)
    loss = Loss(entropy_target=100.0)
    step = make_step(MODEL, optimizer, policy_gradient(loss, width=16), entropy_target=loss.entropy_target)
    batch, used = pack(examples(4), rows=2, length=28)
    state = states.create(qwen.init(MODEL, 0), optimizer)
    state, _ = step(state, jax.tree.map(jnp.asarray, batch), np.int32(used))
    assert float(state.entropy_coef) == pytest.approx(0.05)


def test_schedules():
    cosine = rates(Optim(lr=1.0, schedule="cosine", warmup=0.1), 100)
    assert cosine[0] == pytest.approx(0.1) and cosine[9] == pytest.approx(1.0) and cosine[-1] < 0.01
    assert (np.diff(cosine[10:]) <= 0).all()
    assert (rates(Optim(lr=2.0), 5) == 2.0).all()
    assert rates(Optim(lr=1.0, warmup=4), 6).tolist() == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_sft_learns_a_sequence():
    optimizer = make_optimizer(Optim(lr=1e-2, b2=0.95), 60)
    step = make_step(MODEL, optimizer, likelihood)
    one = Example(np.arange(10, dtype=np.int32), np.ones(10, bool))
    batch, used = pack([one], rows=1, length=16)
    batch = jax.tree.map(jnp.asarray, batch)
    state = states.create(qwen.init(MODEL, 0), optimizer)
    for _ in range(60):
        state, metrics = step(state, batch, np.int32(used))
    assert metrics["actor/loss"] < 0.05


@pytest.mark.slow
def test_an_update_on_any_mesh_is_that_of_one_device():
    """Scores, parameters after AdamW and metrics, for three objectives; each leaf lies where the table says."""
    program = [sys.executable, "-m", "tests.train.eight_devices"]
    done = subprocess.run(program, cwd=ROOT, env=os.environ | fake(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case in json.loads(done.stdout):
        assert case["placed"], case
        assert case["scores"] < 1e-6 and case["metrics"] < 1e-5 and case["params"] < 1e-5, case
