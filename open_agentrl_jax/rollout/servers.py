"""SGLang servers that a run starts on its own machine, and that end with the run however it ends.

Each server is a process group led by a shell that waits on a pipe from this process: when the pipe closes, because the
run closed it or died, the shell ends the group. A server that dies is restarted on the same port; the pool gives it the
current weights before it gets work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence

from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.types import UserError

CHECKOUT = pathlib.Path(__file__).parents[2]
CRASHES = 3  # exits while starting, after which a server is given up
log = logging.getLogger(__name__)

# Runs "$@" again and again; ends its process group when standard input ends.
_GUARD = """
trap '' TERM
(trap - TERM; while :; do "$@"; echo "sglang-guard: exit status $?"; sleep 1; done) </dev/null &
read -r _
kill -TERM 0
sleep 2
kill -KILL 0
"""
_EXITED = "sglang-guard: exit status"


@dataclasses.dataclass(frozen=True)
class ServerKind:
    """How to start one server implementation."""

    variable: str  # environment variable with the folder of its virtual environment
    folder: str  # that folder in the checkout
    install: str  # script that builds it
    command: tuple[str, ...]  # arguments of its interpreter
    flags: tuple[str, ...]  # on every machine
    cpu_flags: tuple[str, ...]
    device_flags: tuple[str, ...]
    spare_tokens: int = 0  # of the context that the server keeps unused


KINDS = {
    "sglang": ServerKind(
        variable="SGLANG_ENV",
        folder=".venv-sglang",
        install="third_party/sglang/install.sh",
        command=("-m", "sglang.launch_server"),
        flags=("--skip-tokenizer-init", "--incremental-streaming-output"),  # ids in, ids out
        cpu_flags=(
            *("--device", "cpu", "--dtype", "float32"),  # "auto" makes an fp16 cache, which gives wrong log-probs
            *("--mem-fraction-static", "0.05", "--skip-server-warmup", "--sleep-on-idle"),
        ),
        device_flags=("--device", "cuda", "--dtype", "bfloat16"),
    ),
    "sglang_jax": ServerKind(
        variable="SGLANG_JAX_ENV",
        folder=".venv-sglang-jax",
        install="third_party/sglang_jax/install.sh",
        command=(str(CHECKOUT / "third_party" / "sglang_jax" / "launch.py"),),
        flags=("--skip-tokenizer-init", "--skip-server-warmup"),
        cpu_flags=(
            *("--device", "cpu", "--dtype", "float32", "--attention-backend", "native", "--page-size", "1"),
            *("--disable-precompile", "--enable-single-process", "--max-running-requests", "16"),
            *("--chunked-prefill-size", "512", "--max-prefill-tokens", "512"),
        ),
        device_flags=("--device", "tpu", "--dtype", "bfloat16"),
        spare_tokens=1,
    ),
}
CPU_FLAGS = KINDS["sglang"].cpu_flags


def interpreter(kind: str = "sglang") -> pathlib.Path:
    """The Python interpreter that has the server installed: from the environment variable, or in the checkout.

    Raises:
        UserError: it is not installed.
    """
    server = KINDS[kind]
    python = pathlib.Path(os.environ.get(server.variable) or CHECKOUT / server.folder) / "bin" / "python"
    if not python.exists():
        raise UserError(
            f"rollout.launch_servers: no server at {python}; run {server.install}, or set {server.variable} to the "
            "folder of its environment"
        )
    return python


def has_accelerators(kind: str) -> bool:
    """Whether this machine has devices for the server: NVIDIA GPUs or TPU chips, found without loading a framework."""
    patterns = {"sglang": ["nvidia[0-9]*"], "sglang_jax": ["accel[0-9]*", "vfio/[0-9]*"]}[kind]
    return any(True for pattern in patterns for _ in pathlib.Path("/dev").glob(pattern))


def device_flags(
    kind: str, index: int, *, first_device: int = 0, tensor: int = 1, memory: float = 0.85
) -> tuple[str, ...]:
    """Flags of server `index` on a machine with accelerators.

    Args:
        kind: a key of KINDS.
        index: of the server among those started here.
        first_device: device index where the first server starts; the others follow.
        tensor: devices per server.
        memory: share of the device memory for weights and cache.
    """
    flags = (*KINDS[kind].device_flags, "--tp-size", str(tensor), "--mem-fraction-static", str(memory))
    return flags if kind == "sglang_jax" else (*flags, "--base-gpu-id", str(first_device + index * tensor))


class LaunchedServers:
    """Running servers with addresses `urls`. `close` ends them, and so does the end of this process."""

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        count: int,
        *,
        log_dir: str | os.PathLike[str],
        context_length: int,
        max_tokens: int = 0,
        kind: str = "sglang",
        flags: Sequence[Sequence[str]] = (),
    ):
        """Starts the servers; `wait` returns when they answer.

        Args:
            model_path: a Hugging Face folder; the first published version replaces its weights.
            count: servers.
            log_dir: gets one log file per server.
            context_length: tokens.
            max_tokens: of the KV cache of a server; 0: 16 whole contexts.
            kind: a key of KINDS.
            flags: per server, in addition to those that every server needs; empty: the flags for CPU machines.

        Raises:
            UserError: the server is not installed.
        """
        python, server = interpreter(kind), KINDS[kind]
        self.logs = [pathlib.Path(log_dir) / f"sglang-{i}.log" for i in range(count)]
        self._ports = _free_ports(count)
        self.urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        self._guards: list[subprocess.Popen] = []
        pathlib.Path(log_dir).mkdir(parents=True, exist_ok=True)
        self._starts = [file.stat().st_size if file.exists() else 0 for file in self.logs]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        flags = flags or [server.cpu_flags] * count
        if any("cpu" in own for own in flags):
            environment |= {"SGLANG_USE_CPU_ENGINE": "1", "JAX_PLATFORMS": "cpu"}
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(log_dir).absolute() / "compiled"))
        for index, (port, file) in enumerate(zip(self._ports, self.logs, strict=True)):
            command = [str(python), *server.command, "--host", "127.0.0.1", "--port", str(port)]
            command += ["--model-path", str(model_path), "--context-length", str(context_length)]
            command += ["--max-total-tokens", str(max_tokens or 16 * context_length), *server.flags]
            command += flags[index]
            with open(file, "ab") as output:
                guard = subprocess.Popen(
                    ["sh", "-c", _GUARD, "sglang-guard", *command],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    env=environment,
                )
            self._guards.append(guard)

    def wait(self, seconds: float = 300.0) -> None:
        """Returns when all servers answer; logs a line per half minute.

        Raises:
            EngineError: a server keeps crashing or does not answer in time; with the end of its log.
        """
        began, lines = time.monotonic(), 1
        for url, file, start in zip(self.urls, self.logs, self._starts, strict=True):
            while not _answers(url):
                waited, text = time.monotonic() - began, file.read_bytes()[start:].decode(errors="replace")
                if text.count(_EXITED) >= CRASHES:
                    raise EngineError(f"{url}: the server exits while it starts; the end of {file}:\n{text[-1500:]}")
                if waited > seconds:
                    raise EngineError(f"{url} does not answer after {seconds:.0f} s; the end of {file}:\n{text[-600:]}")
                if waited > 30 * lines:
                    log.warning("waiting for %s to start, %.0f of %.0f s (log: %s)", url, waited, seconds, file)
                    lines += 1
                time.sleep(0.5)

    def kill(self, index: int) -> None:
        """Sends SIGKILL to all processes of one server; it is restarted."""
        for pid in _members(self._guards[index].pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the servers: SIGTERM first, SIGKILL after two seconds."""
        for guard in self._guards:
            if guard.stdin is not None:
                guard.stdin.close()
        for guard in self._guards:
            with contextlib.suppress(subprocess.TimeoutExpired):
                guard.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guard.pid, signal.SIGKILL)
            guard.wait()

    def __enter__(self) -> LaunchedServers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _members(group: int) -> list[int]:
    """The processes of a group other than its leader and its shells."""
    members = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(")")
            if int(rest.split()[2]) == group and not name.endswith("(sh"):
                members.append(int(stat.parent.name))
    return members


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never proxied


def _answers(url: str) -> bool:
    try:
        with _direct.open(f"{url}/ping", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
