"""A whole run: SFT warm start, evaluation, RL, evaluation, export; resumable at any point.

A run resumes in this order: (1) the run directory, restored from `checkpoint.copy_to` if it is missing, must belong to
the same config and data; (2) the newest readable checkpoint gives parameters, optimizer, counters and progress;
(3) metrics.jsonl and the trajectory files are cut to their length at that checkpoint; (4) SFT or RL continues with
the next step; (5) problems that were started but not trained are played again, with the same random draws.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.config import Config, Optim, to_dict
from open_agentrl_jax.data.loader import Mixture
from open_agentrl_jax.models import hf, peft
from open_agentrl_jax.models.folders import check_target
from open_agentrl_jax.parallel import agreement, processes
from open_agentrl_jax.parallel.mesh import count_devices, initialize_distributed
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.directory import (
    claim_data,
    claim_directory,
    fingerprint,
    lock_directory,
    run_id,
    undone_if_refused,
)
from open_agentrl_jax.run.doctor import preflight
from open_agentrl_jax.run.engines import check_generation
from open_agentrl_jax.run.opened import OpenRun
from open_agentrl_jax.run.phases import run_rl, run_sft
from open_agentrl_jax.run.policy import Policy, choose_packing, load_policy, make_chat, mesh_of, open_folder
from open_agentrl_jax.run.world import World, open_world
from open_agentrl_jax.storage import read_text
from open_agentrl_jax.telemetry.report import write_report
from open_agentrl_jax.telemetry.screen import Screen, curve
from open_agentrl_jax.telemetry.writer import TrajectoryWriter, Writer
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.checkpoint import Checkpoints, Progress
from open_agentrl_jax.train.mirror import Mirror
from open_agentrl_jax.train.optimizer import make_optimizer
from open_agentrl_jax.train.progress import Interrupted, Stopper
from open_agentrl_jax.types import Task

SUMMARY = ("accuracy/mean", "reward/mean", "tool_calls/mean", "tool_success/mean", "response_length/mean")


def run_experiment(config: Config, *, profile: bool = False) -> None:
    """Starts or continues the run of a config.

    Args:
        config: valid; see config.validate.
        profile: trace two steps of each phase.

    Raises:
        UserError: something in the config cannot work; a failed first start leaves nothing behind.
    """
    started = time.monotonic()
    initialize_distributed()
    agreement.agree({"config": to_dict(config), "code": agreement.code_version()})
    stopper = Stopper(processes.any_of)
    stopper.install()
    with undone_if_refused(Path(config.directory)), contextlib.ExitStack() as stack:
        mirror, directory = processes.first_then_all(lambda: (open_mirror(config), claim_directory(config)))
        screen = stack.enter_context(Screen(quiet=not processes.first()))
        screen.say(count_devices())
        screen.say(f"run {config.name}: {directory}")
        choose_packing(config, 1, mesh_of(config))  # refuses an indivisible mesh before anything is loaded
        for made in ("export", "adapter"):
            check_target(directory / made)
        preflight(config, screen.say, screen.table)
        folder = open_folder(config, directory)
        if config.rl.steps or config.rl.epochs or config.data.eval:
            processes.in_all(lambda: check_generation(config))  # reports missing servers now, not after SFT
        loop = EventLoop()
        stack.callback(loop.close)
        world = processes.in_all(lambda: open_world(config))
        stack.callback(lambda: loop.run(world.close()))
        kept = config.checkpoint
        checkpoints = Checkpoints(directory / "checkpoints", keep=kept.keep, keep_best=kept.keep_best, mirror=mirror)
        stack.callback(checkpoints.close)
        chat = make_chat(config, folder.tokenizer, world.schemas)
        agreement.agree({"tools": world.schemas})
        processes.first_then_all(lambda: processes.first() and claim_data(directory, config))
        tasks, held_out, conversations = load_data(config, directory, chat, world, loop, screen)
        policy = load_policy(config, folder)  # after the data, because weights take longest
        sft_steps, rl_steps = steps_of(config, len(conversations), len(tasks))
        state, progress = restore(config, checkpoints, policy, sft_steps, rl_steps, screen)
        writer = open_writer(config, directory, progress, chat.tools)
        run = OpenRun(config, directory, policy, chat, loop, world, screen, writer, checkpoints, stopper, profile)
        try:
            with contextlib.closing(writer):
                if progress.phase == "sft":
                    # The moments of SFT are freed: RL has its own.
                    policy.params, state = run_sft(run, conversations, sft_steps, state, progress).params, None
                params = run_rl(run, tasks, held_out, rl_steps, state, progress)
        except Interrupted:
            checkpoints.wait()
            screen.say("interrupted: saved; the same command continues from here")
            return
        dtype = policy.config.compute_dtype
        export = directory / "export"
        if policy.config.lora is not None:
            peft.save_adapter(directory / "adapter", policy.config, params, base=folder.path)
        hf.save_pretrained(
            export,
            policy.config,
            policy.whole(params),
            dtype=dtype,
            tokenizer_from=policy.tokenizer_path,
            stop_ids=chat.stop_ids,
        )
        if processes.first():
            write_report([directory])
            if mirror is not None:
                mirror.finish()
            print_summary(screen, directory, time.monotonic() - started)


def steps_of(config: Config, conversations: int, problems: int) -> tuple[int, int]:
    """Steps of SFT and of RL: as given, or as many as the epochs take."""
    sft, rl = config.sft, config.rl
    sft_steps = sft.steps or math.ceil(sft.epochs * conversations / sft.batch_size)
    return sft_steps, rl.steps or math.ceil(rl.epochs * problems / rl.prompts)


def restore(
    config: Config, checkpoints: Checkpoints, policy: Policy, sft_steps: int, rl_steps: int, screen: Screen
) -> tuple[states.TrainState | None, Progress]:
    """State and progress of the newest checkpoint; None and the beginning of SFT if there is none."""

    def abstract(optim: Optim, updates: int) -> Callable[[], states.TrainState]:
        return lambda: states.abstract(policy.params, make_optimizer(optim, updates), policy.mesh)

    found = checkpoints.restore(
        {
            "sft": abstract(config.sft.optim, sft_steps),
            "rl": abstract(config.rl.optim, rl_steps * config.rl.mini_batches),
        }
    )
    if found is None:
        return None, Progress("sft", 0)
    screen.say(f"resumed: {found[1].phase} step {found[1].step} is done")
    return found


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
    """The files that this process writes, truncated to their length at `progress`."""
    if not processes.first():
        return TrajectoryWriter(directory, jax.process_index(), offsets=progress.offsets, tools=tools)
    return Writer(
        directory,
        processes=jax.process_count(),
        offsets=progress.offsets,
        tools=tools,
        tensorboard=config.telemetry.tensorboard,
        wandb_project=config.telemetry.wandb_project,
        run_id=run_id(directory),
        config=to_dict(config),
    )


def load_data(
    config: Config, directory: Path, chat: Chat, world: World, loop: EventLoop, screen: Screen
) -> tuple[Mixture[Task], list[Task], Mixture[Any]]:
    """Training problems, held-out problems and SFT conversations, as far as the config uses them."""
    tasks, conversations = Mixture[Task]([], []), Mixture[Any]([], [])
    held_out: list[Task] = []
    notes: list[str] = []
    if config.data.problems and (config.rl.steps or config.rl.epochs):
        schemas = [row.schemas for row in world.rows]
        tasks, notes = inputs.training_problems(config, chat, schemas)
    if config.data.eval:
        found, more = inputs.problems(config, config.data.eval, chat, evaluation=True)
        held_out, notes = list(found), notes + more
        inputs.refuse_overlap(tasks, held_out)
    for note in notes:
        screen.say(note)
    if config.data.sft and (config.sft.steps or config.sft.epochs):
        conversations = processes.first_then_all(
            lambda: inputs.demonstrations(config, directory, world.sandbox, loop.run)
        )
    return tasks, held_out, conversations


def graded(line: dict[str, float]) -> str:
    """How many of the episodes behind a line of metrics were graded."""
    return f"{line['episodes'] - line['episodes/aborted']:.0f} of {line['episodes']:.0f}"


def print_summary(screen: Screen, directory: Path, seconds: float) -> None:
    """Prints the held-out metrics before and after RL, the reward curve, and the files of the run."""
    lines = [json.loads(line) for line in read_text(directory / "metrics.jsonl").splitlines()]
    evals = [line for line in lines if line["phase"] == "eval"]
    if evals:
        first, last = evals[0], evals[-1]
        rows = [[name, *(f"{line[name]:.3f}" if name in line else "-" for line in (first, last))] for name in SUMMARY]
        counts = [
            f"{line['episodes'] - line['episodes/aborted']:.0f} of {line['episodes']:.0f}" for line in (first, last)
        ]
        screen.table("held-out problems", ["", "before RL", "after RL"], [*rows, ["episodes graded", *counts]])
    rl = [line for line in lines if line["phase"] == "rl"]
    if rewards := [line["reward/mean"] for line in rl if line.get("reward/mean") is not None]:
        screen.say(f"reward by step  {curve(rewards)}")
    if lost := sum(line["episodes/aborted"] for line in rl):
        screen.say(f"aborted in RL: {lost:.0f} of {sum(line['episodes'] for line in rl):.0f} episodes")
    screen.say(f"{seconds:.0f} s; in {directory}:")
    files = ("config.json", "metrics.jsonl", "trajectories.jsonl", "report.html", "checkpoints/", "export/", "adapter/")
    for name in files:
        if (directory / name).exists():
            screen.say(f"  {name}")
