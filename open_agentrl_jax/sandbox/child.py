"""One child of a fork server: isolates itself, then runs one program as `python main.py` would.

The exit status comes from wait4 in the fork server, never from the child. The socket of the request closes before the
program's first line (a session keeps it, see `_Program.run_cells`). Standard library only.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import fcntl
import gc
import importlib
import linecache
import marshal
import mmap
import os
import random
import signal
import site
import socket
import struct
import sys
import threading
import traceback
import types
from typing import Any, NoReturn

from . import isolation

NAME = "main.py"
HEAD, PID = struct.Struct("!I"), struct.Struct("!I")
OUT_OF_MEMORY = 63  # signal by which a child ends after an uncaught MemoryError; text on stderr proves nothing
# Standard modules with side effects on import: they open a browser or a window, or run tests.
ACTING = {"antigravity", "idlelib", "test", "turtledemo"}
# Imported by a fork server before it forks. Each tier can run every program; a fitting one saves the imports.
STANDARD = (
    *("abc", "array", "bisect", "calendar", "cmath", "collections", "concurrent.futures", "contextlib", "copy", "csv"),
    *(
        "ctypes",
        "dataclasses",
        "datetime",
        "decimal",
        "enum",
        "fractions",
        "functools",
        "hashlib",
        "heapq",
        "importlib",
    ),
    *(
        "inspect",
        "io",
        "itertools",
        "json",
        "logging",
        "math",
        "numbers",
        "operator",
        "os",
        "pathlib",
        "pickle",
        "pprint",
    ),
    *(
        "queue",
        "random",
        "re",
        "secrets",
        "shutil",
        "statistics",
        "string",
        "struct",
        "subprocess",
        "tempfile",
        "textwrap",
    ),
    *("threading", "time", "timeit", "traceback", "typing", "unicodedata", "uuid", "warnings", "encodings.idna"),
    *("encodings.ascii", "encodings.latin_1"),
)
TIERS: dict[str, tuple[str, ...]] = {
    "bare": (),
    "numpy": ("numpy", "numpy.linalg", "numpy.random", "numpy.fft"),
    "sympy": ("numpy", "sympy"),
    "scipy": ("numpy", "sympy", *(f"scipy.{name}" for name in ("optimize", "stats", "integrate", "linalg", "special"))),
}
WARMING = {
    "numpy": """
import numpy as n
n.linalg.solve(n.eye(3) + 1, n.ones(3)); n.random.default_rng(0).normal(); str(n.arange(3.0))
""",
    "sympy": """
from sympy import *
x, y = symbols("x y")
diff(sin(x) * exp(x), x); solve(x**2 - 3*x + 2, x); solve([x + y - 2, x - y], [x, y])
integrate(x * sin(x), x); integrate(exp(-x**2), (x, 0, oo)); simplify(sin(x)**2 + cos(x)**2); factor(x**3 - 1)
limit(sin(x) / x, x, 0); Matrix([[1, 2], [3, 4]]).inv(); factorint(360); isprime(97); N(pi, 20); series(exp(x), x, 0, 4)
str(sqrt(8)); latex(x)
""",
    "scipy": """
