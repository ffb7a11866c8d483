"""The phases of a run: SFT, then evaluation, GRPO and evaluation. With several processes the first one plays."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.behaviour import BEHAVIOURS
from open_agentrl_jax.config import Config
from open_agentrl_jax.data.loader import Mixture, task_stream
from open_agentrl_jax.models import hf
from open_agentrl_jax.parallel import processes
from open_agentrl_jax.parallel.mesh import launching
from open_agentrl_jax.parallel.sharding import placer
from open_agentrl_jax.rollout.scheduler import EventLoop, Frontier, Scheduler
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.engines import Generation, open_generation
from open_agentrl_jax.run.players import Player, play_through
from open_agentrl_jax.run.policy import Policy, choose_packing
from open_agentrl_jax.run.world import World
from open_agentrl_jax.telemetry.metrics import rollout_metrics
from open_agentrl_jax.telemetry.screen import Screen
from open_agentrl_jax.telemetry.writer import Writer
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.checkpoint import Checkpoints, Progress
from open_agentrl_jax.train.loop import Functions, train_rl
from open_agentrl_jax.train.progress import Interrupted, Profiler, Run, Stopper
from open_agentrl_jax.train.sft import train_sft
from open_agentrl_jax.train.step import likelihood, make_score, make_step, policy_gradient
from open_agentrl_jax.types import Group, Sampling, Task, UserError


@dataclasses.dataclass
class Parts:
    """What the phases of one run share."""

    config: Config
    directory: Path
    policy: Policy
    chat: Chat
    loop: EventLoop
    world: World  # of the first process; the others have none
    screen: Screen
    writer: Writer
    checkpoints: Checkpoints
    stopper: Stopper
    profile: bool = False


def running(parts: Parts, name: str, steps: int) -> Run:
    """The running parts of a phase of which `steps` are left, as its loop sees them."""
    traced = parts.profile and processes.first()
    return Run(
        parts.writer,
        parts.checkpoints,
        parts.stopper,
        parts.config.checkpoint.every,
        functools.partial(parts.screen.bar, name),
        mark=Profiler(parts.directory / "profile" / name.lower(), steps=steps) if traced else lambda: None,
    )


def run_sft(
    parts: Parts, conversations: Mixture[Any], steps: int, state: states.TrainState | None, progress: Progress
) -> states.TrainState:
    """The warm start, from where `progress` stands."""
    config, policy = parts.config, parts.policy
    behaviour = BEHAVIOURS[config.behaviour]
    optimizer = states.make_optimizer(config.sft.optim, steps)
    state = state or states.create(policy.params, optimizer)
    if progress.step >= steps:
        return state
    packing = choose_packing(config, config.sft.max_length, policy.mesh)
    examples = [inputs.sft_examples(config, parts.chat, source) for source in conversations.sources]
    stream = task_stream(examples, config.seed, weights=conversations.weights)
    step_fn = make_step(
        policy.config, optimizer, likelihood, behaviour=behaviour, gradients_summed=behaviour.sft_gradients_summed
    )
    return train_sft(
        state,
        step_fn,
        stream,
        running(parts, "SFT", steps - progress.step),
        steps=steps,
        batch_size=config.sft.batch_size,
        packing=packing,
        place=placer(policy.mesh),
        start=progress.step,
        rates=states.rates(config.sft.optim, steps),
    )


@dataclasses.dataclass
class SharedRollouts:
    """The batches that the first process collects, in every process."""

    scheduler: Scheduler | None  # of the first process

    def next_batch(self, check: Callable[[], None]) -> list[Group]:
        """See Scheduler.next_batch."""
        groups = None
        if self.scheduler is not None:
            with contextlib.suppress(Interrupted):
                groups = self.scheduler.next_batch(check)
        groups = processes.share(groups)
        if groups is None:
            raise Interrupted
        return groups

    def trained(self, groups: Sequence[Group]) -> Frontier:
        """See Scheduler.trained."""
        return processes.share(self.scheduler.trained(groups) if self.scheduler else Frontier())

    def published(self, version: int) -> None:
        """See Scheduler.published."""
        if self.scheduler is not None:
            self.scheduler.published(version)

    def close(self) -> None:
        """See Scheduler.close."""
        if self.scheduler is not None:
            self.scheduler.close()


def evaluator(parts: Parts, generation: Generation, held_out: Sequence[Task]) -> Callable[[int], float]:
    """What plays the held-out problems after a step, writes what came of it, and returns the accuracy."""
    config = parts.config
    sampling = Sampling(0, config.eval.temperature, config.eval.top_p)
    player = Player(config, generation.evaluation, parts.chat, parts.world, sampling, "eval")

    def evaluate(step: int) -> float:
        groups = None
        if processes.first():
            with contextlib.suppress(Interrupted):
                groups = play_through(
                    player,
                    held_out,
                    config.eval.samples,
                    generation.concurrency,
                    parts.loop,
                    lambda done, total: parts.screen.bar(f"eval at {step}", done, total),
                    parts.stopper.check,
                )
        if (groups := processes.share(groups)) is None:
            raise Interrupted
        numbers = rollout_metrics(groups)
        parts.writer.metrics(step, "eval", numbers)
        parts.writer.trajectories(step, "eval", groups)
        return numbers["accuracy/mean"]

    return evaluate


def reference_policy(parts: Parts, params: Any, *, begins: bool) -> Any:
    """The parameters that RL began with, from a folder of their own: what a run resumes from is no longer that."""
    folder = parts.directory / "reference"
    if begins:
        hf.save_pretrained(folder, parts.policy.config, params, dtype="float32")
    return hf.load_pretrained(folder, parts.policy.mesh, "float32")[1]


def run_rl(
    parts: Parts,
    tasks: Mixture[Task],
    held_out: Sequence[Task],
    steps: int,
    state: states.TrainState | None,
    progress: Progress,
) -> Any:
    """Evaluation, GRPO and evaluation again; returns the parameters."""
    config, policy = parts.config, parts.policy
    rl = config.rl
    optimizer = states.make_optimizer(rl.optim, steps * rl.mini_batches)
    if progress.phase == "sft":
        params, state, progress = policy.params, None, Progress("rl", 0)
    else:
        assert state is not None
        params = policy.params = state.params
    if not steps and not held_out:
        return params
    generation = open_generation(config, policy, parts.loop, parts.directory)
    rollouts = SharedRollouts(None)
    try:
        generation.publish(params, progress.step)
        evaluate = evaluator(parts, generation, held_out) if held_out else None
        if progress.step == 0 and evaluate is not None:
            accuracy = evaluate(0)
            if steps and accuracy < rl.min_accuracy:
                raise UserError(
                    f"accuracy after SFT is {accuracy:.3f}, below rl.min_accuracy={rl.min_accuracy}: RL from there "
                    "collapses; raise sft.steps or give better data.sft"
                )
        if state is None:
            initial = rl.loss.entropy_coef
            # Moments are made by jit, so that each lies where its parameter lies; the parameters are copied, since the
            # updates give the state's buffers away while SFT's checkpoint still reads them.
            state = jax.jit(lambda p: states.create(p, optimizer, entropy_coef=initial))(params)
        assert state is not None
        if progress.step < steps:
            reference = reference_policy(parts, params, begins=progress.step == 0) if rl.loss.kl_coef > 0 else None
            if processes.first():
                rollouts.scheduler = scheduler(parts, generation, tasks, steps, progress)
            state = train_rl(
                state,
                functions(parts, optimizer),
                rollouts,
                generation.publish,
                evaluate,
                running(parts, "RL", steps - progress.step),
                rl,
                choose_packing(config, config.agent.max_prompt + config.agent.max_response, policy.mesh),
                BEHAVIOURS[config.behaviour],
                steps=steps,
                start=progress,
                ref_params=reference,
                eval_every=config.eval.every,
                engine_metrics=generation.metrics,
                rates=states.rates(rl.optim, steps * rl.mini_batches),
            )
        if steps and evaluate is not None:
            evaluate(steps)
        return state.params
    finally:
        rollouts.close()
        generation.close()


def scheduler(parts: Parts, generation: Generation, tasks: Mixture[Task], steps: int, progress: Progress) -> Scheduler:
    """Begins to play the problems, from where `progress` stands."""
    config, rl = parts.config, parts.config.rl
    sampling = Sampling(0, config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
    return Scheduler(
        parts.loop,
        Player(config, generation.engine, parts.chat, parts.world, sampling, "rl"),
        task_stream(tasks.sources, config.seed, weights=tasks.weights),
        prompts=rl.prompts,
        samples=rl.samples,
        concurrency=generation.concurrency,
        batches=steps,
        max_staleness=rl.max_staleness,
        filter_groups=rl.filter_groups,
        frontier=Frontier(progress.next, list(progress.pending)),
        version=progress.step,
    )


def functions(parts: Parts, optimizer: Any) -> Functions:
    """The compiled parts of RL."""
    config, model, loss = parts.config, parts.policy.config, parts.config.rl.loss
    temperature = config.rollout.temperature

    def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, never handed to the devices of a mesh at once with what the embedded engine computes on it."""

        def call(*arguments: Any) -> Any:
            with launching:
                return function(*arguments)

        return function if parts.policy.mesh is None else call

    step = make_step(
        model,
        optimizer,
        policy_gradient(loss, width=config.agent.max_response),
        entropy_target=loss.entropy_target,
        behaviour=BEHAVIOURS[config.behaviour],
        temperature=temperature,
    )
    score = make_score(model, temperature=temperature)
    return Functions(step=in_turn(step), score=in_turn(score), place=placer(parts.policy.mesh))
