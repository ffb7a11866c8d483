"""The whole recipe: SFT warm start, GRPO-TCR, evaluation, export.

    python -m launch.train --config=configs/quickstart.py

The same command continues a run that was stopped or killed. Resume goes in this order: (1) the run directory,
fetched from `checkpoint.copy_to` where it is not here, must be of the same config; (2) the newest checkpoint that can
be read gives parameters, optimizer, counters and progress; (3) metrics.jsonl and trajectories.jsonl are cut to the
length they had then; (4) SFT or RL goes on at the next step; (5) problems that were started and not trained are played
again, with the same draws.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch import command
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.config import Config, Optim, to_dict
from open_agentrl_jax.data.loader import Mixture
from open_agentrl_jax.models import hf
from open_agentrl_jax.models.folders import check_target
from open_agentrl_jax.parallel import agreement, processes
from open_agentrl_jax.parallel.mesh import count_devices, initialize_distributed
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.directory import claim_directory, fingerprint, lock_directory, run_id, undone_if_refused
from open_agentrl_jax.run.doctor import preflight
from open_agentrl_jax.run.engines import check_generation
from open_agentrl_jax.run.phases import Parts, run_rl, run_sft
from open_agentrl_jax.run.policy import Policy, choose_packing, load_policy, make_chat, mesh_of, open_folder
from open_agentrl_jax.run.world import World, open_world
from open_agentrl_jax.telemetry.report import write_report
from open_agentrl_jax.telemetry.screen import Screen, curve
from open_agentrl_jax.telemetry.writer import Silent, Writer
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.checkpoint import Checkpoints, Progress
from open_agentrl_jax.train.mirror import Mirror
from open_agentrl_jax.train.progress import Interrupted, Stopper
from open_agentrl_jax.types import Task


def updates_of(config: Config, conversations: int, problems: int) -> tuple[int, int]:
    """Steps of SFT and of RL: as given, or as many as the epochs take."""
    sft, rl = config.sft, config.rl
    sft_steps = sft.steps or math.ceil(sft.epochs * conversations / sft.batch_size)
    return sft_steps, rl.steps or math.ceil(rl.epochs * problems / rl.prompts)


def abstract(policy: Policy, optim: Optim, updates: int) -> Callable[[], states.TrainState]:
    """What gives a phase's state as shapes and shardings, to restore into."""

    return lambda: states.abstract(policy.params, states.make_optimizer(optim, updates), policy.mesh)


def main(config: Config, *, profile: bool = False) -> int:
    """Runs, or goes on with, one experiment; with `profile`, two steps of each phase are traced."""
    with undone_if_refused(Path(config.directory)):
        return experiment(config, profile)


def experiment(config: Config, profile: bool) -> int:
    """As `main`; a mistake told late leaves what was made until then."""
    started = time.monotonic()
    initialize_distributed()
    agreement.agree({"config": to_dict(config), "code": agreement.code_version()})
    mirror, directory = processes.first_then_all(lambda: (open_mirror(config), claim_directory(config)))
    stopper = Stopper(processes.any_of)
    stopper.install()
    loop = EventLoop()
    with Screen(quiet=not processes.first()) as screen:
        screen.say(count_devices())
        screen.say(f"run {config.name}: {directory}")
        choose_packing(config, 1, mesh_of(config))  # what the mesh does not divide is told before loading
        check_target(directory / "export")
        preflight(config, screen.say, screen.table)
        folder = open_folder(config, directory)
        if processes.first() and (config.rl.steps or config.rl.epochs or config.data.eval):
            check_generation(config)  # servers are missed now, not after SFT
        world: Any = open_world(config) if processes.first() else None
        checkpoints = Checkpoints(
            directory / "checkpoints",
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            mirror=mirror,
        )
        try:
            chat = make_chat(config, folder.tokenizer, processes.share(world.schemas if world else []))
            tasks, held_out, conversations = load_data(config, directory, chat, world, loop, screen)
            policy = load_policy(config, folder)  # after the data: weights take longest
            sft_steps, rl_steps = updates_of(config, len(conversations), len(tasks))
            rl_updates = rl_steps * config.rl.mini_batches
            restored = checkpoints.restore(
                {
                    "sft": abstract(policy, config.sft.optim, sft_steps),
                    "rl": abstract(policy, config.rl.optim, rl_updates),
                }
            )
            state, progress = restored or (None, Progress("sft", 0))
            if restored:
                screen.say(f"resumed: {progress.phase} step {progress.step} is done")
            writer = open_writer(config, directory, progress, chat.tools) if processes.first() else Silent()
            parts = Parts(config, directory, policy, chat, loop, world, screen, writer, checkpoints, stopper, profile)
            try:
                if progress.phase == "sft":
                    state = run_sft(parts, conversations, sft_steps, state, progress)
                    policy.params = state.params
                params = run_rl(parts, tasks, held_out, rl_steps, state, progress)
            except Interrupted:
                checkpoints.close()
                screen.say("SIGTERM: saved; the same command goes on from here")
                return 0
            finally:
                writer.close()
            export(parts, params)
            if processes.first():
                write_report([directory])
                if mirror is not None:
                    mirror.finish()
                closing(parts, time.monotonic() - started)
        finally:
            checkpoints.close()
            if world is not None:
                loop.run(world.close())
            loop.close()
    return 0


