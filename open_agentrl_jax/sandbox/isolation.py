"""Plans of isolation, strongest first, and the functions that apply one.

`enter` prepares a fork server once. `settle` and `lock` isolate one child, in this order: private file system, limits,
user id and capabilities, no_new_privs and dumpable, descriptors, Landlock, seccomp. Which plan holds is found by
attacking it (probes.py), never by reading versions. Standard library only: this module runs inside the fork servers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import math
import os
import random
import resource
import struct
import sys
import tempfile

from . import linux, seccomp

DISK_MB, INODES, THREADS, DESCRIPTORS = 64, 4096, 64, 128
DEVICES = {"null": True, "zero": False, "full": False, "random": False, "urandom": False}  # name: may be written
# User ids of programs, in ranges of one fork server each; all below 65,536, which containers map.
FIRST_ID, RANGES, IDS = 20_000, 80, 512
LOCK_FOLDERS = ("/run", "/var/run", "/var/lock", "/var/tmp", "/tmp")
ROOTS = (
    "/mnt",
    "/media",
    "/srv",
    "/run",
    "/opt",
    "/home",
    "/boot",
    "/var/tmp",
    "/tmp",
)  # where a new root may be built
KEPT_BELOW_TMP = "/.below-tmp"  # where the new root keeps a second mount of what lies below /tmp
INSIDE_ID = 1000  # the user id that a program sees where a user namespace hides its own


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to isolate.

    namespaces: "root": created with root's rights | "user": through user namespaces | "": none.
    landlock: Landlock is required (with namespaces it is used if available).
    private_id: each program runs under its own user id, which needs root.
    chroot: programs see an empty directory; what they import is imported before.
    newest_abi: the newest Landlock ABI to use; tests lower it to act as an older kernel.
    """

    name: str
    level: str
    namespaces: str = ""
    landlock: bool = False
    private_id: bool = False
    chroot: bool = False
    only_root: bool = False
    newest_abi: int = 99

    @property
    def disk(self) -> bool:
        """Whether a program has a directory to write to, whose size is capped."""
        return bool(self.namespaces)


PLANS = (
    Plan("namespaces of root", "A", namespaces="root", private_id=True, only_root=True),
    Plan("user namespaces", "A", namespaces="user"),
    Plan("Landlock and a private user id", "B", landlock=True, private_id=True, only_root=True),
    Plan("Landlock", "B", landlock=True),
    Plan("a private user id in an empty root", "B", private_id=True, chroot=True, only_root=True),
    Plan("nothing but limits", "C"),
)


@dataclasses.dataclass
class World:
    """What a fork server prepares for its children."""

    plan: Plan
    proc: int  # descriptor of the host's /proc
    rules: list[tuple[int, int]]  # for Landlock
    abi: int
    first_id: int  # user ids of children: first_id + slot
    ids: tuple[int, int]  # own user and group id on the host
    keeps: tuple[int, ...]  # capabilities that a child keeps
    empty: str  # path of the empty root; the fork server removes it
    program: bytes
    holes: list[int]
    limits: list[tuple[int, int]]  # (resource, value) of the limits that are the same for every run
    cores: int
    below_tmp: list[str]  # readable directories below /tmp, which a child's own /tmp would hide
    ids_lock: int  # descriptor whose lock reserves the range of user ids; -1: none
    address_space: int = 0  # bytes of a fresh child

    def in_proc(self, path: str, flags: int = os.O_RDONLY) -> int:
        """Opens a file of /proc, which programs cannot."""
        return os.open(path, flags, dir_fd=self.proc)