from scipy import optimize
optimize.brentq(lambda x: x * x - 2, 0, 2); optimize.minimize(lambda x: x[0] ** 2, [1.0])
""",
}


GENERATORS: list[random.Random] = []  # what the warm modules draw from (random's own, sympy's): seeded in each child


def warm(tier: str) -> None:
    """Imports a tier and exercises it. Missing modules are skipped; programs that need them fail by themselves."""
    for name in [*STANDARD, *TIERS[tier]]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for package, program in WARMING.items():
        if any(name.split(".")[0] == package for name in TIERS[tier]):
            with contextlib.suppress(ImportError):
                for _ in range(3):  # until the interpreter has specialised the code, which then stays unwritten
                    exec(program, {})
    random_types = (random.Random,)
    GENERATORS[:] = [
        thing
        for thing in gc.get_objects()
        if isinstance(thing, random_types) and not isinstance(thing, random.SystemRandom)
    ]
    site.setquit()
    site.setcopyright()
    site.sethelper()


def main(world: isolation.World, slot: int, channel: socket.socket, status: int) -> NoReturn:
    """Prepares the file system, waits for a request, isolates itself and runs the program. Never returns.

    Descriptor 3 becomes the channel. The child sends one letter on it: "d" with the directory to fetch from, "k" before
    the program starts, "r" with the reason of a refusal, "m" if the source does not fit into memory, "f" on a failure.

    Args:
        world: what the fork server prepared.
        slot: the child's number among those alive.
        channel: the socket to the executor.
        status: socket over which the fork server receives this process's directory of /proc.
    """
    leave = os._exit
    os.dup2(channel.detach(), 3)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=3)
    threading.main_thread()._set_native_id()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        isolation.settle(world, slot)
        _send_proc(world, status)
        request, descriptors = receive(channel)
        if request is None:
            leave(0)
        if world.plan.chroot:
            import_ahead(request["code"])
        if request["fetch"] and world.plan.disk:  # the descriptor keeps the file system alive until all is fetched
            socket.send_fds(channel, [b"d"], [disk := os.open("/tmp", os.O_RDONLY | os.O_DIRECTORY)])
            os.close(disk)
        _fill_streams(request["stdin"], *descriptors)
        isolation.lock(world, slot, memory_mb=request["memory_mb"], timeout=request["timeout"])
        _reseed()
        program = _Program(request["code"], disk=world.plan.disk)
        try:
            write_files(request["files"], disk=world.plan.disk)
        except (OSError, ValueError, RecursionError) as error:
            os.write(3, f"r{error}".encode())
            leave(1)
        os.write(3, b"k")
        session = request["session"]
        if not session:
            os.close(channel.detach())
        del request
    except MemoryError:  # the limit holds already, and the source does not fit
        os.write(3, b"m")
        leave(1)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(3, f"f{type(error).__name__}: {error}".encode())
        leave(1)
    try:
        if session:
            program.run_cells(channel)
            leave(0)
        code = program.run()
        if program.out_of_memory:
            signal.signal(OUT_OF_MEMORY, signal.SIG_DFL)
            os.kill(os.getpid(), OUT_OF_MEMORY)
        leave(code)
    finally:  # the program may have changed what `run` calls, and must not return into the fork server's loop
        leave(1)


def _send_proc(world: isolation.World, status: int) -> None:
    """Sends this process's id and its directory of /proc to the fork server, which measures the wait for CPUs there."""
    with contextlib.suppress(OSError), socket.socket(fileno=status) as up:
        directory = world.in_proc("self", os.O_PATH | os.O_DIRECTORY)
        socket.send_fds(up, [PID.pack(os.getpid())], [directory], socket.MSG_DONTWAIT)
        os.close(directory)


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """Reads the request and the descriptors of stdout and stderr; None if the executor closed the channel."""
    data, descriptors, _, _ = socket.recv_fds(channel, 65536, 2)
    return _receive_rest(channel, data), list(descriptors)


def _receive_rest(channel: socket.socket, data: bytes) -> Any:
    parts, size = [data], len(data)
    wanted = HEAD.size + HEAD.unpack_from(data)[0] if size >= HEAD.size else 1
    while size < wanted:
        if not (data := channel.recv(1 << 20)):
            return None
        parts.append(data)
        size += len(data)
    return marshal.loads(b"".join(parts)[HEAD.size :])


