# ruff: noqa: E501
"""More hostile programs: whole tables of kernel calls, their own interpreter's memory, and ends that fight back."""

from __future__ import annotations

from tests.sandbox.hostile import ENDLESS, Attack, _each

ANYHOW = dict(statuses=("finished", "timeout", "memory"), return_code=None)
# What the filter names, as the program finds it in its own memory; `got` are the numbers that came through.
TABLE = (
    "inside = sys.modules['_sandbox.seccomp']\n"
    "named = {pair[0 if X86 else 1] for pair in (inside.ALWAYS | inside.WITH_A_DISK | inside.CHECKED | inside.IGNORED).values()} | {435, 335, 336}\n"
    "def comes_through(number):\n"
    "    value = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)\n"
    "    return value >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS)\n"
)

CUNNING = [
    # the kernel
    Attack(
        "tries every call that the filter does not name",
        TABLE + "got = [number for number in range(1024) if number not in named and comes_through(number)]\nprint('ESCAPED' if got else 'contained', got)",
    ),
    Attack(
        "tries every call by the x32 table",
        TABLE + "got = [number for number in range(1024) if X86 and comes_through(0x40000000 | number)]\nprint('ESCAPED' if got else 'contained', got)",
    ),
    Attack(
        "hides calls behind the upper half of their number",
        TABLE + "high = [number | bits for bits in (1 << 32, -1 << 32, 1 << 63) for number in range(512) if number not in named]\n"
        "got = [number for number in high if comes_through(ctypes.c_long(number).value)]\nprint('ESCAPED' if got else 'contained', got)",
    ),
    Attack(
        "calls at random what it may call",
        TABLE + "import random\ndraw = random.Random(0)\nprint('started', flush=True)\n"
        "harmless = sorted(n for n in named - {None, 60 if X86 else 93, 231 if X86 else 94})\nwhile True:\n"
        "    arguments = [draw.choice((0, 1, -1, 3, 4096, 1 << 31, 1 << 63, id(draw), draw.getrandbits(64))) for _ in range(6)]\n"
        "    libc.syscall(ctypes.c_long(draw.choice(harmless)), *[ctypes.c_ulong(a) for a in arguments])",
        prints="started", timeout=1.0, **ANYHOW,
    ),
    Attack(
        "lends its priority to others by futexes",
        "word = (ctypes.c_uint32 * 4)(os.getppid())\ntime_out = (ctypes.c_long * 2)(0, 1)\n"
        "def lend(op):\n    try: call(202, 98, word, op, 1, time_out, word, 0)\n"
        "    except OSError as error:\n        if error.errno not in (errno.EPERM, errno.ENOSYS): return op, str(error)\n        raise\n"
        "for op in (2, 6, 7, 8, 11, 12, 13):\n    for flags in (0, 128, 256, 384, 1 << 31): attempt(lend, op | flags)",
    ),
    _each(
        "spoils or merges pages of the host's memory",
        *[f"libcall('madvise', ctypes.c_void_p(ctypes.addressof(ctypes.create_string_buffer(8192)) & -4096), ctypes.c_size_t(4096), {advice})" for advice in (100, 101, 12, 21, 20)],
    ),
    Attack(
        "splits its memory into the most mappings there can be",
        "room = mmap.mmap(-1, 1 << 29)\nbase = ctypes.addressof(ctypes.c_char.from_buffer(room))\ncount = 0\n"
        "for page in range(0, 1 << 17, 2):\n    if libc.mprotect(ctypes.c_void_p(base + 4096 * page), ctypes.c_size_t(4096), 1): break\n    count += 1\n"
        "print('ESCAPED' if count > 70000 else 'contained', count)",
        memory_mb=1024,
    ),
    _each(
        "looks behind the links of the process file system",
        *[f"os.open('/proc/{path}', os.O_RDONLY)" for path in ("self/root/etc/passwd", "self/cwd/../etc/passwd", "self/map_files", "self/pagemap", "self/syscall", "self/auxv", "thread-self/environ", "self/task", "net/tcp", "kcore", "keys", "modules", "kallsyms")],
        # a handle of its own namespace may be had at level B, but nothing takes it
        "call(308, 268, os.open('/proc/self/ns/pid', os.O_RDONLY), 0)", "fcntl.ioctl(os.open('/proc/self/ns/pid', os.O_RDONLY), 0xB701)",
        *[f"os.open('/proc/self/{path}', os.O_WRONLY)" for path in ("mem", "oom_score_adj", "uid_map", "setgroups", "attr/current", "clear_refs", "comm", "coredump_filter", "timerslack_ns", "loginuid")],
    ),
    _each("sets an alarm that wakes the machine", "call(283, 85, 8, 0) and 1 // 0 if not os.getuid() else 1 // 0", "refused(222, 107)"),
    Attack(
        "maps what it may only read so that it can be written",
        "def file(): return os.open(json.__file__, os.O_RDONLY)\n"
        "attempt(lambda: mmap.mmap(file(), 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))\n"
        "def later():\n    page = ctypes.CDLL(None).mmap\n    page.restype = ctypes.c_void_p\n    at_ = page(None, ctypes.c_size_t(4096), 1, 1, file(), ctypes.c_long(0))\n"
        "    libcall('mprotect', ctypes.c_void_p(at_), ctypes.c_size_t(4096), 3)\nattempt(later)",
    ),
    # races with its own end
    Attack("floods and ends by itself at the same moment", "print('contained', flush=True)\nfor _ in range(258): os.write(1, bytes(1 << 16))\nos._exit(0)", return_code=None),
    Attack(
        "makes threads while it is being stopped",
        "print('started', flush=True)\nthreading.stack_size(65536)\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(0.001,)).start()\n    except RuntimeError: pass",
        **ENDLESS,
    ),
    Attack(
        "ends from many threads at once",
        "print('contained', flush=True)\ngate = threading.Barrier(24)\n"
        "def end(number):\n    gate.wait()\n    (os._exit, lambda n: os.kill(os.getpid(), 9), lambda n: os.abort(), lambda n: ctypes.string_at(0))[number % 4](number)\n"
        "[threading.Thread(target=end, args=(n,)).start() for n in range(24)]",
        return_code=None,
    ),
    Attack(
        "storms its threads with signals",
        "print('started', flush=True)\nsignal.signal(signal.SIGUSR1, lambda *_: None)\nmain = threading.main_thread().ident\n"
        "def storm():\n    while True: signal.pthread_kill(main, signal.SIGUSR1)\n[threading.Thread(target=storm).start() for _ in range(4)]\nwhile True: pass",
        **ENDLESS,
    ),
    Attack("is deep in the kernel when it is stopped", "print('started', flush=True)\nroom = bytearray(1 << 28)\nbuffer = ctypes.c_char.from_buffer(room)\nwhile True: libc.getrandom(ctypes.byref(buffer), ctypes.c_size_t(1 << 28), 0)", **ENDLESS),
    Attack("waits for what never comes", "print('started', flush=True)\nword = (ctypes.c_uint32 * 1)(0)\nwhile True: libc.syscall(ctypes.c_long(202 if X86 else 98), word, 128, 0, 0, 0, 0)", **ENDLESS),
    Attack("waits with every signal but death blocked and pending", "print('started', flush=True)\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "for number in range(34, 65):\n    for _ in range(300): os.kill(os.getpid(), number)\nsignal.sigwait([])", **ENDLESS),
    Attack("hides its output behind streams that loop", "print('started', flush=True)\nclass S:\n    closed = False\n    def write(self, _): return 0\n    def flush(self):\n        while True: pass\nsys.stdout = S()", **ENDLESS),
    # errors that fight back
    Attack("raises an error that cannot be told", "print('contained', flush=True)\nclass E(Exception):\n    def __str__(self): raise self\n    __repr__ = __str__\n    __notes__ = property(__str__)\nraise E", return_code=1),
    Attack("raises an error that is told for ever", "print('started', flush=True)\nclass E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", **ENDLESS),
    Attack("raises errors that cause one another", "print('contained', flush=True)\na, b = ValueError(1), ValueError(2)\na.__cause__, b.__cause__, a.__context__ = b, a, b\nraise a", return_code=1),
    Attack("raises groups within groups", "print('contained', flush=True)\ne = ValueError(1)\nfor _ in range(20000): e = ExceptionGroup('g', [e])\nraise e", prints="contained", **ANYHOW),
    Attack("raises a syntax error with impossible places", "print('contained', flush=True)\nraise SyntaxError('x', ('main.py', -5, 10**9, 'a' * 10**6, 10**9, -1))", prints="contained", **ANYHOW),
    Attack("raises an error of a hundred million letters", "print('contained', flush=True)\nraise ValueError('x' * 10**8)", prints="contained", **ANYHOW),
    # the interpreter beneath it
    Attack(
        "searches its raw memory for the others' programs",
        "import re\nmarker = re.compile(b''.join(b'[%c]' % letter for letter in reversed(b'egarfisso-hsimaeuqs')))  # of which no copy is the name itself\nfound = 0\nread, write = os.pipe()\n"
        "areas = sorted({(id(o) >> 20) for o in __import__('gc').get_objects()} | {id(n) >> 20 for n in sys.modules})\n"
        "for area in areas:\n    for page in range(256):\n"
        "        if libc.write(write, ctypes.c_void_p((area << 20) + 4096 * page), ctypes.c_size_t(4096)) == 4096:\n"
        "            found += bool(marker.search(os.read(read, 4096)))\nprint('ESCAPED' if found else 'contained', len(areas))",
    ),
    Attack("kills what cannot die", "print('contained', flush=True)\nfor thing in (json, (), '', int, type, None):\n    ctypes.memset(id(thing), 0, 4); thing = None", prints="contained", **ANYHOW),
    Attack(
        "writes over all that it was given",
        "print('contained', flush=True)\nfor thing in list(sys.modules.values()):\n    for value in list(vars(thing).values()): ctypes.memset(id(value), 0xff, 64)",
        prints="contained", **ANYHOW,
    ),
    *[
        Attack(f"ends the interpreter beneath itself by {name}", f"print('contained', flush=True)\nctypes.pythonapi.{name}({argument})", prints="contained", timeout=2.0, **ANYHOW)
        for name, argument in (("Py_FinalizeEx", ""), ("Py_Exit", "3"), ("PyEval_SaveThread", ""), ("PyOS_AfterFork_Child", ""), ("Py_FatalError", "b'x'"))
    ],
    Attack(
        "lets the collector loose on all that it was given",
        "import gc\ngc.unfreeze(); gc.set_threshold(1)\nfor name in list(sys.modules):\n    if name not in ('sys', 'builtins', '__main__'): del sys.modules[name]\n"
        "[gc.collect() for _ in range(3)]\nprint('contained')",
    ),
    Attack(
        "calls the helper beneath subprocess",
        "import _posixsubprocess\nfor count in range(17, 25):\n    try: print('ESCAPED', _posixsubprocess.fork_exec(*[[b'/bin/true'], (b'/bin/true',), True, (), None, None, -1, -1, -1, -1, -1, -1, 1, 2, True, False, 0, None, None, None, -1, None, True, 0][:count]))\n"
        "    except BaseException: pass\nprint('contained')",
    ),
    Attack("has itself woken through its own output", "a, b = socket.socketpair()\na.setblocking(False)\nsignal.set_wakeup_fd(a.fileno())\nos.set_blocking(1, False)\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.set_wakeup_fd(1, warn_on_full_buffer=False)\nsignal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)\ntime.sleep(0.2)\nsignal.setitimer(signal.ITIMER_REAL, 0)\nprint('contained')"),
]  # fmt: skip
