# ruff: noqa: E501
"""Hostile programs at the edges: files emptied through read-only rights, channels between runs, forged ends."""

from __future__ import annotations

from tests.sandbox.hostile import ENDLESS, Attack, _each

SHARED = (
    "try: file = os.open(json.__file__, os.O_RDONLY)\nexcept OSError: file = 0  # an empty root has no shared file\n"
)

EDGES = [
    # an empty file, so that an escape destroys nothing
    _each(
        "empties a library file that it may only read",
        *[f"os.open(EMPTY, os.{flags} | os.O_TRUNC)" for flags in ("O_RDONLY", "O_RDWR", "O_WRONLY")],
        "call(2, None, EMPTY.encode(), 0o1000, 0)", "call(257, 56, -100, EMPTY.encode(), 0o1000, 0)", "call(257, 56, -100, EMPTY.encode(), (1 << 32) | 0o1000, 0)",
        "call(85, None, EMPTY.encode(), 0o600)", "call(437, 437, -100, EMPTY.encode(), (ctypes.c_uint64 * 3)(0o1000, 0, 0), 24)", "os.truncate(EMPTY, 0)",
        setup="import email.mime\nEMPTY = email.mime.__file__\n",
    ),
    _each(
        "looks which pages of a shared file are cached",
        *[f"os.preadv(os.open(json.__file__, os.O_RDONLY), [bytearray(9)], 0, {flags})" for flags in ("os.RWF_NOWAIT", "os.RWF_HIPRI", "os.RWF_NOWAIT | os.RWF_HIPRI")],
        "call(327, 286, os.open(json.__file__, os.O_RDONLY), (ctypes.c_uint64 * 2)(id(at), 8), 1, 0, 0, (1 << 32) | 8)",
        "call(27, 232, id(at) & -4096, 4096, ctypes.create_string_buffer(1))", "call(451, 451, 0, b'\\0' * 16, ctypes.create_string_buffer(40), 0)",
        "call(221, 223, os.open(json.__file__, os.O_RDONLY), 0, 0, 4)", "call(187, 213, os.open(json.__file__, os.O_RDONLY), 0, 4096)",
    ),
    _each(
        "reads the clocks of other processes",
        *[f"time.clock_gettime((~{pid} << 3) | {kind})" for pid in ("at['pid']", "os.getppid()", "1", "0", "os.getpid()") for kind in (0, 1, 2, 6)],
        "time.clock_getres((~os.getppid() << 3) | 2)", "call(230, 115, (~os.getppid() << 3) | 2, 0, b'\\0' * 16, 0)",
    ),
    _each("reads how many processes the host has", "call(99, 179, ctypes.create_string_buffer(256))", "os.getloadavg()"),
    Attack(
        "leaves a record lock on a shared file",
        SHARED + "import struct\ntry: fcntl.lockf(file, fcntl.LOCK_SH, 1, 77)\nexcept OSError: pass\n"
        "attempt(lambda: fcntl.fcntl(file, fcntl.F_GETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 77, 1, 0)))\n"
        "attempt(lambda: fcntl.fcntl(file, 37, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 77, 1, 0)))\nattempt(lambda: fcntl.flock(file, fcntl.LOCK_SH))",
    ),
    Attack(
        "wakes waiters through a page of a shared file",
        SHARED + "page = libc.mmap\npage.restype = ctypes.c_void_p\naddress = page(None, ctypes.c_size_t(4096), 1, 1, file, ctypes.c_long(0))\n"
        "for op in (1, 3, 4, 5, 10): attempt(lambda: call(202, 98, ctypes.c_void_p(address), op, 1, 1, ctypes.c_void_p(address), 0xffffffff))\n"
        "attempt(lambda: call(218, 96, ctypes.c_void_p(address)))",
    ),
    Attack(
        "has the host flush its disk",
        SHARED + "began = time.monotonic()\nfor _ in range(3000): os.fsync(file); os.fdatasync(file)\n"
        "print('contained' if time.monotonic() - began < 2 else 'ESCAPED')\nattempt(lambda: call(162, 81) and 1 // 0 or 1 // 0)\nattempt(lambda: call(306, 267, file))",
    ),
    Attack("claims to be out of memory on stderr", "print('contained'); sys.stderr.write('MemoryError\\n'); sys.stderr.flush(); os._exit(1)", return_code=1),
    Attack("claims to be out of memory by a message", "print('contained', flush=True); sys.exit('MemoryError: no memory')", return_code=1),
    Attack("fills its memory and ends itself", "room = bytearray(490 << 20); print('contained', flush=True); os.kill(os.getpid(), signal.SIGTERM)", return_code=-15),
    Attack("has a source larger than its memory", "print('contained')\n#" + "x" * (40 << 20), statuses=("memory",), return_code=1, prints="", memory_mb=8),
    Attack("reads files that are not there", "import itertools\nfolder = os.path.dirname(json.__file__)\nfor n in range(2000): os.path.exists(f'{folder}/absent-{n}')\nprint('contained')"),
    Attack("burns sixty threads", "print('started', flush=True)\nthreading.stack_size(65536)\n[threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start() for _ in range(60)]", **ENDLESS),
]  # fmt: skip
