"""Makes a fork server's objects immortal, so that children write no reference counts, which would copy pages.

CPython from 3.12 on leaves the count of an immortal object alone (PEP 683): the lower 32 bits of the count, read as a
signed number, are negative. This module changes only the count, and only to that of `None`. For a child,
such objects are never freed, and `sys.getrefcount` returns that number. The process must end by `os._exit`, because the
interpreter's shutdown relies on reference counts. Standard library only: this module runs inside the fork servers.
"""

from __future__ import annotations

import ctypes
import gc
import struct
import sys
import sysconfig
import types


def marker() -> int | None:
    """Lower half of an immortal object's count; None if this interpreter has none or another object layout."""
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
    """Makes every object that the garbage collector tracks immortal, and all that they refer to.

    Returns:
        Number of objects that became immortal.
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
            if isinstance(thing, types.CodeType):  # which the collector does not traverse
                found += (thing.co_consts, thing.co_names, thing.co_name, thing.co_qualname, thing.co_filename)
                found += (thing.co_linetable, thing.co_exceptiontable)
    return total


def _count(thing: object) -> ctypes.c_int32:
    return ctypes.c_int32.from_address(id(thing))
