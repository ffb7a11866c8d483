"""The tools of an MCP server, a command that speaks the protocol over its stdin and stdout.

The official client (extra [mcp]) connects to it. The server is trusted: it runs with this process's rights, not in the
sandbox. It is started once and serves all episodes concurrently; the next call restarts a server that died.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import time
from typing import Any

from open_agentrl_jax.agent.environment import ToolResult
from open_agentrl_jax.sandbox.background import Background
from open_agentrl_jax.types import ToolCall, UserError

START_SECONDS = 60.0  # until a server has listed its tools: npx or uvx may have to install it first


class Server(Background):
    """A running server and its client, in an event loop of their own: calls may come from any loop."""

    def __init__(self, command: str, deadline: float):
        super().__init__()
        self.command, self.deadline = command, deadline
        self._starting = asyncio.Lock()
        self._holder: asyncio.Task[None] | None = None
        self._client: Any = None

    async def tools(self) -> list[Any]:
        """The server's tools, as protocol objects."""
        client, tools, cursor = await self._connected(), [], None
        while True:
            page = await client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if not cursor:
                return tools

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Makes one call and waits for its result or the deadline."""
        import mcp  # pyright: ignore[reportMissingImports]
        from mcp.types import (  # pyright: ignore[reportMissingImports]
            CONNECTION_CLOSED,
            INVALID_PARAMS,
            METHOD_NOT_FOUND,
        )

        try:
            client = await self._connected()
            result = await client.call_tool(name, arguments, read_timeout_seconds=self.deadline)
        except mcp.MCPError as error:
            if error.code == CONNECTION_CLOSED:
                self._abandon()
            # Arguments that violate the schema are the model's mistake; every other failure is not.
            status = "error" if error.code in (INVALID_PARAMS, METHOD_NOT_FOUND) else "infrastructure"
            return ToolResult(f"Error: {error.message}", status)
        except Exception as error:  # pipes, processes and parsers raise many types
            self._abandon()
            return ToolResult(f"Error: {error}", "infrastructure")
        return as_result(result)

    async def _connected(self) -> Any:
        async with self._starting:
            if self._holder is None or self._holder.done():
                ready = self.loop.create_future()
                self._holder = self.loop.create_task(self._hold(ready))
                try:
                    self._client = await asyncio.wait_for(ready, START_SECONDS)
                except BaseException:
                    self._abandon()
                    raise
            return self._client

    async def _hold(self, ready: asyncio.Future[Any]) -> None:
        """Keeps the connection open until cancelled: the task that opened it must close it."""
        from mcp import Client, StdioServerParameters, stdio_client  # pyright: ignore[reportMissingImports]

        try:
            program, *arguments = shlex.split(self.command)
            server = StdioServerParameters(command=program, args=arguments, env=dict(os.environ))
            async with Client(stdio_client(server, sys.__stderr__ or sys.stderr)) as client:
                ready.set_result(client)
                await asyncio.Event().wait()
        except Exception as error:
            if not ready.done():  # afterwards the next call reports it
                ready.set_exception(error)

    def _abandon(self) -> None:
        if self._holder is not None:
            self._holder.cancel()
            self._holder = None


class MCPTool:
    """One tool of a server.

    Args:
        server: executes the calls.
        tool: the protocol's description: name, description, input_schema.
    """

    def __init__(self, server: Server, tool: Any):
        self.server, self.name, self.schema = server, str(tool.name), schema_of(tool)

    async def __call__(self, call: ToolCall, *, session: str = "") -> ToolResult:
        """Calls the tool; `isError` becomes "error", any failure on the way "infrastructure"."""
        if call.error:
            return ToolResult(f"Error: {call.error}", "error")
        began = time.monotonic()
        result = await self.server.here(self.server.call(self.name, call.arguments))
        result.seconds = time.monotonic() - began
        return result

    async def close(self) -> None:
        """Stops the server and with it its other tools; idempotent."""
        await self.server.close()

    def stop(self) -> None:
        """`close` for callers without an event loop."""
        self.server.stop()


def open_server(command: str, *, deadline: float = 60.0) -> list[MCPTool]:
    """Starts a server and lists its tools.

    Args:
        command: the program and its arguments, as in a shell; it inherits the environment.
        deadline: seconds per call.

    Returns:
        The tools, in the server's order. Closing one of them ends the server.

    Raises:
        UserError: the client is not installed, or the server does not start or has no tools.
    """
    try:
        import mcp  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"agent.tools=mcp:{command}: the MCP client is missing: pip install 'open_agentrl_jax[mcp]'"
        ) from None
    server = Server(command, deadline)
    try:
        tools = server.wait(asyncio.wait_for(server.tools(), START_SECONDS))
        if not tools:
            raise ValueError("it offers no tool")
        return [MCPTool(server, tool) for tool in tools]
    except Exception as error:
        server.stop()
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"agent.tools=mcp:{command}: {text}; see that the command starts by hand") from error


def schema_of(tool: Any, name: str = "") -> dict[str, Any]:
    """The schema of a protocol tool as chat templates take it; `name` replaces its own."""
    function = {"name": name or tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def as_result(result: Any) -> ToolResult:
    """A CallToolResult of the protocol as text and status."""
    text = "\n".join(_text(block) for block in result.content)
    if not result.content and result.structured_content is not None:
        text = json.dumps(result.structured_content, ensure_ascii=False)
    return ToolResult(text, "error" if result.is_error else "ok")


def _text(block: Any) -> str:
    """A content block as text, the only form that the model reads."""
    if (text := getattr(block, "text", None)) is None:
        text = getattr(getattr(block, "resource", None), "text", None)
    return text if text is not None else f"[{block.type}: not shown]"
