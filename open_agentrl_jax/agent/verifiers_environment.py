"""Tasks of a `verifiers` taskset in this project's agent loop: prompts, toolsets and rewards (extra [verifiers]).

    taskset = MyTaskset(MyConfig())                                     # or verifiers' load_taskset
    write_tasks("train.parquet", problems(taskset))                     # data.train
    make = Verifiers(taskset)                                           # agent.environment="mine:make"

The episode loop is what `verifiers` calls a harness; toolsets run in this process. Rewards and metrics read a trace,
which is written here in the form of the interception server of `verifiers`. Refused by name: tasks in containers, hooks
that stop or rewrite a conversation, and toolsets that share state or run elsewhere. An `Env` with several agents cannot
be played by one policy.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from open_agentrl_jax.agent.environment import Reward, Step, Tool, ToolEnvironment, ToolResult, ungraded
from open_agentrl_jax.agent.mcp_tool import as_result, schema_of
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.types import Message, Task, ToolCall, UserError

logger = logging.getLogger(__name__)


def problems(tasks: Iterable[Any]) -> list[Task]:
    """Converts the tasks of a taskset (or of a view: `taskset.take(100)`) for `data.prompts.write_tasks`.

    Raises:
        UserError: a task has no prompt.
    """
    made = []
    for task in tasks:
        if not task.data.prompt:
            raise UserError(f"verifiers task {task.data.idx}: has no prompt; simulated users are not supported")
        said = [Message("user", task.data.prompt)] if isinstance(task.data.prompt, str) else _ours(task.data.prompt)
        system = [Message("system", task.data.system_prompt)] if task.data.system_prompt else []
        name = task.data.id or task.data.name or str(task.data.idx)
        made.append(Task(f"verifiers/{name}", [*system, *said], task.key, "verifiers"))
    return made


class Verifiers:
    """Makes one environment per episode; `agent.environment` names an instance.

    The model gets the tools of `agent.tools` and those of the taskset; `()` leaves the latter only. The reward is the
    sum of the task's weighted rewards, `reward.grader` is not used; the accuracy is that sum, clipped to 0..1.

    Args:
        taskset: a `verifiers.v1` Taskset.

    Raises:
        UserError: a kind of task or toolset is not supported.
    """

    def __init__(self, taskset: Any):
        self.tasks = {task.key: task for task in taskset}
        if not self.tasks:
            raise UserError(f"verifiers {type(taskset).__name__}: holds no task")
        for task in self.tasks.values():
            _refuse(task)
        any_task = next(iter(self.tasks.values()))
        self._shared = [_Toolset(toolset) for toolset in taskset.toolsets(taskset.config)]
        self._own: Callable[[Any], list[_Toolset]] = lambda task: [_Toolset(t) for t in task.toolsets(task.config)]
        self._starting = asyncio.Lock()
        self._started = False
        with ThreadPoolExecutor(1) as pool:  # the caller may be inside a running loop
            self._schemas = [
                schema
                for toolset in (*self._shared, *self._own(any_task))
                for schema in pool.submit(asyncio.run, toolset.schemas()).result()
            ]

    def __call__(
        self, tools: Sequence[Tool], reward: Reward, *, shorten: Callable[[str], str] = str, session: str = ""
    ) -> Played:
        """Makes the environment of one episode."""
        return Played(self, tools, shorten, session, [*(tool.schema for tool in tools), *self._schemas])

    async def toolsets(self, task: Any) -> list[_Toolset]:
        """The toolsets of all tasks, set up once, and those of `task`, if given."""
        async with self._starting:
            if not self._started:
                for toolset in self._shared:
                    await toolset.toolset.setup()
                self._started = True
        if task is None:
            return self._shared
        own = self._own(task)
        for toolset in own:
            await toolset.toolset.setup()
            await toolset.toolset.setup_task(task.data)
        return [*self._shared, *own]


class Played:
    """One task, from its prompt to its reward."""

    def __init__(
        self, maker: Verifiers, tools: Sequence[Tool], shorten: Callable[[str], str], session: str, schemas: Any
    ):
        self.tools: list[dict[str, Any]] = schemas
        self._maker, self._given, self._shorten, self._session = maker, tools, shorten, session
        self._runtime: Any = None

    async def reset(self, task: Task) -> list[Message]:
        """Runs the task's setup and returns the problem's messages; a chat, which has no answer, has no task.

        Raises:
            UserError: the task is not in the taskset.
        """
        if task.answer is not None and task.answer not in self._maker.tasks:
            raise UserError(f"problem {task.id}: is not in the taskset; write data.train with `problems`")
        chosen: Any = None if task.answer is None else self._maker.tasks[task.answer]
        self._task: Any = chosen
        if chosen is not None:
            await self._begin(chosen)
        toolsets = await self._maker.toolsets(chosen)
        tools = [*self._given, *[tool for toolset in toolsets for tool in await toolset.tools()]]
        self._inner = ToolEnvironment(tools, ungraded, shorten=self._shorten, session=self._session)
        self._vf_tools = [_verifiers("types").Tool(**schema["function"]) for schema in self.tools]
        self._said: list[Any] = [_theirs(message) for message in task.messages] if chosen is not None else []
        return await self._inner.reset(task)

    async def _begin(self, chosen: Any) -> None:
        """Trace, folder and setup of a task."""
        vf = _verifiers()
        traced = vf.TraceTask(type=type(chosen).__name__, data=chosen.data, key=chosen.key, hash=chosen.hash)
        agent = vf.AgentInfo(config=vf.AgentConfig(model="policy", runtime=vf.SubprocessConfig()))
        state = _verifiers("state").state_cls(type(chosen))()
        self._trace = vf.Trace(task=traced, state=state, agent=agent)
        self._runtime = _verifiers("runtimes").make_runtime(vf.SubprocessConfig(), name=self._trace.id)
        await self._runtime.start()
        try:
            await _invoke(chosen.setup, trace=self._trace, runtime=self._runtime)
        except Exception as error:  # a hook is user code, and its failure is not the model's
            raise EngineError(f"verifiers task {chosen.data.idx}: setup: {error}") from error

    async def step(self, message: Message) -> Step:
        """Runs the calls of `message`, or scores the episode if there are none."""
        if self._task is None:
            return await self._inner.step(message)
        ids = self._record(message)
        step = await self._inner.step(message)
        if not step.done:
            self._said += [_theirs(m, call_id=i) for m, i in zip(step.messages, ids, strict=True)]
            return step
        self._trace.stop("agent_completed")
        try:
            await _invoke(self._task.finalize, trace=self._trace, runtime=self._runtime)
            await self._task.score(self._trace, self._runtime)
        except Exception as error:  # an unreachable judge, a reward that raises
            logger.warning("verifiers task %s: not scored: %s", self._task.data.idx, " ".join(str(error).split())[:300])
            return Step([], done=True, failed=True)
        reward = float(self._trace.reward)
        return Step([], reward, True, min(max(reward, 0.0), 1.0), prediction=message.content[-200:])

    async def close(self) -> None:
        """Removes the folder of the task's hooks."""
        if self._runtime is not None:
            await self._runtime.stop()

    def _record(self, message: Message) -> list[str]:
        """Writes the model's turn into the trace; returns the ids of its calls."""
        turn = len(self._said)
        said = _theirs(message, turn=turn)
        finish = "tool_calls" if message.tool_calls else "stop"
        response = _verifiers().Response(
            id=f"turn-{turn}", created=int(time.time()), model="policy", message=said, finish_reason=finish
        )
        _verifiers("graph").prepare_turn(self._trace, list(self._said), self._vf_tools).commit(response)
        self._said.append(said)
        return [call.id for call in said.tool_calls or []]