def libraries() -> list[str]:
    """Directories of the shared libraries that this process has loaded."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line}
    return [path for path in {os.path.dirname(path) for path in paths} if path.startswith("/")]


def readable(search: list[str]) -> list[str]:
    """What programs may read: Python's modules, shared libraries, time zones; no directory inside another."""
    wanted = sorted(
        {os.path.abspath(path) for path in [*search, *libraries(), "/usr/share/zoneinfo"] if os.path.isdir(path)}
    )
    kept: list[str] = []
    for path in wanted:
        if path != "/" and not any(path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept


def _in_proc_self(world_proc: int, name: str, text: str) -> None:
    descriptor = os.open(f"self/{name}", os.O_WRONLY, dir_fd=world_proc)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _map_ids(proc: int, uid: int, gid: int) -> None:
    _in_proc_self(proc, "setgroups", "deny")
    _in_proc_self(proc, "gid_map", f"{INSIDE_ID} {gid} 1")
    _in_proc_self(proc, "uid_map", f"{INSIDE_ID} {uid} 1")


def leave(plan: Plan) -> None:
    """Leaves the host's namespaces; the next forked child is the first process of the new pid namespace."""
    if not plan.namespaces:
        return
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    uid, gid = os.geteuid(), os.getegid()
    linux.unshare(*(["user"] if plan.namespaces == "user" else []), "mount", "pid", "net", "ipc", "uts", "cgroup")
    if plan.namespaces == "user":
        _map_ids(proc, uid, gid)
    os.close(proc)


def _new_root(read: list[str]) -> None:
    """Builds a read-only root from the readable directories and a few devices, and moves into it."""
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    free = [p for p in ROOTS if os.path.isdir(p) and not any(path.startswith(p + "/") for path in read)]
    if not free:
        raise OSError(f"no place for a new root: Python's directories lie in all of {', '.join(ROOTS)}")
    root = free[0]
    quiet = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("tmpfs", root, "tmpfs", quiet | linux.MS_NOEXEC, "size=256k,nr_inodes=1024,mode=755")
    for link in ("/lib", "/lib64", "/usr/lib64"):
        if os.path.islink(link):
            os.makedirs(root + os.path.dirname(link), 0o755, exist_ok=True)
            os.symlink(os.readlink(link), root + link)
    for path in read:
        os.makedirs(root + path, 0o755, exist_ok=True)
        linux.bind(path, root + path)
    for number, path in enumerate(_below_tmp(read)):
        os.makedirs(kept := f"{root}{KEPT_BELOW_TMP}/{number}", 0o755)
        linux.bind(path, kept)
    os.makedirs(root + "/dev")
    for name, written in DEVICES.items():
        if os.path.exists(f"/dev/{name}"):
            os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o600))
            linux.bind(f"/dev/{name}", f"{root}/dev/{name}", read_only=not written)
    os.makedirs(root + "/etc")
    if os.path.exists("/etc/ld.so.cache"):
        os.close(os.open(root + "/etc/ld.so.cache", os.O_CREAT | os.O_WRONLY, 0o644))
        linux.bind("/etc/ld.so.cache", root + "/etc/ld.so.cache")
    os.makedirs(root + "/tmp", 0o755, exist_ok=True)  # it exists where Python lies below /tmp
    linux.mount("none", root, flags=linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | quiet | linux.MS_NOEXEC)
    linux.pivot(root)


def _below_tmp(read: list[str]) -> list[str]:
    return [path for path in read if path.startswith("/tmp/")]


def reserve_ids() -> tuple[int, int]:
    """Reserves a range of user ids among all fork servers of this machine, so that no two share a thread limit.

    Returns:
        (first id, descriptor that holds the lock until the process ends).

    Raises:
        OSError: every range is taken, or no folder for the lock file can be written.
    """
    for folder in LOCK_FOLDERS:
        with contextlib.suppress(OSError):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(f"{folder}/open_agentrl_jax-sandbox-ids", flags, 0o600)
            break
    else:
        raise OSError(f"no lock file for user ids can be made in any of {', '.join(LOCK_FOLDERS)}")
    start = random.SystemRandom().randrange(RANGES)  # containers that share a kernel may not share the lock
    for place in range(RANGES):
        number = (start + place) % RANGES
        with contextlib.suppress(BlockingIOError, PermissionError):
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))
            return FIRST_ID + IDS * number, file
    os.close(file)
    raise OSError(f"all {RANGES} ranges of user ids are taken by other sandboxes on this machine")


def enter(plan: Plan, search: list[str]) -> World:
    """Prepares the fork server, after all modules are imported.

    Args:
        plan: the plan; with namespaces, call `leave` and fork before.
        search: directories that Python imports from.

    Raises:
        OSError: the machine does not offer what the plan needs.
    """
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    uid, gid = os.geteuid(), os.getegid()
    abi = min(linux.landlock_abi(), plan.newest_abi)
    if plan.landlock and not abi:
        raise OSError("this kernel has no Landlock")
    if plan.only_root and uid != 0:
        raise OSError("this is not root")
    first, lock_file = reserve_ids() if plan.private_id else (FIRST_ID, -1)
    read = readable(search)
    keeps = ()
    if plan.landlock and plan.private_id and not all(_others_may_read(path) for path in read):
        keeps = (linux.CAP_DAC_READ_SEARCH,)  # Landlock, not the mode of /root, decides what may be read
    if plan.namespaces:
        _new_root(read)
        linux.set_hostname("sandbox")
    rules = []
    if abi and not plan.chroot and plan.level != "C":
        allowed = [(path, linux.READ) for path in read] + [
            (f"/dev/{name}", linux.READ_FILE | (linux.WRITE_FILE if written else 0))
            for name, written in DEVICES.items()
        ]
        rules = [(os.open(path, os.O_PATH), access) for path, access in allowed if os.path.exists(path)]
    empty = ""
    if plan.chroot:
        empty = tempfile.mkdtemp(prefix="empty-root-")
        os.chmod(empty, 0o555)
    program, holes = seccomp.assemble(disk=plan.disk, truncates=plan.disk or plan.chroot or abi >= 3)
    limits, cores = _fixed_limits(), os.cpu_count() or 1  # computed once: each page that a child touches costs time
    below = _below_tmp(read) if plan.disk else []
    return World(
        plan, proc, rules, abi, first, (uid, gid), keeps, empty, program, holes, limits, cores, below, lock_file
    )  # fmt: skip


