"""What travels between devices: the collectives of a compiled program, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(?:-start)?\((.*)$")
# TPU programs of several slices pass what leaves a slice to a runtime on the host.
_BETWEEN = re.compile(
    r' = \((.*?\]).* send\(.*_xla_host_transfer_rendezvous="([^"]*)".*_xla_megascale_transfer_type="([A-Z_]+)"'
)
BETWEEN = ("slices",)  # the `axes` of what travels between slices, over the data center network
_CALLED = re.compile(r"(calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    `bytes` are those of the whole arrays: what an all-gather gives, what a reduce-scatter takes, what is all-reduced;
    compilers put several arrays into one operation, and `largest` is that of the largest among them.
    """

    kind: str
    axes: tuple[str, ...]  # of the mesh; BETWEEN; ("?",) where the groups are not understood
    bytes: int
    largest: int
    times: int  # runs a step: loops are counted as often as they run, one of unknown length once
    ways: int  # devices in a group
    source: str  # the operation's name in the program that was traced

    @property
    def sent(self) -> float:
        """Bytes that each device sends over the whole step, in rings."""
        once = {"all-reduce": 2 * (self.ways - 1) / self.ways, "collective-permute": 1.0}
        return self.bytes * self.times * once.get(self.kind, (self.ways - 1) / max(self.ways, 1))


def collectives(text: str, mesh: Mapping[str, int], *, slices: int = 1) -> list[Collective]:
    """The collectives that `compiled.as_text()` has, each with how often it runs.

    Args:
      text: the optimised program; loops with a constant bound in their condition count that often.
      mesh: sizes of the axes, in the order in which the devices are laid out.
      slices: TPU slices that the devices are in.
    """
    bodies, entry = _computations(text)
    found = []
    for name, times in _runs(bodies, entry):
        # TPU compilers write a reduce-scatter as an all-reduce and a slice inside one fusion of this name.
        scatters = name.startswith("all-reduce-scatter")
        for line in bodies[name]:
            if between := _BETWEEN.search(line):
                sent, kind = int(_bytes(between[1])), between[3].lower().replace("_", "-")
                whole = sent * slices if kind == "all-gather" else sent
                found.append(Collective(kind, BETWEEN, whole, whole, times, slices, between[2]))
                continue
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            shape, kind, rest = match.groups()
            groups = _groups(rest)
            axes, ways = _axes(groups, mesh)
            arrays = [_bytes(array) for array in shape.strip("()").split(", ")]
            if "-start(" in line and kind != "all-reduce":
                # It holds what it takes, then what it gives; of both the larger counts. A permutation has more behind.
                n = 1 if kind == "collective-permute" else len(arrays) // 2
                arrays = max(arrays[:n], arrays[n : 2 * n], key=sum)
            elif kind == "reduce-scatter":
                arrays = [size * ways for size in arrays]  # its operand is what counts
            if kind == "all-reduce" and scatters:
                kind = "reduce-scatter"
            source = re.search(r'op_name="([^"]*)"', line)
            source = source.group(1) if source else name
            found.append(Collective(kind, axes, int(sum(arrays)), int(max(arrays)), times, ways, source))
    return found


def all_reduced(found: Sequence[Collective], *, at_least: int, tokens: int) -> list[Collective]:
    """All-reduces, of arrays as large as a parameter, over axes that split parameters: gradients to be scattered.

    A float32 number for each of `tokens`, which some compilers gather in this way, is no gradient.
    """
    parts = {"fsdp", "seq", "?"}
    found = [c for c in found if c.kind == "all-reduce" and parts & set(c.axes)]
    return [c for c in found if c.largest >= at_least and c.largest != 4 * tokens]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header.group(2)
            entry = name if header.group(1) else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _runs(bodies: dict[str, list[str]], name: str, times: int = 1) -> Iterator[tuple[str, int]]:
    """Every computation that `name` reaches, itself included, and how often each is run."""
    yield name, times
    for line in bodies[name]:
        factor = _trips(bodies, line) if " while(" in line else 1
        called = [callee for kind, callee in _CALLED.findall(line) if kind != "to_apply" or " call(" in line]
        for branches in _BRANCHES.findall(line):
            called += [branch.strip(" %") for branch in branches.split(",")]
        for callee in called:
            if callee in bodies:
                yield from _runs(bodies, callee, times * factor)


def _trips(bodies: dict[str, list[str]], line: str) -> int:
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    bounds = [
        int(n)
        for part in bodies.get(condition.group(1) if condition else "", ())
        for n in re.findall(r" s32\[\]\S* constant\((\d+)\)", part)
    ]
    return max(bounds, default=1)


def _bytes(shape: str) -> float:
    def size(dtype: str) -> float:
        return _SIZES.get(dtype) or int(re.findall(r"\d+", dtype)[0]) / 8

    return sum(size(d) * math.prod(int(n) for n in dims.split(",") if n) for d, dims in _SHAPE.findall(shape))


def _groups(rest: str) -> list[list[int]]:
    """Which devices work together, from any of the ways in which it is written; [] if in none of them."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", rest):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d, ]+)\}", pairs.group(1))]
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed.group(1))]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, dims, order = ([int(n) for n in (part or "").split(",") if n] for part in iota.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(order) if order else ids).reshape(shape).tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        inside = re.findall(r"'(\w+)'", named.group(2))
        if ":(" in named.group(2) or not set(inside) <= set(sizes):
            return []  # a part of an axis
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        names = list(sizes)
        ids = ids.transpose([names.index(n) for n in names if n not in inside] + [names.index(n) for n in inside])
        return ids.reshape(-1, math.prod(sizes[n] for n in inside)).tolist()
    return []


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes along which the members of a group differ, and how many members there are."""
    if not groups or max(max(group) for group in groups) >= math.prod(mesh.values()):
        return ("?",), max((len(group) for group in groups), default=2)
    places = np.stack(
        np.unravel_index(np.array([group[:1] * len(group) + group for group in groups]), (*mesh.values(),))
    )
    members = places.shape[-1] // 2
    differs = (places[..., :members] != places[..., members:]).any(axis=(1, 2))
    return tuple(name for name, d in zip(mesh, differs, strict=True) if d), members
