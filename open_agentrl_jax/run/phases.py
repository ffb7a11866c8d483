"""The phases of a run: SFT, then evaluation, RL and evaluation. Every process plays its share of the episodes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from open_agentrl_jax.data.loader import Mixture, task_stream
from open_agentrl_jax.models import hf, peft
from open_agentrl_jax.parallel.mesh import launching
from open_agentrl_jax.parallel.sharding import placer
from open_agentrl_jax.reference.behaviour import BEHAVIOURS
from open_agentrl_jax.rollout.scheduler import Share
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.engines import open_generation
from open_agentrl_jax.run.opened import OpenRun
from open_agentrl_jax.run.policy import choose_packing
from open_agentrl_jax.run.rollouts import SharedRollouts, evaluator, open_scheduler
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.checkpoint import Progress
from open_agentrl_jax.train.learner import Learner
from open_agentrl_jax.train.loop import HeldOut, train_rl
from open_agentrl_jax.train.optimizer import Optimizer, make_optimizer, rates
from open_agentrl_jax.train.sft import train_sft
from open_agentrl_jax.train.shares import rows_of
from open_agentrl_jax.train.step import likelihood, make_score, make_step, policy_gradient, selection
from open_agentrl_jax.types import Task, UserError


def run_sft(
    run: OpenRun, conversations: Mixture[Any], steps: int, state: states.TrainState | None, progress: Progress
) -> states.TrainState:
    """The warm start, from `progress` on."""
    config, policy = run.config, run.policy
    optimizer = make_optimizer(config.sft.optim, steps)
    state = state or states.create(policy.params, optimizer)
    if progress.step >= steps:
        return state
    examples = [inputs.sft_examples(config, run.chat, source) for source in conversations.sources]
    step = make_step(policy.config, optimizer, likelihood, token_count=BEHAVIOURS[config.behaviour].sft_token_count)
    step = functools.partial(step, frozen=policy.frozen)
    return train_sft(
        state,
        step,
        task_stream(examples, config.seed, weights=conversations.weights),
        run.phase("SFT", steps - progress.step),
        steps=steps,
        batch_size=config.sft.batch_size,
        packing=choose_packing(config, config.sft.max_length, policy.mesh),
        place=placer(policy.mesh),
        start=progress.step,
        rates=rates(config.sft.optim, steps),
    )


def run_rl(
    run: OpenRun,
    tasks: Mixture[Task],
    held_out: Sequence[Task],
    steps: int,
    state: states.TrainState | None,
    progress: Progress,
) -> Any:
    """Evaluation, RL and evaluation again; returns the parameters."""
    config, rl = run.config, run.config.rl
    if progress.phase == "sft":
        state, progress = None, Progress("rl", 0)
    elif state is not None:
        run.policy.params = state.params
    params = run.policy.params
    if not steps and not held_out:
        return params
    optimizer = make_optimizer(rl.optim, steps * rl.mini_batches)
    generation = open_generation(config, run.policy, run.loop, run.directory)
    with contextlib.ExitStack() as stack:
        stack.callback(generation.close)
        generation.publish(params, progress.step)
        evaluate = evaluator(run, generation, held_out) if held_out else None
        if progress.step == 0 and evaluate is not None:
            refuse_weak_start(evaluate(0), rl.min_accuracy if steps else 0.0)
        if state is None:
            # jit places each moment where its parameter lies. The parameters themselves are not copied.
            def rest(params: Any) -> states.TrainState:
                made = states.create(params, optimizer, entropy_coef=rl.loss.entropy_coef)
                return dataclasses.replace(made, params=None)

            state = dataclasses.replace(jax.jit(rest)(params), params=params)
        assert state is not None
        if progress.step < steps:
            learner = make_learner(run, state, optimizer, steps)
            if rl.loss.kl_coef > 0:
                learner.reference = reference_policy(run, params, begins=progress.step == 0)
            rollouts = SharedRollouts(
                open_scheduler(run, generation, tasks, steps, progress), rl.prompts, config.agent.max_errors
            )
            stack.callback(rollouts.close)
            state = train_rl(
                learner,
                rollouts,
                generation.publish,
                HeldOut(evaluate, config.eval.every, steps, progress.best, progress.evaluated),
                run.phase("RL", steps - progress.step),
                steps=steps,
                start=progress,
                engine_metrics=lambda: generation.metrics() | rollouts.metrics(),
            )
        if steps and evaluate is not None:
            evaluate(steps)
        return state.params


def refuse_weak_start(accuracy: float | None, least: float) -> None:
    """Raises a UserError if RL would start from an accuracy below `least`."""
    if least and (accuracy is None or accuracy < least):
        was = "no held-out episode was graded" if accuracy is None else f"accuracy after SFT is {accuracy:.3f}"
        raise UserError(
            f"{was}, below rl.min_accuracy={least}: RL from there collapses; raise sft.steps or give better data.sft"
        )


def make_learner(run: OpenRun, state: states.TrainState, optimizer: Optimizer, steps: int) -> Learner:
    """The compiled functions of RL around a state."""
    config, model, loss = run.config, run.policy.config, run.config.rl.loss
    behaviour, temperature = BEHAVIOURS[config.behaviour], config.rollout.temperature
    step = make_step(
        model,
        optimizer,
        policy_gradient(loss, width=config.agent.max_response),
        entropy_target=loss.entropy_target,
        token_count=behaviour.rl_token_count,
        temperature=temperature,
        # The reference computes all statistics of a loss per micro-batch, its token count included.
        select=selection(loss) if behaviour.rl_token_count is None else None,
    )
    packing = choose_packing(config, config.agent.max_prompt + config.agent.max_response, run.policy.mesh)
    rows = rows_of(run.policy.mesh, packing.rows)
    count = jax.process_count()
    alone = (lambda function: function) if run.policy.mesh is None else exclusive
    return Learner(
        state=state,
        step=alone(functools.partial(step, frozen=run.policy.frozen)),
        score=alone(functools.partial(make_score(model, temperature=temperature), frozen=run.policy.frozen)),
        place=placer(run.policy.mesh, rows.mine, rows=packing.rows),
        advantages=behaviour.advantages,
        rl=config.rl,
        packing=packing,
        rates=rates(config.rl.optim, steps * config.rl.mini_batches),
        places=[Share(config.rl.prompts, index, count).places for index in range(count)],
        rows=rows,
    )


def exclusive(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, never dispatched to the devices of a mesh at the same time as the embedded engine's programs."""

    def call(*arguments: Any) -> Any:
        with launching:
            return function(*arguments)

    return call


def reference_policy(run: OpenRun, params: Any, *, begins: bool) -> Any:
    """The parameters that RL began with, kept in a folder of their own for continued runs.

    Of a policy with adapters those alone: the frozen weights serve both.
    """
    folder, policy = run.directory / "reference", run.policy
    if policy.config.lora is not None:
        if begins:
            peft.save_adapter(folder, policy.config, params, base=run.config.model.path)
        return peft.load_adapter(folder, policy.config, policy.mesh)
    if begins:
        hf.save_pretrained(folder, policy.config, params, dtype="float32")
    return hf.load_pretrained(folder, policy.mesh, "float32")[1]