def _others_may_read(path: str) -> bool:
    while os.stat(path).st_mode & 0o005 == 0o005:
        if path == "/":
            return True
        path = os.path.dirname(path)
    return False


def tasks(world: World) -> int:
    """Counts the threads that the user of this process has on this machine."""
    count = 0
    for name in os.listdir(world.proc):
        if name.isdigit():
            with contextlib.suppress(OSError):  # a process may end meanwhile
                status = os.stat(f"{name}/task", dir_fd=world.proc)
                count += status.st_nlink - 2 if status.st_uid == world.ids[0] else 0
    return count


def _threads(world: World) -> int:
    """RLIMIT_NPROC of a child: THREADS where its user id or user namespace is its own; 0: none."""
    plan = world.plan
    if plan.private_id or plan.namespaces:
        return THREADS
    return tasks(world) + THREADS if plan.level != "C" else 0  # the kernel counts by user, so count as late as possible


def settle(world: World, slot: int) -> None:
    """Gives a fresh child its file system, before it receives its program."""
    plan = world.plan
    with contextlib.suppress(OSError):  # short of memory, the kernel kills the program, not the trainer
        _in_proc_self(world.proc, "oom_score_adj", "1000")
    os.setsid()  # a process group of its own, and a fair share of CPU where the kernel groups sessions (autogroup)
    slot %= IDS
    owner = ""
    if plan.namespaces == "root":
        linux.unshare("mount")
        owner = f",uid={world.first_id + slot},gid={world.first_id + slot}"
    elif plan.namespaces == "user":
        linux.unshare("user", "mount")
        _map_ids(world.proc, INSIDE_ID, INSIDE_ID)
    if plan.namespaces:
        flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
        linux.mount("tmpfs", "/tmp", "tmpfs", flags, f"size={DISK_MB}m,nr_inodes={INODES},mode=700{owner}")
        for number, path in enumerate(world.below_tmp):
            os.makedirs(path, 0o755)
            linux.mount(f"{KEPT_BELOW_TMP}/{number}", path, flags=linux.MS_BIND | linux.MS_REC)


def lock(world: World, slot: int, *, memory_mb: int, timeout: float) -> None:
    """Isolates the child for good; only descriptors 0 to 3 stay open.

    Args:
        world: what the fork server prepared.
        slot: the child's number among those alive.
        memory_mb: MiB of address space beyond what a child starts with.
        timeout: seconds; the fork server kills at that time, and a limit of CPU time stands behind it.
    """
    plan = world.plan
    _limit(world, world.address_space + memory_mb * 2**20, timeout, _threads(world))
    if plan.chroot:
        os.chroot(world.empty)
    if plan.private_id:
        own = world.first_id + slot % IDS
        linux.prctl(linux.PR_SET_KEEPCAPS, int(bool(world.keeps)))
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    if plan.level != "C":
        linux.set_capabilities(*world.keeps)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
    linux.prctl(linux.PR_SET_PDEATHSIG, 9)
    os.chdir("/tmp" if plan.disk else "/")
    ruleset = -1
    if world.rules:
        rules = world.rules
        if plan.disk:
            everything = linux.FILES[-1] & ~(linux.EXECUTE | linux.MAKE_CHAR | linux.MAKE_BLOCK | linux.MAKE_SOCK)
            rules = [*rules, (os.open("/tmp", os.O_PATH), everything)]
        ruleset = linux.landlock_ruleset(world.abi, rules)
    if ruleset >= 0:
        os.dup2(ruleset, 4)
    linux.close_from(5 if ruleset >= 0 else 4)
    if ruleset >= 0:
        linux.landlock_enter(4)
        os.close(4)
    if plan.level != "C":
        linux.seccomp_enter(seccomp.for_process(world.program, world.holes, os.getpid()))


def _fixed_limits() -> list[tuple[int, int]]:
    """(resource, value) of the limits that are the same for every run, none above this process's own."""
    limits = {
        "FSIZE": DISK_MB * 2**20,
        "NOFILE": DESCRIPTORS,
        "STACK": 8 * 2**20,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "SIGPENDING": 256,
        "NICE": 0,
        "RTPRIO": 0,
    }
    kinds = {
        getattr(resource, f"RLIMIT_{name}"): v for name, v in limits.items() if hasattr(resource, f"RLIMIT_{name}")
    }
    return [(kind, _at_most(kind, value)) for kind, value in kinds.items()]


def _at_most(kind: int, value: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _limit(world: World, memory: int, timeout: float, threads: int) -> None:
    limits = [
        (resource.RLIMIT_AS, _at_most(resource.RLIMIT_AS, memory)),
        (resource.RLIMIT_CPU, _at_most(resource.RLIMIT_CPU, math.ceil(max(timeout, 0) + 1) * world.cores)),
        *world.limits,
    ]
    if threads:
        limits.append((resource.RLIMIT_NPROC, _at_most(resource.RLIMIT_NPROC, threads)))
    for kind, value in limits:
        resource.setrlimit(kind, (value, value))


def isolates() -> bool:
    """Whether this system can run the embedded executor."""
    return sys.platform == "linux"