class _Toolset:
    """The tools of a toolset, called in this process."""

    def __init__(self, toolset: Any):
        from mcp.server.mcpserver import MCPServer  # pyright: ignore[reportMissingImports]

        name = type(toolset).__name__
        if _verifiers("state").state_cls(type(toolset)) is not _verifiers().State:
            raise UserError(f"verifiers toolset {name}: shares state with its task, which needs verifiers' own servers")
        if getattr(toolset.config, "url", None) or toolset.config.runtime.type != "subprocess":
            raise UserError(f"verifiers toolset {name}: runs elsewhere; give its tools as agent.tools='mcp:...'")
        self.toolset = toolset
        self._server = MCPServer(toolset.server_name or name)
        toolset.register(self._server)

    async def tools(self) -> list[_Function]:
        return [_Function(self._server, tool, self._full(tool.name)) for tool in await self._server.list_tools()]

    async def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in await self.tools()]

    def _full(self, name: str) -> str:
        """The name that the model sees: `verifiers` prefixes it with the server's name."""
        return f"{self.toolset.server_name}_{name}" if self.toolset.server_name else name


class _Function:
    """One tool of a toolset, as a `Tool`."""

    def __init__(self, server: Any, tool: Any, name: str):
        self.name, self.schema = name, schema_of(tool, name)
        self._server, self._theirs = server, tool.name

    async def __call__(self, call: ToolCall, *, session: str = "") -> ToolResult:
        began = time.monotonic()
        try:
            result = as_result(await self._server.call_tool(self._theirs, call.arguments))
        except Exception as error:  # the model reads the error, as with the servers of `verifiers`
            result = ToolResult(f"Error: {error}", "error")
        result.seconds = time.monotonic() - began
        return result


def _verifiers(module: str = "") -> Any:
    """Imports a module of `verifiers`, an optional dependency."""
    try:
        return importlib.import_module(f"verifiers.v1.{module}".rstrip("."))
    except ImportError as error:
        raise UserError(f"verifiers is missing ({error}): pip install 'open_agentrl_jax[verifiers]'") from None


def _refuse(task: Any) -> None:
    kind = type(task).__name__
    if task.NEEDS_CONTAINER or task.data.image:
        raise UserError(f"verifiers task {kind}: needs a container; use verifiers' own harness")
    if task.hooks("stop") or _verifiers("utils.decorators").discover_decorated(task, "intercept"):
        raise UserError(f"verifiers task {kind}: stops or rewrites conversations (@stop, @intercept); not supported")


async def _invoke(hook: Callable[..., Any], **given: Any) -> None:
    await _verifiers("utils.decorators").invoke(hook, given)


def _ours(messages: Sequence[Any]) -> list[Message]:
    text = _verifiers("types").content_text
    return [Message(message.role, text(message.content)) for message in messages]


def _theirs(message: Message, *, turn: int = 0, call_id: str = "") -> Any:
    vf = _verifiers("types")
    if message.role == "assistant":
        calls = [
            vf.ToolCall(id=f"call-{turn}-{i}", name=call.name, arguments=json.dumps(call.arguments))
            for i, call in enumerate(message.tool_calls)
        ]
        return vf.AssistantMessage(content=message.content, tool_calls=calls or None)
    if message.role == "tool":
        return vf.ToolMessage(tool_call_id=call_id, content=message.content)
    return (vf.SystemMessage if message.role == "system" else vf.UserMessage)(content=message.content)
