"""Opens what episodes use: sandbox, tools, grader and environment, by their names in the config."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from open_agentrl_jax.agent.environment import Environment, Reward, Tool, ToolEnvironment
from open_agentrl_jax.agent.harness import Harness, split
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.config import NAME, Config, row_config
from open_agentrl_jax.data.prompts import Reader
from open_agentrl_jax.reference.behaviour import BEHAVIOURS
from open_agentrl_jax.rewards.graders import grade
from open_agentrl_jax.sandbox import confine
from open_agentrl_jax.sandbox.client import Sandbox, SandboxSpec, open_sandbox
from open_agentrl_jax.types import UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass
class World:
    """Opened once per run; each episode makes its own environment in it."""

    sandbox: Sandbox
    tools: list[Tool]
    reward: Reward
    make: Callable[..., Environment]
    schemas: list[dict[str, Any]]  # what the chat template shows
    harness: Harness | None = None  # plays in place of the episode loop
    endpoint: Any = None  # a serve.capture.Capture, with a harness
    rows: list[World] = dataclasses.field(default_factory=list)  # of `data.sources`, in the same sandbox

    def environment(
        self, *, shorten: Callable[[str], str], session: str = "", reward: Reward | None = None
    ) -> Environment:
        """Makes the environment of one episode; `reward` replaces the run's, e.g. if nothing is graded."""
        return self.make(self.tools, reward or self.reward, shorten=shorten, session=session)

    async def close(self) -> None:
        """Closes tools and sandbox."""
        inner = [part for row in self.rows for part in (row.endpoint, *row.tools)]
        for part in (*inner, self.endpoint, *self.tools, self.sandbox):
            if (close := getattr(part, "close", None)) is not None:
                await close()


def open_world(config: Config, *, tools: bool = True, sandbox: Sandbox | None = None) -> World:
    """Opens the sandbox and the objects named by `agent.tools`, `agent.environment` and `reward.grader`.

    Args:
        config: names and limits.
        tools: False opens no tools (tool-free evaluation).
        sandbox: an open sandbox to use.

    Raises:
        UserError: no isolation is available, a name cannot be imported, an MCP server does not start, or two tools have
            the same name.
    """
    behaviour = BEHAVIOURS[config.behaviour]
    harness = open_harness(config) if tools else None
    if config.agent.environment:
        make = load("agent.environment", config.agent.environment)
    else:
        make = functools.partial(ToolEnvironment, first_call_only=behaviour.first_call_only)
    own = load("reward.grader", config.reward.grader) if config.reward.grader else None
    sandbox = sandbox or open_sandbox(spec_of(config))
    opened: list[Tool] = []
    try:
        for name in config.agent.tools if tools and harness is None else ():
            opened += open_tools(config, name, sandbox)
            _check(opened, name)
        reward = own or functools.partial(grade, sandbox=sandbox, mode=behaviour.mode)
        world = World(sandbox, opened, reward, make, [])
        world.schemas = list(world.environment(shorten=str).tools) if tools else []
        if harness is not None:
            from open_agentrl_jax.serve.capture import Capture  # imported late: it needs the extra [servers]

            world.harness, world.endpoint = harness, Capture()
        for source in config.data.sources if tools else ():
            world.rows.append(open_world(row_config(config, source), sandbox=sandbox))
        return world
    except BaseException:
        for part in (*opened, sandbox):
            if (stop := getattr(part, "stop", None)) is not None:
                stop()
        raise


def open_harness(config: Config) -> Harness | None:
    """The harness of `agent.harness`; None if the episode loop plays.

    Raises:
        UserError: there is no such program or function.
    """
    given = config.agent.harness
    if given.function:
        return Harness(function=load("agent.harness.function", given.function))
    if not given.command:
        return None
    try:
        split(given.command)
    except ValueError as error:
        raise UserError(f"agent.harness.command: {error}; give a command line such as 'python my_agent.py'") from None
    if not confine.available():
        log.warning("agent.harness: this kernel has no Landlock, so the command may write anywhere")
    return Harness(given.command, variables=tuple(given.variables))


def open_tools(config: Config, name: str, sandbox: Sandbox) -> list[Tool]:
    """Opens the tools of one entry of `agent.tools`."""
    if name == "python":
        limits = {"timeout": config.sandbox.timeout, "memory_mb": config.sandbox.memory_mb}
        mode, persistent = BEHAVIOURS[config.behaviour].mode, config.agent.python.persistent
        return [PythonTool(sandbox, mode=mode, persistent=persistent, **limits)]
    if name.startswith("mcp:"):
        from open_agentrl_jax.agent.mcp_tool import open_server

        return list(open_server(name.removeprefix("mcp:"), deadline=config.agent.call_seconds))
    return [load("agent.tools", name)()]


def reader_of(config: Config) -> str | Reader:
    """The name of a format, or the function that `data.format` names."""
    return load("data.format", config.data.format) if ":" in config.data.format else config.data.format


def spec_of(config: Config) -> SandboxSpec:
    """The sandbox settings of the config."""
    sandbox = config.sandbox
    return SandboxSpec(
        urls=tuple(sandbox.urls), max_active=sandbox.max_active, unsafe_no_isolation=sandbox.unsafe_no_isolation
    )


def load(field: str, name: str) -> Any:
    """Imports "module:attribute".

    Args:
        field: config field, for the error message.
        name: a module in the current folder or an installed one, and a callable in it.

    Raises:
        UserError: the import fails, or the object is not callable.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{field}={name}: write 'module:name', e.g. 'mine:make' of a mine.py beside you")
    module, _, attribute = name.partition(":")
    try:
        found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as error:  # user code may raise anything; report it in one line
        text = " ".join(str(error).split())
        cure = "the module must lie in the folder the command is run from, or be installed"
        raise UserError(f"{field}={name}: {type(error).__name__}: {text}; {cure}") from error
    if not callable(found):
        raise UserError(f"{field}={name}: is a {type(found).__name__}; name a function or a class")
    return found


def _check(tools: list[Tool], name: str) -> None:
    """Checks that the last added tools have the tool interface and distinct names."""
    for tool in tools:
        if not (callable(tool) and isinstance(getattr(tool, "schema", None), dict) and hasattr(tool, "name")):
            kind = type(tool).__name__
            raise UserError(f"agent.tools={name}: made a {kind}; a tool has a name and a schema, and can be called")
        if tool.schema.get("function", {}).get("name") != tool.name:
            raise UserError(f"agent.tools={name}: the schema of {tool.name!r} shows another name; make them equal")
    names = [tool.name for tool in tools]
    for twin in {tool for tool in names if names.count(tool) > 1}:
        raise UserError(f"agent.tools={name}: there are two tools called {twin!r}; leave one out, or rename it")