def open_mirror(config: Config) -> Mirror | None:
    """The copy of the run, downloaded if there is no run here; None if no copy is wanted or another process copies."""
    if not config.checkpoint.copy_to or not processes.first():
        return None
    directory = Path(config.directory).absolute()
    lock_directory(directory)
    mirror = Mirror(directory, config.checkpoint.copy_to, fingerprint(config))
    mirror.fetch()
    return mirror


def open_writer(config: Config, directory: Path, progress: Progress, tools: Sequence[dict[str, Any]]) -> Writer:
    """The run's files, cut to their lengths in `progress`."""
    return Writer(
        directory,
        offsets=progress.offsets,
        tools=tools,
        tensorboard=config.telemetry.tensorboard,
        wandb_project=config.telemetry.wandb_project,
        run_id=run_id(directory),
        config=to_dict(config),
    )


def load_data(config: Config, directory: Path, chat: Chat, world: World | None, loop: EventLoop, screen: Screen):
    """Problems to train on, held-out problems and SFT conversations, as far as the config names them."""

    tasks, conversations = Mixture[Task]([], []), Mixture[Any]([], [])
    held_out: list[Task] = []
    notes: list[str] = []
    if config.data.train and (config.rl.steps or config.rl.epochs):
        tasks, notes = inputs.training_problems(config, chat)
    if config.data.eval:
        found, more = inputs.problems(config, config.data.eval, chat, evaluation=True)
        held_out, notes = list(found), notes + more
        inputs.refuse_overlap(tasks, held_out)
    for note in notes:
        screen.say(note)
    if config.data.sft and (config.sft.steps or config.sft.epochs):
        sandbox: Any = world and world.sandbox
        conversations = processes.first_then_all(lambda: inputs.demonstrations(config, directory, sandbox, loop.run))
    return tasks, held_out, conversations


def export(parts: Parts, params: Any) -> None:
    """The Hugging Face folder of the run."""
    dtype = parts.policy.config.compute_dtype
    hf.save_pretrained(
        parts.directory / "export",
        parts.policy.config,
        params,
        dtype=dtype,
        tokenizer_from=parts.policy.tokenizer_path,
        stop_ids=parts.chat.stop_ids,
    )


def closing(parts: Parts, seconds: float) -> None:
    """The table before / after, the reward curve, and where everything lies."""
    lines = [json.loads(line) for line in (parts.directory / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["phase"] == "eval"]
    names = ("accuracy/mean", "reward/mean", "tool_calls/mean", "tool_success/mean", "response_length/mean")
    if evals:
        first, last = evals[0], evals[-1]
        rows = [[name, f"{first[name]:.3f}", f"{last[name]:.3f}"] for name in names if name in first and name in last]
        parts.screen.table("held-out problems", ["", "before RL", "after RL"], rows)
    rewards = [line["reward/mean"] for line in lines if line["phase"] == "rl" and line.get("reward/mean") is not None]
    if rewards:
        parts.screen.say(f"reward by step  {curve(rewards)}")
    parts.screen.say(f"{seconds:.0f} s; in {parts.directory}:")
    for name in ("config.json", "metrics.jsonl", "trajectories.jsonl", "report.html", "checkpoints/", "export/"):
        parts.screen.say(f"  {name}")


if __name__ == "__main__":
    load = command.config_flag()
    profile = command.profile_flag()
    command.run(lambda: main(load(), profile=profile.value))
