"""A run whose directory, policy and world are open: what its phases share."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.config import Config
from open_agentrl_jax.parallel import processes
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run.policy import Policy
from open_agentrl_jax.run.world import World
from open_agentrl_jax.telemetry.screen import Screen
from open_agentrl_jax.telemetry.writer import Writer
from open_agentrl_jax.train.checkpoint import Checkpoints
from open_agentrl_jax.train.progress import Profiler, Run, Stopper


@dataclasses.dataclass
class OpenRun:
    """Shared by the phases of one run."""

    config: Config
    directory: Path
    policy: Policy
    chat: Chat
    loop: EventLoop
    world: World
    screen: Screen
    writer: Writer
    checkpoints: Checkpoints
    stopper: Stopper
    profile: bool = False

    def phase(self, name: str, steps: int) -> Run:
        """What the loop of a phase needs of the run.

        Args:
            name: shown beside the bar.
            steps: left to do.
        """
        traced = self.profile and processes.first()
        return Run(
            self.writer,
            self.checkpoints,
            self.stopper,
            self.config.checkpoint.every,
            functools.partial(self.screen.bar, name),
            mark=Profiler(self.directory / "profile" / name.lower(), steps=steps) if traced else lambda: None,
        )
