"""Kernel calls that Python lacks, through ctypes. Standard library only: this module runs inside the fork servers."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

X86 = platform.machine() in ("x86_64", "AMD64")
CLONE = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 22, 38
CAP_DAC_READ_SEARCH = 2

# Landlock: access rights of each ABI version, from the kernel's header.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
READ = READ_FILE | READ_DIR
CHANGES = 0x7FFF & ~(EXECUTE | READ)  # everything that changes a file or directory
FILES = (0, 0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF)  # ABI 0 (none), 1, 2, 3, 4, 5 and later

HUGE = 2 << 20  # bytes of a huge page
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25

_libc = ctypes.CDLL(None, use_errno=True)
_holding = ctypes.PyDLL(None, use_errno=True)  # the same, called while holding the GIL
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def check(result: int) -> int:
    """Returns the result of a C call, or raises OSError from errno."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def fork() -> int:
    """fork(2) for a process of one thread, without what Python and its modules do around `os.fork`.

    Their locks are free at that time, and the generators are reseeded later; it would copy 120 pages per child.
    """
    return check(_holding.fork())


def use_huge_pages(maps: str) -> None:
    """Moves this process's memory into huge pages if the kernel has them: fewer page tables to copy per fork.

    Args:
        maps: the content of /proc/self/maps.
    """
    for line in maps.splitlines():
        span, mode, _, _, _, *name = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in span.split("-"))
        first, last = -(-first // HUGE) * HUGE, last // HUGE * HUGE
        if mode == "rw-p" and name in ([], ["[heap]"]) and first < last:
            for advice in (MADV_HUGEPAGE, MADV_COLLAPSE):  # a refusal is harmless
                _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def unshare(*names: str) -> None:
    """Enters new namespaces of the named kinds (keys of CLONE)."""
    check(_libc.unshare(sum(CLONE[name] for name in names)))


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    check(_libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()))


def bind(source: str, target: str, *, read_only: bool = True) -> None:
    """Binds `source`, including mounts below it, to `target`."""
    mount(source, target, flags=MS_BIND | MS_REC)
    if (
        read_only
    ):  # struct mount_attr {attr_set, attr_clr, propagation, userns_fd}: read-only and nosuid, mounts below too
        attributes = struct.pack("QQQQ", 1 | 2, 0, 0, 0)
        check(_syscall(442, -100, target.encode(), 0x8000, attributes, len(attributes)))


def pivot(root: str) -> None:
    """Makes the mount `root` the root of this mount namespace and detaches the old one."""
    os.chdir(root)
    check(_syscall(155 if X86 else 41, b".", b"."))
    check(_libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def set_hostname(name: str) -> None:
    """sethostname(2)."""
    check(_libc.sethostname(name.encode(), len(name)))


def prctl(option: int, argument: int = 0) -> None:
    """prctl(2) with one argument."""
    check(_libc.prctl(option, ctypes.c_ulong(argument), *(ctypes.c_ulong(0),) * 3))


def set_capabilities(*kept: int) -> None:
    """Drops every capability except the kept numbers (all below 32)."""
    mask = sum(1 << number for number in kept)
    check(_libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", mask, mask, 0, 0, 0, 0)))


def close_from(first: int) -> None:
    """Closes every descriptor from `first` on."""
    if _syscall(436, first, 0x7FFFFFFF, 0) < 0:  # a kernel before 5.9
        os.closerange(first, 65536)


def landlock_abi() -> int:
    """Landlock ABI version of this kernel; 0 if it has none."""
    return max(_syscall(444, None, ctypes.c_size_t(0), 1), 0)


def landlock_ruleset(abi: int, rules: list[tuple[int, int]], *, handled: int = FILES[-1], network: bool = True) -> int:
    """Creates a ruleset that denies all but the rules: other files, TCP ports, abstract sockets, signals to outside.

    Args:
        abi: of `landlock_abi`.
        rules: (descriptor of a file or directory, allowed access) pairs.
        handled: kinds of access that are denied where no rule allows them.
        network: deny TCP ports.

    Returns:
        The ruleset's descriptor, for `landlock_enter`.
    """
    handled &= FILES[min(abi, len(FILES) - 1)]
    attributes = struct.pack("QQQ", handled, 3 if network and abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = check(_syscall(444, attributes, ctypes.c_size_t(size), 0))
    for descriptor, access in rules:
        check(_syscall(445, ruleset, 1, struct.pack("=Qi", access & handled, descriptor), 0))
    return ruleset


def landlock_enter(ruleset: int) -> None:
    """Applies a ruleset to this thread for good; needs no_new_privs."""
    check(_syscall(446, ruleset, 0))


def seccomp_enter(program: bytes) -> None:
    """Applies a filter (struct sock_filter instructions) to this thread for good; needs no_new_privs."""
    code = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    check(_libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), head, ctypes.c_ulong(0), ctypes.c_ulong(0)))
