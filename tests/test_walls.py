"""Who may import whom: the walls of the house."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "open_agentrl_jax"
REMOTE = [f"rollout/{name}.py" for name in ("sglang", "fleet", "remote", "servers", "address")]
ROOMS = {path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix in ("", ".py")}
# room or file -> prefixes it must not import
WALLS = {
    "types.py": (PACKAGE, "jax", "flax", "optax"),
    "settings.py": (PACKAGE, "jax", "flax", "optax"),
    "config.py": (*(f"{PACKAGE}.{room}" for room in ROOMS - {"settings"}), "jax", "flax", "optax"),
    "algorithms": (f"{PACKAGE}.models", f"{PACKAGE}.config", f"{PACKAGE}.rollout", f"{PACKAGE}.train"),
    "models": (f"{PACKAGE}.train", f"{PACKAGE}.rollout", f"{PACKAGE}.agent"),
    "train": (f"{PACKAGE}.rollout", f"{PACKAGE}.agent", f"{PACKAGE}.sandbox", f"{PACKAGE}.rewards", f"{PACKAGE}.data"),
    "": ("launch", "configs"),
} | {
    room: ("jax", "flax", "optax", f"{PACKAGE}.models", f"{PACKAGE}.train", f"{PACKAGE}.algorithms")
    for room in ("agent", "sandbox", "rewards", "data", "telemetry", "rollout/scheduler.py", *REMOTE)
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", WALLS)
def test_wall_holds(room):
    place = ROOT / PACKAGE / room
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    crossings = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imported(file)
        for wall in WALLS[room]
        if name == wall or name.startswith(wall + ".")
    }
    assert not crossings


def test_rooms_without_jax_start_without_it():
    import subprocess
    import sys

    code = (
        "import sys, open_agentrl_jax.agent.episode, open_agentrl_jax.sandbox.client, open_agentrl_jax.rewards.math, "
        "open_agentrl_jax.rollout.scheduler, open_agentrl_jax.rollout.sglang, open_agentrl_jax.rollout.servers, "
        "open_agentrl_jax.telemetry.writer; print('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
