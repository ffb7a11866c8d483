"""Draw the import graph of the project's packages as a Mermaid diagram.

    python docs/import_graph.py            # print the diagram
    python docs/import_graph.py --write    # replace the diagram in docs/architecture.md

An arrow A --> B means that a module of A imports a module of B. Arrows that follow from others are left out
(transitive reduction), so the graph must be acyclic.
"""

from __future__ import annotations

import argparse
import ast
import pathlib
from collections import defaultdict
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "open_agentrl_jax"
PAGE = ROOT / "docs" / "architecture.md"
FENCE = "```mermaid\n"
# Almost every package imports these: their arrows would hide the others.
FLOOR = {"types", "config", "settings", "rules", "text", "guard", "storage"}


def imports(path: pathlib.Path) -> Iterator[str]:
    """Dotted names that a module imports, `from a import b` as `a` and `a.b`; imports inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """The package of a module: "open_agentrl_jax.train.step" -> "train", "launch.train" -> "launch"; "" if foreign."""
    first, *rest = module.split(".")
    if first == PACKAGE:
        return rest[0] if rest else ""
    return first if first in ("launch", "benchmarks", "configs") else ""


def graph() -> dict[str, set[str]]:
    """Package -> packages that it imports, without itself."""
    edges: dict[str, set[str]] = defaultdict(set)
    for top in (PACKAGE, "launch", "benchmarks"):
        for path in sorted((ROOT / top).rglob("*.py")):
            here = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
            found = {room(name) for name in imports(path)}
            if here and here != "__init__":
                edges[here] |= found - {"", here}
    return edges


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    """Packages that `start` imports directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for there in edges.get(waiting.pop(), set()) - found:
            found.add(there)
            waiting.append(there)
    return found


def diagram() -> str:
    """The Mermaid source of the graph, ending with a newline."""
    edges = {here: there - FLOOR for here, there in graph().items() if here not in FLOOR}
    cycles = [here for here in edges if here in reachable(edges, here)]
    if cycles:
        raise ValueError(f"import cycle through {', '.join(sorted(cycles))}")
    lines = ["flowchart TD"]
    for here in sorted(edges):
        indirect = {name for there in edges[here] for name in reachable(edges, there)}
        lines += [f"  {here} --> {there}" for there in sorted(edges[here] - indirect)]
    return "\n".join(lines) + "\n"


def replace(page: str) -> str:
    """The page with its Mermaid block replaced by the current diagram."""
    before, _, rest = page.partition(FENCE)
    _, fence, after = rest.partition("```")
    return before + FENCE + diagram() + fence + after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the diagram in docs/architecture.md")
    if parser.parse_args().write:
        PAGE.write_text(replace(PAGE.read_text()))
    else:
        print(diagram(), end="")
