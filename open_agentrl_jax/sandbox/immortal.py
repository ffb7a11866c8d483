"""Makes what a fork server holds immortal, so that its children write no reference counts: each such page is a copy.

CPython from 3.12 on leaves the count of an immortal object alone (PEP 683): the lower 32 bits of the count, read as a
signed number, are negative. Nothing but the count is changed here, and only ever to the one that `None` has. Two things
follow for a child: the objects never go away, and `sys.getrefcount` tells that number. Whoever has done this ends by
`os._exit`: the interpreter's own end counts on counts. Standard library only: this runs inside the fork servers.
"""

from __future__ import annotations

import ctypes
import gc
import struct
import sys
import sysconfig
import types


def marker() -> int | None:
    """The lower half of an immortal object's count; None: this interpreter has none, or lays objects out otherwise."""
    usual = (
        sys.implementation.name == "cpython"
        and sys.version_info >= (3, 12)
        and (sys.byteorder, struct.calcsize("P")) == ("little", 8)
        and not sysconfig.get_config_var("Py_GIL_DISABLED")  # the count is split between threads there
        and not hasattr(sys, "getobjects")  # Py_TRACE_REFS: two pointers lie before the count
    )
    count = _count(None).value if usual else 0
    return count if count < 0 else None


def make_immortal() -> int:
    """Makes every object immortal that the garbage collector knows, and all that they refer to.

    Returns:
        How many objects are new among the immortal.
    """
    if (count := marker()) is None:
        return 0
    total, found = 0, gc.get_objects()
    while found:
        fresh = []
        for thing in found:
            cell = _count(thing)
            if cell.value >= 0:
                cell.value = count
                fresh.append(thing)
        total += len(fresh)
        found = gc.get_referents(*fresh)
        for thing in fresh:
            if isinstance(thing, types.CodeType):  # which the collector does not look into
                found += (thing.co_consts, thing.co_names, thing.co_name, thing.co_qualname, thing.co_filename)
                found += (thing.co_linetable, thing.co_exceptiontable)
    return total


def _count(thing: object) -> ctypes.c_int32:
    return ctypes.c_int32.from_address(id(thing))
