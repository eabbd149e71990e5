"""An MCP server over stdio, from MCP's own package in either of its versions; it notes each call in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mcp import types

try:
    from mcp.server.mcpserver import MCPServer as Server
except ImportError:  # before version 2
    from mcp.server.fastmcp import FastMCP as Server  # type: ignore[import-not-found, no-redef]

CALLED = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("called")
server: Any = Server("tools")


def hint(*, reads: bool) -> Any:
    return types.ToolAnnotations.model_validate({"readOnlyHint": reads})


def note(name: str) -> None:
    with CALLED.open("a") as file:
        file.write(f"{name}\n")


@server.tool(annotations=hint(reads=True))
def look(x: int) -> str:
    """Look at x."""
    note("look")
    return f"seen {x}"


@server.tool(annotations=hint(reads=True))
def fail(x: int) -> str:
    """Fail to look at x."""
    note("fail")
    raise ValueError(f"cannot see {x}")


@server.tool(annotations=hint(reads=False))
def send(x: int) -> str:
    """Send x."""
    note("send")
    return f"sent {x}"


if __name__ == "__main__":
    server.run("stdio")