def imported(code: str) -> list[str]:
    """Names of the modules that a program imports, from its syntax tree; none if it cannot be parsed."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def import_ahead(code: bytes) -> None:
    """Imports what a program will import, while files are still visible.

    The child is not isolated yet, so only packages whose import is known to have no side effects.
    """
    known = sys.stdlib_module_names | {"numpy", "sympy", "scipy"}
    for name in imported(code.decode("utf-8", "replace")):
        package, *within = name.split(".")
        if package in known and package not in ACTING and "__main__" not in within:
            with contextlib.suppress(BaseException):
                importlib.import_module(name)


def write_files(files: dict[str, bytes], *, disk: bool) -> None:
    """Writes the files of the request below /tmp.

    Raises:
        OSError: there is no private file system, or a name leads out of it.
        ValueError, RecursionError: a name is not a valid file name, or too deep.
    """
    if files and not disk:
        raise OSError("files need a private file system, which this level of isolation does not have")
    for name, content in files.items():
        path = os.path.join("/tmp", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def lay_streams() -> None:
    """Creates the standard streams once for all children, over files of the kinds that children use."""
    null = os.open(os.devnull, os.O_RDWR)
    reading, writing = os.pipe()
    memory = os.memfd_create("stdin")
    for descriptor, place in ((memory, 0), (writing, 1), (writing, 2)):
        os.dup2(descriptor, place)
    # line-buffered, so that the output of a program stopped by its time limit is complete
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
        2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1
    )
    for place in range(3):
        os.dup2(null, place)
    for descriptor in (null, reading, writing, memory):
        os.close(descriptor)


def _fill_streams(stdin: bytes, stdout: int, stderr: int) -> None:
    if stdin:  # otherwise 0 stays /dev/null
        memory = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        left = memoryview(stdin)
        while left:
            left = left[os.write(memory, left) :]
        os.lseek(memory, 0, os.SEEK_SET)
        # sealed: otherwise the program could use it as memory beyond its limit
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
        os.dup2(memory, 0)
    for descriptor, place in ((stdout, 1), (stderr, 2)):
        os.dup2(descriptor, place)


def _reseed() -> None:
    for generator in GENERATORS:
        generator.seed()
    if (numpy := sys.modules.get("numpy")) is not None:  # 624 words of state; numpy.random.seed() would take 1 ms
        numpy.random.set_state(("MT19937", numpy.frombuffer(os.urandom(2496), numpy.uint32), 624))


class _Program:
    """A program that runs as __main__."""

    def __init__(self, code: bytes, *, disk: bool):
        self.code = code.decode("utf-8", "surrogatepass")
        if disk:
            sys.path.insert(0, "/tmp")
        self.module = types.ModuleType("__main__")
        self.module.__dict__.update(__builtins__=__builtins__, __file__=NAME)
        sys.modules["__main__"] = self.module
        lines = self.code.splitlines(keepends=True)
        linecache.cache[NAME] = (len(self.code), None, lines, NAME)
        self.out_of_memory = False
        gc.enable()

    def run(self) -> int:
        """Runs it to its end, including threads and exit functions; returns the return code."""
        ballast = mmap.mmap(
            -1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # freed when memory runs out, to have room for the traceback
        try:
            exec(compile(self.code, NAME, "exec", dont_inherit=True), self.module.__dict__)
            code = 0
        except SystemExit as error:
            code = _exit_code(error)
        except BaseException as error:
            ballast.close()
            code, self.out_of_memory = 1, isinstance(error, MemoryError)
            _tell(error)
        wait_for_threads = threading._shutdown  # pyright: ignore[reportAttributeAccessIssue]
        for last in (wait_for_threads, atexit._run_exitfuncs):
            try:
                last()
            except BaseException as error:
                _tell(error)
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None and not stream.closed:
                    stream.flush()
            except BaseException:
                code = code or 120
        return code

    def run_cells(self, channel: socket.socket) -> None:
        """Runs cell after cell in one namespace until the channel closes.

        Each answer is two bytes: "e" and a return code, "m" after an uncaught MemoryError, "i" after an interruption.
        The executor believes no more of it than what the program could have done itself.
        """
        number = 0
        while True:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if not (data := channel.recv(65536)) or (cell := _receive_rest(channel, data)) is None:
                return
            number += 1
            channel.sendall(self._run_cell(bytes(cell).decode("utf-8", "surrogatepass"), f"<cell {number}>"))

    def _run_cell(self, code: str, name: str) -> bytes:
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        ballast = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        answer = b"e\0"
        try:
            compiled = compile(code, name, "exec", dont_inherit=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            exec(compiled, self.module.__dict__)
        except SystemExit as error:
            answer = b"e" + bytes([_exit_code(error)])
        except BaseException as error:
            ballast.close()
            kind = b"m" if isinstance(error, MemoryError) else b"i" if isinstance(error, KeyboardInterrupt) else b"e"
            answer = kind + b"\1"
            _tell(error)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        return answer


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return int.__and__(error.code or 0, 0xFF)
    with contextlib.suppress(BaseException):
        print(error.code, file=sys.stderr)
    return 1


def _tell(error: BaseException) -> None:
    try:
        error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None
        if sys.excepthook is not sys.__excepthook__:
            sys.excepthook(type(error), error, error.__traceback__)
        else:
            traceback.print_exception(error, limit=-1000)  # the last frames only, as the interpreter prints them
    except BaseException:
        with contextlib.suppress(BaseException):
            os.write(2, f"{type(error).__name__}\n".encode())
