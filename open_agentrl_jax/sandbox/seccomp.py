"""The system-call filter: an allow-list, assembled here as classic BPF, so that no library needs to be installed.

The fork server assembles the filter once; each child only fills in its own process id. Calls that are not listed fail
with EPERM. Calls of another architecture kill the process, x32 calls fail, and clone3 fails with ENOSYS, so that libc
falls back to clone, whose flags a filter can read. Standard library only: this module runs inside the fork servers.
"""

from __future__ import annotations

import errno
import struct

from .linux import CLONE, X86

# name: (x86_64 number, aarch64 number or None), from the kernel's headers
ALWAYS = {
    # files: mounts and Landlock decide which
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "lseek": (8, 62), "access": (21, None),
    "newfstatat": (262, 79), "faccessat": (269, 48), "faccessat2": (439, 439),
    "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "pread64": (17, 67), "pwrite64": (18, 68),
    "readv": (19, 65), "writev": (20, 66), "preadv": (295, 69), "pwritev": (296, 70),
    "sendfile": (40, 71), "copy_file_range": (326, 285), "pipe": (22, None),
    "pipe2": (293, 59), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "close_range": (436, 436),
    "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "umask": (95, 166),
    # memory
    "munmap": (11, 215), "mprotect": (10, 226), "brk": (12, 214), "mremap": (25, 216),
    # time
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    # waiting
    "select": (23, None), "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19), "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87), "pause": (34, None), "sched_yield": (24, 124),
    "restart_syscall": (219, 128), "wait4": (61, 260), "waitid": (247, 95),
    # threads and signals
    "rseq": (334, 293),
    "exit": (60, 93), "exit_group": (231, 94), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    # about itself
    "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getpgrp": (111, None), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getgroups": (115, 158), "uname": (63, 160), "getrusage": (98, 165),
    "getrlimit": (97, 163), "getcpu": (309, 168), "getrandom": (318, 278),
    # sockets: only the program's own pairs
    "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204), "getpeername": (52, 205),
    "getsockopt": (55, 209),
}  # fmt: skip
# Changing names, lengths and modes, and reading links: only with a private file system, since Landlock covers neither
# chmod, nor utime, nor readlink.
WITH_A_DISK = {
    "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None), "symlinkat": (266, 36),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "readlink": (89, None), "readlinkat": (267, 78),
}  # fmt: skip
# Calls that return 0 and do nothing. Flushing would reach the host's disk even through a read-only descriptor, and a
# robust list could wake a waiter in another process.
IGNORED = {
    "fsync": (74, 82), "fdatasync": (75, 83), "msync": (26, 227), "sync_file_range": (277, 84),
    "set_robust_list": (273, 99),
}  # fmt: skip
CHECKED = {
    "open": (2, None), "openat": (257, 56), "preadv2": (327, 286), "pwritev2": (328, 287),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "mmap": (9, 222), "clone": (56, 220), "prlimit64": (302, 261), "sched_getaffinity": (204, 123), "fcntl": (72, 25),
    "ioctl": (16, 29), "prctl": (157, 167), "kill": (62, 129), "tgkill": (234, 131), "socketpair": (53, 199),
    "sendto": (44, 206), "futex": (202, 98), "madvise": (28, 233),
}  # fmt: skip
CLONE3 = 435

PID = object()  # placeholder of the process's own id, known only in the child
O_TRUNC = 0o1000
THREAD = 0x100 | 0x800 | 0x10000  # CLONE_VM, CLONE_SIGHAND, CLONE_THREAD
NAMESPACES = sum(CLONE.values())
# name: conditions that must all hold; each (argument, what, values): "in" one of the values, "all" these bits set,
# "none" of these bits set, "masked" (ignored bits, values), "null" a pointer of 64 zero bits; "ignore" (argument,
# values): such calls return 0 and do nothing
ARGUMENTS = {
    "preadv2": [(5, "in", (0,))],  # RWF_NOWAIT shows which pages of a shared file another run has read
    "pwritev2": [(5, "in", (0,))],
    "clock_gettime": [(0, "none", 1 << 31)],  # negative clocks are other processes' CPU time
    "clock_getres": [(0, "none", 1 << 31)],
    "clock_nanosleep": [(0, "none", 1 << 31)],
    "mmap": [(3, "none", 0x40000)],  # huge pages come from a pool of the host
    "clone": [(0, "all", THREAD), (0, "none", NAMESPACES)],  # threads, never processes
    "prlimit64": [(0, "in", (0, PID)), (2, "null", 0)],  # get, never set
    "sched_getaffinity": [(0, "in", (0, PID))],
    # Record locks on shared libraries would be a channel between runs. Within one process they never conflict, so
    # setting one (6, 7) succeeds and does nothing. No owner, lease, notification or pipe size.
    "fcntl": [(1, "ignore", (6, 7)), (1, "in", (0, 1, 2, 3, 4, 1030, 1032))],
    "ioctl": [(1, "in", (0x5401, 0x541B, 0x5421, 0x5450, 0x5451))],  # isatty, bytes to read, blocking, close-on-exec
    "prctl": [(0, "in", (3, 15, 16, 0x53564D41))],  # dumpable?, names of threads and of memory
    "kill": [(0, "in", (PID,))],
    "tgkill": [(0, "in", (PID,))],
    "socketpair": [(0, "in", (1,)), (1, "masked", (0o2004000, (1,)))],  # unix streams, which asyncio wakes itself with
    "sendto": [(4, "null", 0)],  # to the other end, never to an address
    # Private waits and wakes, and shared waits, which pthread_join needs; no shared wakes, which reach other processes
    # through a shared library's pages, and no lending of priority.
    "futex": [(1, "masked", (0x100, (0, 9, 128, 129, 131, 132, 133, 137, 138)))],
    # no merging with equal pages of others, no eviction of pages that others read too, no poisoning
    "madvise": [(2, "in", (0, 1, 2, 3, 4, 8, 10, 11, 14, 15, 16, 17, 18, 19, 22, 23, 25, 102, 103))],
}

