"""An endless, random-access stream of tasks: a map from position to task, so the state of a loader is one integer."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from open_agentrl_jax.types import UserError

T = TypeVar("T", covariant=True)
U = TypeVar("U")
WEIGHTED = re.compile(r"(?P<path>.+?)(?::(?P<weight>\d+(?:\.\d+)?))?")


class Source(Protocol[T]):
    """Anything with a length and random access: a list, a TaskTable, a tfds.data_source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> T: ...

    def __iter__(self) -> Iterator[T]: ...


class Stream(Protocol[T]):
    """`stream[position]` for any position >= 0; the same position always gives the same element."""

    def __getitem__(self, position: int, /) -> T: ...


@dataclasses.dataclass(frozen=True)
class Subset(Generic[T]):
    """A view of some elements of a source."""

    source: Source[T]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> T:
        return self.source[self.indices[index]]

    def __iter__(self) -> Iterator[T]:
        return (self.source[i] for i in self.indices)


@dataclasses.dataclass(frozen=True)
class Mixture(Generic[T]):
    """Concatenated sources with the weights that `task_stream` mixes them by."""

    sources: Sequence[Source[T]]
    weights: Sequence[float]

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def __iter__(self) -> Iterator[T]:
        return itertools.chain.from_iterable(self.sources)


def read_mixture(field: str, text: str, read: Callable[[str], Source[U]]) -> Mixture[U]:
    """Reads the sources in a config field: `a.parquet`, or several with weights, `a.parquet:3,b.jsonl:1`.

    Args:
        field: the field's name, for errors.
        text: comma-separated paths; without weights all elements are equally frequent.
        read: reads the elements of a path.

    Raises:
        UserError: only some sources have a weight, or a weight is 0; also the errors of `read`.
    """
    found = [WEIGHTED.fullmatch(part.strip()) for part in text.split(",")]
    parts = [(match["path"], match["weight"]) for match in found if match]
    given = [float(weight) for _, weight in parts if weight]
    if len(parts) < len(found) or (given and len(given) < len(parts)) or 0 in given:
        raise UserError(f"{field}={text}: give each source a positive weight or none, as in a.parquet:3,b.jsonl:1")
    sources = [read(path) for path, _ in parts]
    return Mixture(sources, given or [float(len(source)) for source in sources])


def task_stream(
    tasks: Source[T] | Sequence[Source[T]],
    seed: int,
    *,
    weights: Sequence[float] | None = None,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Stream[T]:
    """Returns an endless stream of one source, or of several mixed by weight.

    Each epoch of a source contains every element once, in an order that depends on (seed, epoch). A mixture takes
    elements from its sources in fixed proportion, and each source has its own epochs. Process i of m sees positions i,
    i + m, i + 2m, ... of the global stream. There is no iterator to save: continue at the position where you stopped.

    Args:
        tasks: a source, or with `weights` a sequence of sources.
        seed: determines the order, together with the epoch.
        weights: one positive number per source.
        shuffle: False keeps the order of the source.
        process_index: this process.
        process_count: number of processes.

    Raises:
        UserError: a source is empty, or the weights do not match the sources.
    """
    import grain  # slow to import, and graders and evaluation do not need it

    sources: Sequence[Source[T]] = [tasks] if weights is None else tasks  # type: ignore[assignment]
    for i, source in enumerate(sources):
        if not len(source):
            raise UserError(f"data source {i} is empty; give a file with at least one task")
    if weights is not None and (len(weights) != len(sources) or min(weights, default=0) <= 0):
        raise UserError(f"data weights {list(weights)} must be {len(sources)} positive numbers, one per source")
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index {process_index} must lie in [0, process_count {process_count})")

    endless = []
    for i, source in enumerate(sources):
        dataset = grain.MapDataset.source(source)  # type: ignore[arg-type]
        if shuffle:
            dataset = dataset.seed(seed + 7919 * i).shuffle()
        endless.append(dataset.repeat())
    mixed = endless[0] if weights is None else grain.MapDataset.mix(endless, weights=list(weights))
    shard = mixed[process_index::process_count] if process_count > 1 else mixed
    return shard  # type: ignore[return-value]  (typed T | None, because a grain dataset may be filtered)
