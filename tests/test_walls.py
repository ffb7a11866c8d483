"""The walls between packages: who may import whom, and what a library may not know."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "open_agentrl_jax"
JAX = ("jax", "flax", "optax", "orbax")
WIRING = tuple(f"{PACKAGE}.{room}" for room in ("run", "collect", "serve", "planning"))
_REMOTE = ("sglang", "fleet", "remote", "refit", "sending", "sender", "servers", "address")
REMOTE = [f"rollout/{name}.py" for name in _REMOTE]


ROOMS = {path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix in ("", ".py")}


def rooms(*names):
    return tuple(f"{PACKAGE}.{name}" for name in names)


# package or file -> prefixes that it must not import
WALLS = {
    "": ("launch", "configs", "benchmarks"),
    "types.py": (PACKAGE, *JAX),
    "settings.py": (PACKAGE, *JAX),
    "text.py": (PACKAGE, *JAX),
    "reference": (*rooms("agent", "rewards", "models", "train"), *WIRING),
    "config.py": (*JAX, *rooms(*(ROOMS - {"settings", "rules"}))),
    "rules.py": (*JAX, *rooms(*(ROOMS - {"settings"}))),
    "algorithms": (*rooms("models", "config", "rollout", "train"), *WIRING),
    "parallel": (*rooms("models", "train", "rollout", "agent"), *WIRING),
    "models": (*rooms("train", "rollout", "agent"), *WIRING),
    "train": (*rooms("rollout", "agent", "sandbox", "rewards", "data"), *WIRING),
    "rollout": (*rooms("train", "sandbox", "rewards", "data"), *WIRING),
    "evaluation": WIRING,
    "collect": rooms("serve", "planning"),
    "serve": rooms("collect", "planning", "run"),
    "planning": rooms("run", "collect", "serve", "rollout", "agent", "sandbox"),
    "run": rooms("collect"),
} | {
    room: (*JAX, *rooms("models", "train", "algorithms"), *WIRING)
    for room in ("agent", "sandbox", "rewards", "data", "telemetry", "rollout/scheduler.py", *REMOTE)
}
SHARED_BY_COMMANDS = {"launch.command"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(place):
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


@pytest.mark.parametrize("room", WALLS)
def test_wall_holds(room):
    files = modules(ROOT / PACKAGE / room)
    assert files
    crossings = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imported(file)
        for wall in WALLS[room]
        if name == wall or name.startswith(wall + ".")
    }
    assert not crossings


def test_commands_import_no_other_command():
    commands = {f"launch.{file.stem}" for file in (ROOT / "launch").glob("*.py")} - SHARED_BY_COMMANDS
    crossings = {
        f"{file.name} imports {name}"
        for file in (ROOT / "launch").glob("*.py")
        for name in commands & {*imported(file)}
    }
    assert not crossings


def test_libraries_name_no_command_line_flag():
    """Libraries raise errors about values; commands add the name of the flag."""
    found = {
        f"{file.relative_to(ROOT)}:{node.lineno} names {part.value!r}"
        for file in (ROOT / PACKAGE).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error")
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.lstrip("( ").startswith("--")
    }
    assert not found


def test_files_stay_short():
    long = {
        f"{file.relative_to(ROOT)}: {lines} lines"
        for top in (PACKAGE, "launch", "configs", "benchmarks")
        for file in (ROOT / top).rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 450
    }
    assert not long


def test_rooms_without_jax_start_without_it():
    code = (
        "import sys, open_agentrl_jax.agent.episode, open_agentrl_jax.sandbox.client, open_agentrl_jax.rewards.math, "
        "open_agentrl_jax.rollout.scheduler, open_agentrl_jax.rollout.sglang, open_agentrl_jax.rollout.servers, "
        "open_agentrl_jax.telemetry.writer; print('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_commands_start_without_the_extras():
    """`pip install -e .` is enough for every command; what needs an extra imports it when it is used."""
    names = [file.stem for file in (ROOT / "launch").glob("*.py") if file.stem != "__init__"]
    extras = ["aiohttp", "orjson", "mcp", "verifiers", "wandb", "tensorboardX", "gguf", "gcsfs", "s3fs", "torch"]
    code = f"import sys; sys.modules.update(dict.fromkeys({extras}))\n" + "".join(f"import launch.{n}\n" for n in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
