"""A tiny real MCP server: `python mcp_server.py FILE` notes each start and each end in FILE."""

import os
import sys
import time

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("shelf")


def note(line):
    with open(sys.argv[1], "a") as log:
        log.write(f"{line}\n")


@server.tool()
def search(query: str, limit: int = 1) -> str:
    """Finds a book."""
    if query == "nothing":
        raise ToolError("no such book")
    return f"{limit} found: {query} {os.environ.get('SHELF', '')}"


@server.tool()
def hang(seconds: float) -> str:
    """Takes its time."""
    time.sleep(seconds)
    return "done"


@server.tool()
def die() -> str:
    """Ends the server."""
    os._exit(3)


note("start")
try:
    server.run("stdio")
finally:
    note("end")