LOAD, EQUAL, ABOVE, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x54, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
DENY, IGNORE = FAIL | errno.EPERM, FAIL
ARCHITECTURE = 0xC000003E if X86 else 0xC00000B7


def _number(numbers: tuple[int, int | None]) -> int | None:
    return numbers[0 if X86 else 1]


def _conditions(checks: list) -> list[tuple]:
    """Instructions (code, jump if true, jump if false, constant) that end in ALLOW, DENY or IGNORE."""
    code: list[tuple] = []
    for argument, what, values in checks:
        low = 16 + 8 * argument
        code.append((LOAD, 0, 0, low))
        if what == "ignore":
            for value in values:
                code += [(EQUAL, 0, 1, value), (RETURN, 0, 0, IGNORE)]
            continue
        if what == "masked":
            code.append((AND, 0, 0, 0xFFFFFFFF & ~values[0]))
            values = values[1]
        if what in ("in", "masked"):
            for place, value in enumerate(values):
                code.append((EQUAL, len(values) - place, 0, value))
        elif what == "all":
            code += [(AND, 0, 0, values), (EQUAL, 1, 0, values)]
        elif what == "none":
            code.append((ANY_BIT, 0, 1, values))
        else:  # "null"
            code += [(EQUAL, 0, 2, 0), (LOAD, 0, 0, low + 4), (EQUAL, 1, 0, 0)]
        code.append((RETURN, 0, 0, DENY))
    return [*code, (RETURN, 0, 0, ALLOW)]


def assemble(*, disk: bool, truncates: bool) -> tuple[bytes, list[int]]:
    """Assembles the filter.

    Args:
        disk: whether the program has a private file system to change.
        truncates: whether opening with O_TRUNC may pass, because mounts or Landlock (ABI 3 or later) deny it. Older
            Landlock does not: a file that can be read and that the user owns could be emptied.

    Returns:
        (struct sock_filter instructions, offsets of the 4-byte constants to replace by the process id).
    """
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, ARCHITECTURE), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if X86:
        code += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, DENY)]  # x32
    code += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, FAIL | errno.ENOSYS)]
    allowed = ALWAYS | (WITH_A_DISK if disk else {})
    numbers = sorted(number for pair in allowed.values() if (number := _number(pair)) is not None)
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    for low, high in spans:
        code += [(AT_LEAST, 0, 2, low), (ABOVE, 1, 0, high), (RETURN, 0, 0, ALLOW)]
    for pair in IGNORED.values():
        if (number := _number(pair)) is not None:
            code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, IGNORE)]
    opening = {name: [] if truncates else [(place, "none", O_TRUNC)] for name, place in (("open", 1), ("openat", 2))}
    for name, checks in (opening | ARGUMENTS).items():
        if (number := _number(CHECKED[name])) is not None:
            block = _conditions(checks)
            code += [(EQUAL, 0, len(block), number), *block]
    code.append((RETURN, 0, 0, DENY))
    holes = [8 * place + 4 for place, line in enumerate(code) if line[3] is PID]
    return b"".join(struct.pack("HBBI", *line[:3], 0 if line[3] is PID else line[3]) for line in code), holes


def for_process(program: bytes, holes: list[int], pid: int) -> bytes:
    """Returns the filter with the process's own id filled in."""
    filled = bytearray(program)
    for hole in holes:
        struct.pack_into("I", filled, hole, pid)
    return bytes(filled)
