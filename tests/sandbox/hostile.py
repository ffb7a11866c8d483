# ruff: noqa: E501
"""Hostile programs. Each prints ESCAPED where it got through; `Attack` says what else must be true of its end.

A program reads facts about the host as JSON from its standard input into `at`. `attempt(f)` prints ESCAPED if f succeeds.
"""

from __future__ import annotations

import dataclasses

PRELUDE = r"""
import ctypes, errno, fcntl, json, mmap, os, platform, resource, signal, socket, subprocess, sys, threading, time
at = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
X86 = platform.machine() == "x86_64"
def attempt(function, *arguments):
    try:
        value = function(*arguments)
    except BaseException as error:
        print("contained", type(error).__name__, error)
    else:
        print("ESCAPED", repr(value)[:200])
def call(x86, arm, *arguments):
    number = x86 if X86 else arm
    if number is None:
        raise OSError("not here")
    value = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])
    if value < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value
def refused(x86, arm):
    # arguments that no kernel takes, so that nothing happens even where the call gets through
    try:
        call(x86, arm, -1, -1, -1, -1, -1, -1)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, None):
            return f"{x86}: {error}"
        raise
def libcall(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""


@dataclasses.dataclass(frozen=True)
class Attack:
    """A program and its end: allowed statuses, return code (None: any), and what it must have printed."""

    name: str
    code: str
    statuses: tuple[str, ...] = ("finished",)
    return_code: int | None = 0
    prints: str = "contained"
    timeout: float = 20.0
    memory_mb: int = 512

    @property
    def program(self) -> str:
        return PRELUDE + self.code


def _each(name: str, *lines: str, setup: str = "", **more) -> Attack:
    return Attack(name, setup + "\n".join(f"attempt(lambda: {line})" for line in lines), **more)


ENDLESS = dict(statuses=("timeout",), return_code=-9, prints="started", timeout=1.0)
MEMORY = dict(statuses=("memory", "finished"), return_code=None, prints="started", timeout=30.0, memory_mb=256)

ATTACKS = [
    # reading what is not its own
    _each("reads a secret file", "open(at['secret']).read()", "os.open(at['secret'], os.O_RDONLY)"),
    _each(
        "reads the host's accounts", "open('/etc/passwd').read()", "open('/etc/shadow').read()", "os.listdir('/root')",
        "os.listdir('/home')", "open('/etc/hostname').read()", "open('/etc/ssh/sshd_config').read()",
    ),
    _each(
        "reads the process file system", "open('/proc/self/environ').read()", "open('/proc/1/environ').read()",
        "open('/proc/self/maps').read()", "open('/proc/cpuinfo').read()", "os.listdir('/proc')", "os.readlink('/proc/self/exe')",
        "open('/proc/self/mem', 'rb')", "os.listdir('/proc/self/fd')", "open('/proc/sysrq-trigger', 'w')",
    ),
    _each("reads sysfs and cgroups", "os.listdir('/sys')", "os.listdir('/sys/fs/cgroup')", "open('/sys/power/state', 'w')"),
    _each(
        "reads the caller", "open(f\"/proc/{at['pid']}/environ\", 'rb').read()", "open(f\"/proc/{at['pid']}/mem\", 'rb')",
        "open(f\"/proc/{at['pid']}/cmdline\").read() or 1/0", "os.listdir(f\"/proc/{at['pid']}/fd\")",
        "os.readlink(f\"/proc/{at['pid']}/cwd\")", "open(f\"/proc/{os.getppid()}/environ\").read()",
    ),
    _each("climbs out by dots", "open('../' * 30 + at['secret'].lstrip('/')).read()", "os.listdir('../' * 30 + 'home')"),
    Attack(
        "searches the whole tree",
        "found = [f for d, _, fs in os.walk('/') for f in fs if f == os.path.basename(at['secret'])]\n"
        "print('ESCAPED' if found else 'contained')",
        timeout=60.0,
    ),
    _each("opens by handle", "call(304, 265, -100, b'\\0' * 64, 0)", "call(303, 264, -100, b'/', b'\\0' * 64, b'\\0' * 8, 0)"),
    Attack(
        "follows links of its own",
        "attempt(lambda: (os.symlink(at['secret'], 'l'), open('l').read()))\n"
        "attempt(lambda: (os.symlink('/', 'r'), open('r' + at['secret']).read()))\n"
        "attempt(lambda: os.link(at['secret'], 'h'))\n"
        "attempt(lambda: os.link(json.__file__, 'h'))",
    ),
    _each("opens devices", *[
        f"os.open('/dev/{name}', os.O_RDWR)"
        for name in ("mem", "kmsg", "port", "sda", "vda", "tty", "tty0", "ptmx", "kvm", "fuse", "loop-control", "userfaultfd", "vsock")
    ]),
    _each("makes devices", "os.mknod('dev', 0o600 | 0o060000, os.makedev(8, 0))", "os.mkfifo('pipe')"),
    Attack("looks for secrets in its environment", "print('ESCAPED' if 'SECRET' in str(os.environ) else 'contained')"),
    Attack(
        "looks for the others' programs in its own memory",
        "import gc, inspect\n"
        "marker = 'egarfisso-hsimaeuqs'  # backwards, so as not to find itself\n"
        "seen = [o for o in gc.get_objects() if isinstance(o, (dict, list, tuple)) and len(o) < 5000]\n"
        "texts = [str(v) for o in seen for v in (o.values() if isinstance(o, dict) else o) if isinstance(v, (str, bytes))]\n"
        "texts += [str(f.frame.f_locals) for f in inspect.stack()]\n"
        "print('ESCAPED' if any(marker in text[::-1] for text in texts) else 'contained')",
    ),
    Attack(
        "uses inherited descriptors",
        "for number in range(3, 4096):\n"
        "    try:\n        os.fstat(number)\n        print('ESCAPED', number)\n    except OSError:\n        pass\n"
        "print('contained')",
    ),
    Attack(
        "forges the end of its run",
        "for number in range(3, 64):\n"
        "    for text in (b'k', b'{\"exit\": 1, \"code\": 0}', b'f'):\n"
        "        try:\n            os.write(number, text); print('ESCAPED', number)\n        except OSError:\n            pass\n"
        "print('contained'); print(json.dumps({'status': 'finished', 'return_code': 0})); os._exit(9)",
        return_code=None,
    ),
    # touching other processes
    _each(
        "signals others", "os.kill(at['pid'], 0)", "os.kill(os.getppid(), signal.SIGKILL)", "os.kill(1, 0)", "os.kill(-1, 0)",
        "os.kill(0, 0)", "os.killpg(0, 0)", "os.killpg(os.getpgrp(), 0)", "call(234, 131, os.getppid(), os.getppid(), 0)",
        "call(200, 130, os.getppid(), 0)", "refused(200, 130)", "refused(129, 138)", "refused(297, 240)",
    ),
    Attack(
        "signals every process there is",
        "hits = 0\nfor pid in range(1, 70000):\n"
        "    if pid != os.getpid():\n"
        "        try:\n            os.kill(pid, 0); hits += 1\n        except OSError:\n            pass\n"
        "print('ESCAPED' if hits else 'contained', hits)",
        timeout=60.0,
    ),
    _each(
        "holds others by pidfd", "call(434, 434, at['pid'], 0)", "call(434, 434, os.getppid(), 0)", "call(434, 434, os.getpid(), 0)",
        "refused(438, 438)", "refused(424, 424)", "refused(448, 448)",
    ),
    _each(
        "traces", "call(101, 117, 16, at['pid'], 0, 0)", "call(101, 117, 0x4206, os.getppid(), 0, 0)", "call(101, 117, 0, 0, 0, 0)",
        "refused(101, 117)", "refused(310, 270)", "refused(311, 271)", "refused(312, 272)", "refused(440, 440)", "refused(246, 104)",
    ),
    _each(
        "limits others", "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))", "resource.prlimit(at['pid'], resource.RLIMIT_CPU)",
        "call(203, 122, os.getppid(), 8, b'\\1' + b'\\0' * 7)", "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", "os.setpriority(os.PRIO_PROCESS, 0, -5)", "call(251, 30, 1, 0, 0)",
        "os.sched_setaffinity(0, {0})", "call(256, 238, os.getppid(), 0, 0, 0)",
    ),
    # the network
    _each(
        "connects", "socket.create_connection(('127.0.0.1', at['port']), 2)", "socket.create_connection(('1.1.1.1', 80), 2)",
        "socket.socket(socket.AF_INET6, socket.SOCK_STREAM).connect(('::1', at['port']))",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', at['port']))",
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)", "socket.socket(getattr(socket, 'AF_BLUETOOTH', 31), 3, 1)",
        "[socket.socket(family, kind) for family in range(2, 46) for kind in (1, 2, 3, 5)]",
    ),
    _each("serves", "socket.create_server(('127.0.0.1', 0))", "socket.socket(socket.AF_UNIX).bind('\\0mine')"),
    _each(
        "asks for names", "socket.gethostbyname('example.com')", "socket.getaddrinfo('localhost', 80)",
        "__import__('urllib.request').request.urlopen('http://127.0.0.1:%d' % at['port'], timeout=2)",
    ),
    Attack(
        "reaches abstract and other Unix sockets",
        "name = '\\0' + at['abstract']\n"
        "attempt(lambda: socket.socket(socket.AF_UNIX).connect(name))\n"
        "attempt(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '\\0' + at['datagram']))\n"
        "attempt(lambda: socket.socketpair()[0].sendto(b'x', '\\0' + at['datagram']))\n"
        "attempt(lambda: socket.socketpair()[0].connect(name))\n"
        "attempt(lambda: socket.socketpair()[0].sendmsg([b'x'], [], 0, '\\0' + at['datagram']))\n"
        "attempt(lambda: socket.send_fds(socket.socketpair()[0], [b'x'], [1]))\n"
        "attempt(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))",
    ),
    # more processes
    _each(
        "forks", "os.fork() or os._exit(0)", "libcall('fork')", "libcall('vfork')", "call(57, None)", "call(58, None)",
        "call(56, 220, 17, 0, 0, 0, 0)", "call(56, 220, 0x4000 | 0x100 | 17, 0, 0, 0, 0)", "call(435, 435, b'\\0' * 88, 88)",
        "os.forkpty()",
    ),
    _each(
        "starts programs", "subprocess.run(['/bin/true'])", "subprocess.run('id', shell=True)", "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv(sys.executable, ['python'])", "1 // (os.system('true') == 0)", "os.popen('id').read() or 1 // 0",
        "__import__('multiprocessing').Process(target=print).start()", "call(59, 221, b'/bin/true', 0, 0)",
    ),
    _each(
        "runs a file from memory", "os.memfd_create('x')", "call(319, 279, b'x', 0)", "call(447, 447, 0)",
        "call(322, 281, -100, b'/bin/true', 0, 0, 0)", "libcall('shm_open', b'/x', 0o102, 0o600)",
    ),
    _each("leaves its session", "os.setsid()", "os.setpgid(0, 0)", "libcall('daemon', 0, 0)"),
    # rights
    _each(
        "changes who it is", "os.setuid(0) if os.getuid() else 1 // 0", "os.setgid(0) if os.getgid() else 1 // 0", "os.setgroups([0])",
        "os.setresuid(1, 1, 1)", *[f"refused({x86}, {arm})" for x86, arm in ((105, 146), (106, 144), (117, 147), (116, 159), (126, 91), (123, 152))],
    ),
    _each(
        "mounts", "os.chroot('.')", *[
            f"refused({x86}, {arm})"
            for x86, arm in ((165, 40), (166, 39), (155, 41), (161, 51), (428, 428), (429, 429), (430, 430), (432, 432), (442, 442), (167, 224))
        ],
    ),
    _each(
        "enters namespaces", *[f"call(272, 97, {flag})" for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x02000000, 0x80)],
        "refused(272, 97)", "refused(308, 268)", "call(56, 220, 0x10000000 | 17, 0, 0, 0, 0)", "call(56, 220, 0x10010900, 0, 0, 0, 0)",
    ),
    _each("leaves a chroot", "os.fchdir(os.open('/', os.O_RDONLY)) or os.chroot('../..')", "os.listdir('/../../..' + at['folder'])"),
    _each(
        "raises its limits", *[
            f"resource.setrlimit(resource.RLIMIT_{name}, (resource.RLIM_INFINITY,) * 2)"
            for name in ("AS", "NPROC", "FSIZE", "NOFILE", "CPU", "CORE", "MEMLOCK", "DATA")
        ],
        "call(160, 164, 9, b'\\xff' * 16)",
    ),
    # io_uring, userfaultfd, bpf, perf, keys, inotify, fanotify, personality, modify_ldt, syslog, modules, kexec, reboot, names and clocks of
    # the host, message queues, shared memory, semaphores, NUMA, memory locks and files, Landlock, seccomp, cookies, key domains
    _each("uses exotic kernel doors", *[
        f"refused({x86}, {arm})"
        for x86, arm in (
            (425, 425), (426, 426), (427, 427), (323, 282), (321, 280), (298, 241), (250, 219), (248, 217), (249, 218), (294, 26), (254, 27),
            (300, 262), (135, 92), (154, None), (103, 116), (175, 105), (313, 273), (320, 294), (169, 142), (170, 161), (171, 162), (164, 170),
            (227, 112), (159, 171), (206, 0), (240, 180), (29, 194), (30, 196), (64, 190), (68, 186), (237, 235), (279, 239), (149, 228),
            (151, 230), (325, 284), (319, 279), (447, 447), (444, 444), (446, 446), (317, 277), (212, 18), (329, 288), (330, 289), (173, None),
            (172, None), (179, 60), (443, 443), (216, 234), (278, 75), (276, 77), (275, 76), (222, 107), (282, 74), (289, 74), (334 + 100, 434),
            (450, 450), (457, 457), (458, 458), (462, 462),
        )
    ]),
    _each(
        "undoes its own chains", "libcall('prctl', 4, 1, 0, 0, 0)", "libcall('prctl', 1, 0, 0, 0, 0)", "libcall('prctl', 8, 1, 0, 0, 0)",
        "libcall('prctl', 22, 2, b'\\0' * 16, 0, 0)", "libcall('prctl', 36, 1, 0, 0, 0)", "libcall('prctl', 35, 1, 0, 0, 0)",
        "libcall('prctl', 47, 2, 0, 0, 0)", "libcall('prctl', 59, 0, 0, 0, 0)", "libcall('prctl', 31, 1, 0, 0, 0)",
    ),
    Attack("calls by the x32 table", "attempt(lambda: call(0x40000000 + 39 if X86 else -1, -1))\nattempt(lambda: call(0x40000000 + 57 if X86 else -1, -1))"),
    Attack(
        "calls by the 32-bit table",
        "print('contained', flush=True)\n"
        "if X86:\n"
        "    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "    page.write(bytes.fromhex('53 b8 14000000 cd80 5b c3'))\n"  # push rbx; mov eax, 20 (getpid); int 0x80; pop rbx; ret
        "    print('ESCAPED', ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())",
        return_code=None,
    ),
    _each(
        "makes the kernel signal others", "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", "fcntl.fcntl(0, 10, 9)", "fcntl.fcntl(1, 1031, 1 << 20)",
        "fcntl.ioctl(1, 0x8901, b'\\0' * 4)", "fcntl.ioctl(0, 0x5412, b'x')", "call(222, 107, 0, b'\\0' * 64, b'\\0' * 8)",
    ),
    # memory
    Attack("allocates at once", "print('started', flush=True)\nbytearray(10**11)", **MEMORY),
    Attack("allocates by and by", "print('started', flush=True)\nkept = []\nwhile True: kept.append(bytearray(1 << 20))", **MEMORY),
    Attack("grows a list", "print('started', flush=True)\nkept = [0]\nwhile True: kept += kept", **MEMORY),
    Attack("grows a number", "print('started', flush=True)\nn = 1 << 1000\nwhile True: n = n << (n.bit_length())", **MEMORY),
    Attack(
        "maps memory",
        "print('started', flush=True)\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 1 << 24)); kept[-1].write(bytes(1 << 24))",
        **MEMORY,
    ),
    Attack("allocates an array", "import numpy\nprint('started', flush=True)\nnumpy.ones((1 << 16, 1 << 16))", **MEMORY),
    _each("takes memory elsewhere", "mmap.mmap(-1, 1 << 30, flags=0x40022)", "libcall('mlockall', 3)", "fcntl.fcntl(1, 1031, 1 << 24)"),
    Attack(
        "grows its standard input",
        "attempt(lambda: os.ftruncate(0, 1 << 40))\nattempt(lambda: os.write(0, b'x'))\nattempt(lambda: os.posix_fallocate(0, 0, 1 << 40))\n"
        "attempt(lambda: fcntl.fcntl(0, 1033, 0))",
    ),
    Attack(
        "zip bomb",
        "import io, zipfile, zlib\nprint('started', flush=True)\n"
        "bomb = zlib.compress(bytes(1 << 26))\nkept = []\nwhile True: kept.append(zlib.decompress(bomb))",
        **MEMORY,
    ),
    # threads
    Attack(
        "floods with threads",
        "threading.stack_size(65536)\nwait = threading.Event()\ncount = 0\ntry:\n"
        "    for count in range(5000): threading.Thread(target=wait.wait, daemon=True).start()\n"
        "except RuntimeError: pass\nwait.set()\nprint('ESCAPED' if count > 200 else 'contained', count)",
    ),
    Attack(
        "floods with raw threads",
        # each new thread finds a stack of zeros; its first return jumps to 0: the process dies, or the limit said no before
        "count = 0\ntry:\n"
        "    for count in range(1000):\n"
        "        stack = mmap.mmap(-1, 4096); address = ctypes.addressof(ctypes.c_char.from_buffer(stack)) + 4000\n"
        "        call(56, 220, 0x10900 | 0x200 | 0x400 | 0x40000, address, 0, 0, 0)\n"
        "except OSError: pass\nprint('ESCAPED' if count > 200 else 'contained', count)",
        return_code=None,
        prints="",
    ),
    Attack(
        "burns in many threads",
        "print('started', flush=True)\n[threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start() for _ in range(8)]",
        **ENDLESS,
    ),
    # disks
    Attack(
        "fills its disk",
        "written = 0\ntry:\n"
        "    for number in range(20):\n"
        "        with open(f'f{number}', 'wb', buffering=0) as file:\n"
        "            for _ in range(20): written += file.write(bytes(1 << 20))\n"
        "except OSError as error: print(error)\nprint('ESCAPED' if written > 65 << 20 else 'contained', written)",
    ),
    Attack(
        "fills its disk with names",
        "count = 0\ntry:\n    for count in range(100000): open(f'f{count}', 'w').close()\n"
        "except OSError as error: print(error)\nprint('ESCAPED' if count > 4200 else 'contained', count)",
    ),
    Attack(
        "nests directories",
        "count = 0\ntry:\n    for count in range(100000): os.mkdir('d'); os.chdir('d')\n"
        "except OSError as error: print(error)\nprint('ESCAPED' if count > 4200 else 'contained', count)",
    ),
    _each("writes a sparse giant", "os.truncate(open('giant', 'wb').fileno(), 1 << 40)", "os.posix_fallocate(open('g', 'wb').fileno(), 0, 1 << 40)"),
    _each(
        "writes elsewhere", "open('/dev/shm/x', 'w').write('x')", "open('/var/tmp/x', 'w')", "open('/x', 'w')", "open('/dev/x', 'w')",
        "open('/etc/x', 'w')", "os.mkdir('/new')", "open(at['folder'] + '/x', 'w')", "open('/run/x', 'w')", "open('/mnt/x', 'w')",
    ),
    _each(
        "changes what the next run imports", "open(json.__file__, 'a')", "os.truncate(json.__file__, 0)", "os.unlink(json.__file__)",
        "os.rename(json.__file__, json.__file__ + '.x')", "os.chmod(json.__file__, 0)", "os.utime(json.__file__, (0, 0))",
        "os.chown(json.__file__, 0, 0)", "os.setxattr(json.__file__, 'user.x', b'y')", "os.removexattr(json.__file__, 'user.x')",
        "open(os.path.dirname(json.__file__) + '/evil.py', 'w')",
        "[open(path + '/sitecustomize.py', 'w') for path in sys.path if path.startswith('/') and path != '/tmp']",
        "os.fchmod(os.open(json.__file__, os.O_RDONLY), 0)", "os.replace(json.__file__, json.__file__)",
        "open(__import__('numpy').__file__, 'a')", "os.mkdir(os.path.dirname(json.__file__) + '/__pycache__/x')",
    ),
    # output
    Attack("floods its output", "print('contained')\nwhile True: print('x' * 10000)", statuses=("finished",), return_code=-9),
    Attack("floods its errors", "print('contained')\nwhile True: sys.stderr.write('x' * 10000)", return_code=-9),
    Attack(
        "floods both",
        "print('contained', flush=True)\ndef flood(n):\n    while True: os.write(n, b'x' * 100000)\n"
        "threading.Thread(target=flood, args=(2,)).start(); flood(1)",
        return_code=-9,
    ),
    Attack("writes what is not text", "os.write(1, bytes(range(256)) + b'\\xff\\xfe\\xc3')\nprint('contained')"),
    Attack("prints lone surrogates", "attempt(lambda: print('\\ud800'))\nsys.stdout.reconfigure(errors='surrogatepass'); print('\\ud800')"),
    Attack("closes its output", "print('contained'); sys.stdout.close(); sys.stderr.close(); os.close(1)", return_code=None),
    Attack("closes everything", "print('contained', flush=True)\nos.closerange(0, 1000)", return_code=None),
    Attack("replaces its output", "print('contained', flush=True)\nsys.stdout = None; sys.stderr = 5; sys.excepthook = None; 1 / 0", return_code=1),
    # ends
    Attack("exits at once", "print('contained', flush=True)\nos._exit(7)", return_code=7),
    Attack("exits strangely", "print('contained')\nsys.exit({1: 2})", return_code=1),
    Attack("kills itself", "print('contained', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)", return_code=-9),
    Attack("aborts", "print('contained', flush=True)\nos.abort()", return_code=-6),
    Attack("reads address 0", "print('contained', flush=True)\nctypes.string_at(0)", return_code=-11),
    Attack("stops itself", "print('started', flush=True)\nos.kill(os.getpid(), signal.SIGSTOP)", **ENDLESS),
    Attack(
        "recurses deeply",
        "sys.setrecursionlimit(10**9)\nprint('started', flush=True)\ndef f(x): return f([x]) + 1\nf(0)",
        statuses=("finished", "memory", "timeout"), return_code=None, prints="started", timeout=30.0,
    ),
    Attack("nests its source", "print('started', flush=True)\neval('(' * 100000 + ')' * 100000)", return_code=1, prints="started"),
    Attack("loops", "print('started')\nwhile True: pass", **ENDLESS),
    Attack("loops in C", "print('started', flush=True)\nsum(range(10**13))", **ENDLESS),
    Attack("sleeps", "print('started')\ntime.sleep(1000)", **ENDLESS),
    Attack(
        "ignores every signal",
        "print('started', flush=True)\n"
        "for s in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\nwhile True:\n    try: time.sleep(100)\n    except BaseException: pass",
        **ENDLESS,
    ),
    Attack("catches everything", "print('started', flush=True)\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass", **ENDLESS),
    Attack("loops when it exits", "import atexit\nprint('started', flush=True)\n@atexit.register\ndef _():\n    while True: pass", **ENDLESS),
    Attack("leaves a thread running", "print('started', flush=True)\nthreading.Thread(target=time.sleep, args=(1000,)).start()", **ENDLESS),
    Attack("loops in a regular expression", "import re\nprint('started', flush=True)\nre.match('(a+)+$', 'a' * 50 + 'b')", **ENDLESS),
    Attack("floods itself with signals", "print('started', flush=True)\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)\nwhile True: pass", **ENDLESS),
    Attack(
        "changes the runner around it",
        "os._exit = lambda code: None\nthreading._shutdown = None\nimport atexit\natexit._run_exitfuncs = 1 and None\n"
        "frame = sys._getframe(1)\nwhile frame:\n    for name in list(frame.f_locals):\n        try: frame.f_locals[name] = None\n        except BaseException: pass\n"
        "    frame = frame.f_back\nprint('contained')",
        return_code=None,
    ),
    # tricks with numbers that are not what they seem
    _each(
        "hides flags in the upper half of a register", "call(157, 167, (1 << 32) | 4, 1, 0, 0, 0)", "call(62, 129, os.getppid() | (1 << 32), 0)",
        "call(16, 29, 0, (1 << 32) | 0x5412, b'x')", "call(72, 25, 1, (1 << 32) | 1031, 1 << 20)", "call(302, 261, 0, 9, b'\\xff' * 16, 0)",
        "call(302, 261, 0, 9, 1 << 32, 0)", "call(53, 199, (1 << 32) | 2, 1, 0, b'\\0' * 8)", "call(41, 198, (1 << 32) | 2, 1, 0)",
        "call(56, 220, (1 << 32) | 17, 0, 0, 0, 0)",
    ),
    _each(
        "asks for memory that is not counted", "mmap.mmap(-1, 1 << 21, flags=0x40022)", "call(9, 222, 0, 1 << 21, 3, 0x40022 | (21 << 26), -1, 0)",
        "libcall('mlock', b'x' * 65536, 65536)", "call(29, 194, 0, 1 << 20, 0o1600)", "__import__('multiprocessing.shared_memory').shared_memory.SharedMemory(create=True, size=1 << 20)",
        "__import__('multiprocessing').Semaphore()", "call(319, 279, b'x', 4)", "call(447, 447, 0)", "call(453, 453, 0, 4096, 0)",
    ),
    # each kernel door with the very arguments that it would take
    _each(
        "opens io_uring, userfaultfd and bpf in earnest", "call(425, 425, 8, ctypes.create_string_buffer(120))", "call(323, 282, 1)", "call(323, 282, 0)",
        "call(321, 280, 0, ctypes.create_string_buffer(b'\\2\\0\\0\\0\\4\\0\\0\\0\\4\\0\\0\\0\\1', 72), 72)",
        "call(298, 241, ctypes.create_string_buffer(b'\\1\\0\\0\\0\\x80\\0\\0\\0', 128), 0, -1, -1, 0)", "call(310, 270, at['pid'], 0, 0, 0, 0, 0)",
    ),
    _each(
        "keeps and reads keys", "call(248, 217, b'user', b'x', b'secret', 6, -2)", "call(250, 219, 0, -3, 0)", "call(250, 219, 11, -4, ctypes.create_string_buffer(64), 64)",
        "call(250, 219, 1, b'joined')", "call(249, 218, b'user', b'x', 0, -2)",
    ),
    _each(
        "watches the host's files", "call(294, 26, 0)", "call(253, None)", "call(300, 262, 0, 0)", "libcall('inotify_init')",
        "fcntl.fcntl(os.open('/', os.O_RDONLY), fcntl.F_NOTIFY, 2)", "fcntl.fcntl(os.open(json.__file__, os.O_RDONLY), 1024, 0)",
    ),
    _each(
        "reaches through descriptors that name only a path", "os.listdir(os.open('/etc', os.O_PATH))", "os.open('passwd', os.O_RDONLY, dir_fd=os.open('/etc', os.O_PATH))",
        "os.chdir('/etc') or open('passwd').read()", "os.open(f\"/proc/self/fd/{os.open('/', os.O_PATH)}/etc/passwd\", os.O_RDONLY)",
        "os.write(os.open('/dev/fd/0', os.O_RDWR), b'x')", "os.open('/tmp', os.O_TMPFILE | os.O_RDWR) and os.link('/proc/self/fd/3', '/x')",
    ),
    _each(
        "takes descriptors from its family", "call(438, 438, call(434, 434, os.getppid(), 0), 0, 0)", "call(438, 438, call(434, 434, 1, 0), 0, 0)",
        "call(434, 434, os.getpid() + 1, 0)", "call(312, 272, os.getpid(), os.getppid(), 0, 0, 0)", "call(247, 95, 3, call(434, 434, os.getpid(), 0), 0, 0)",
    ),
    Attack(
        "traces its neighbours",
        "hits = []\nfor pid in {*range(1, 400), *range(os.getpid() - 50, os.getpid() + 50), at['pid'], os.getppid()} - {os.getpid()}:\n"
        "    for request in (0x4206, 16):\n"
        "        try: hits.append((pid, call(101, 117, request, pid, 0, 0)))\n        except OSError: pass\n"
        "    for name in ('mem', 'maps', 'environ', 'fd/1', 'root/etc/passwd', 'task'):\n"
        "        try: hits.append((pid, os.open(f'/proc/{pid}/{name}', os.O_RDONLY)))\n        except OSError: pass\n"
        "print('ESCAPED' if hits else 'contained', hits[:5])",
    ),
    _each(
        "signals by group, queue and timer", "os.killpg(os.getppid(), 0)", "os.killpg(1, 0)", "os.kill(-os.getpid(), 0)", "call(129, 138, os.getppid(), 0, b'\\0' * 128)",
        "call(222, 107, 1, b'\\0' * 64, b'\\0' * 8)", "call(109, 154, 0, os.getppid())", "call(112, 157)", "call(297, 240, os.getppid(), os.getppid(), 0, b'\\0' * 128)",
    ),
    _each("runs a program without a file", "call(322, 281, 0, b'', 0, 0, 0x1000)", "os.execve(0, ['x'], {})", "call(59, 221, b'/proc/self/exe', 0, 0)", "libcall('system', b'true') or 1 // 0",
        "os.posix_spawnp('python3', ['python3'], {})", "ctypes.CDLL('/tmp/none.so')", "__import__('pty').fork()", "__import__('webbrowser').open('http://x') or 1 // 0"),
    Attack(
        "loads a library that it wrote",
        "def load():\n    open('/tmp/evil.so', 'wb').write(b'\\x7fELF' + bytes(4096)); m = mmap.mmap(os.open('/tmp/evil.so', os.O_RDONLY), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)\n"
        "    return m\nattempt(load)",
    ),
    _each(
        "is nice and picks its processor", "os.nice(-1)", "os.nice(1)", "os.sched_setaffinity(0, {0})", "os.sched_setaffinity(os.getppid(), {0})", "os.setpriority(os.PRIO_PGRP, 0, 1)",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))", "call(314, 274, 0, b'\\x38' + b'\\0' * 55, 0)", "os.sched_getaffinity(os.getppid())", "os.sched_getaffinity(1)",
    ),
    Attack("bombs itself with timers", "print('started', flush=True)\n"
        "for s in (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF): signal.signal(s, signal.SIG_IGN)\n"
        "for which in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):\n    signal.setitimer(which, 1e-6, 1e-6)\nwhile True: signal.sigpending()", **ENDLESS),
    Attack(
        "takes every timer and event descriptor",
        "count = 0\ntry:\n    for count in range(5000): call(283, 85, 1, 0)\nexcept OSError as error: print(error)\nprint('ESCAPED' if count > 130 else 'contained', count)",
    ),
    Attack(
        "fills pipes and socket pairs",
        "held, total = [], 0\ntry:\n    while True:\n        pair = socket.socketpair(); held.append(pair); pair[0].setblocking(False)\n"
        "        try:\n            while True: total += pair[0].send(bytes(65536))\n        except BlockingIOError: pass\n"
        "except OSError as error: print(error)\nprint('ESCAPED' if total > 64 << 20 else 'contained', total)",
    ),
    # what surrounds it in its own process
    Attack(
        "spoils the modules that the next run was given",
        "import builtins, encodings, io, random\nrandom.random = lambda: 4; os.getcwd = None; builtins.print = (lambda p: lambda *a, **k: p(*a, **k))(print)\n"
        "json.dumps = lambda *a, **k: 'ESCAPED'; builtins.len = lambda x: 0\nfor name in list(sys.modules):\n    if name != '__main__' and name not in ('sys', 'builtins'): sys.modules[name] = None\n"
        "print('contained')",
        return_code=None,
    ),
    Attack(
        "overwrites constants in memory",
        "address = id(7) + 24\nctypes.memset(address, 9, 1)\nprint('contained', flush=True)\nos._exit(0)",
        return_code=None,
    ),
    Attack(
        "comes back from the dead",
        "class Code(int):\n    def __and__(self, other): return 'no number'\n    __rand__ = __or__ = __index__ = __int__ = __and__\n"
        "del threading._shutdown\nimport atexit\natexit._run_exitfuncs = None\ndel sys.stdout, sys.stderr\nprint = None\nos.write(1, b'contained\\n')\nraise SystemExit(Code(300))",
        return_code=None,
    ),
    Attack(
        "hooks every step of its own end",
        "import atexit\ndef trace(*_): return trace\nsys.settrace(trace); sys.setprofile(trace); threading.settrace(trace)\n"
        "sys.excepthook = lambda *_: os.fork(); sys.unraisablehook = lambda *_: os.fork(); sys.displayhook = None\n"
        "def again():\n    atexit.register(print, 'late'); attempt(os.fork)\natexit.register(again)\nclass D:\n    def __del__(self): os.fork()\nkeep = D()\nsys.addaudithook(lambda *_: None)\n1 / 0",
        return_code=1,
    ),
    Attack(
        "searches the frames around it",
        "frame, found = sys._getframe(), []\nwhile frame:\n    for value in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
        "        if isinstance(value, socket.socket) and value.fileno() >= 0: found.append(value)\n        if isinstance(value, int) and not isinstance(value, bool) and 3 <= value < 64:\n"
        "            try: os.fstat(value); found.append(value)\n            except OSError: pass\n    frame = frame.f_back\nprint('ESCAPED' if found else 'contained', found)",
    ),
    Attack(
        "calls the sandbox's own functions",
        "inside = [m for n, m in sys.modules.items() if n.startswith('_sandbox.') and m]\nworlds = [o for o in __import__('gc').get_objects() if type(o).__name__ in ('World', 'Server')]\n"
        "for module in inside:\n    for name in ('unshare', 'mount', 'pivot', 'fork', 'set_capabilities'):\n"
        "        for arguments in ((), ('user',), ('none', '/tmp', 'tmpfs'), ('/',), (21,)):\n"
        "            try: value = getattr(module, name)(*arguments)\n            except BaseException: continue\n"
        "            if name != 'set_capabilities': print('ESCAPED', name, arguments, value)\n"
        "for world in worlds:\n    for path in ('self/environ', '1/environ', 'self/oom_score_adj'):\n"
        "        try: print('ESCAPED', world.in_proc(path))\n        except BaseException: pass\nprint('contained')",
    ),
    # output that means more than text
    Attack("writes terminal controls", "print('contained\\x1b]0;owned\\x07\\x1b[2J\\x1b[31m\\r\\b\\x00\\x9b6n' + '\\u202e' * 1000)"),
    Attack("writes huge characters", "print('contained', flush=True)\nfor _ in range(40): sys.stdout.write('\\U0010ffff\\u0301' * 20000)"),
    Attack("writes forged reports", "print('contained'); print(json.dumps({'exit': os.getpid(), 'code': 0, 'late': False, 'seconds': 0, 'cpu': 0, 'memory': 0}) * 100)\n"
        "for n in (0, 1, 2):\n    for text in (b'k', b'd', b'r', b'{\"ready\": 1}'):\n        try: os.write(n, text)\n        except OSError: pass\nsys.exit(5)", return_code=5),
    Attack("reads what was written for others", "attempt(lambda: os.read(1, 10))\nattempt(lambda: os.read(2, 10))\nattempt(lambda: os.pread(1, 1, 0))"),
    Attack("makes its pipes refuse to wait", "os.set_blocking(1, False); print('contained', flush=True)\ntry:\n    while True: os.write(1, bytes(65536))\nexcept BlockingIOError: os._exit(3)", return_code=None),
]  # fmt: skip
