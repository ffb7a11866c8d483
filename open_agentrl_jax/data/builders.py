"""TFDS builders: checked once, written to array_record, read by position without TensorFlow.

A builder is named by what it holds (SFT trajectories, RL problems, evaluation problems), its config by the file it was
made from, that file's content and how it is read, templates included; so what changed is prepared anew, and nothing
is prepared twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import tensorflow_datasets as tfds

from open_agentrl_jax.data.benchmarks import place_of, read_problems
from open_agentrl_jax.data.conversations import Conversation, from_chat, read_conversations
from open_agentrl_jax.data.prompts import TEMPLATES, TOOL_HINT
from open_agentrl_jax.data.rows import Table, fingerprint
from open_agentrl_jax.types import Message, Task, UserError

T = TypeVar("T")
VERSION = "1.1.0"
RELEASE_NOTES = {"1.1.0": "Messages keep their reasoning, and arguments their nulls."}


@dataclasses.dataclass(kw_only=True)
class Config(tfds.core.BuilderConfig):
    """A builder's config: the path read, and how."""

    path: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES = RELEASE_NOTES
    BUILDER_CONFIGS = ()
    url_infos = {}  # nothing is downloaded by TFDS  # noqa: RUF012
    COLUMNS: tuple[str, ...] = ()
    read: Callable[..., Table[Any]]
    encode: Callable[[Any], dict[str, str]]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in self.COLUMNS})
        return self.dataset_info_from_configs(features=features, description=self.__doc__, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        config = self.builder_config
        assert isinstance(config, Config)
        table = type(self).read(config.path, **config.options)
        Path(self.data_path, "skipped.txt").write_text("".join(f"{line}\n" for line in table.skipped))
        for i, item in enumerate(table):
            yield i, type(self).encode(item)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _encode_task(task: Task) -> dict[str, str]:
    nested = {"messages": [m.to_chat() for m in task.messages], "answer": task.answer, "extra": task.extra}
    return {"id": task.id, "source": task.source, **{name: _json(value) for name, value in nested.items()}}


def _decode_task(row: dict[str, str]) -> Task:
    messages = [from_chat(m) for m in json.loads(row["messages"])]
    return Task(row["id"], messages, json.loads(row["answer"]), row["source"], json.loads(row["extra"]))


def _encode_conversation(c: Conversation) -> dict[str, str]:
    messages = _json([m.to_chat() for m in c.messages])
    return {"id": c.id, "source": c.source, "messages": messages, "tools": _json(c.tools)}


def _decode_conversation(row: dict[str, str]) -> Conversation:
    messages: list[Message] = [from_chat(m) for m in json.loads(row["messages"])]
    return Conversation(row["id"], messages, json.loads(row["tools"]), row["source"])


class SftTrajectories(_Builder, skip_registration=True):
    """Conversations with tool calls and tool results, to learn from."""

    COLUMNS = ("id", "source", "messages", "tools")
    read, encode = staticmethod(read_conversations), staticmethod(_encode_conversation)


class RlProblems(_Builder, skip_registration=True):
    """Problems with the answers that grade them, to train on."""

    COLUMNS = ("id", "source", "messages", "answer", "extra")
    read, encode = staticmethod(read_problems), staticmethod(_encode_task)


class EvalProblems(RlProblems, skip_registration=True):
    """Problems with the answers that grade them, never to be trained on."""


@dataclasses.dataclass
class Prepared(Generic[T]):
    """A prepared data set: random access to its elements, for data.loader."""

    records: Any  # a tfds.data_source
    decode: Callable[[dict[str, str]], T]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> T:
        return self.decode({k: v.decode() if isinstance(v, bytes) else str(v) for k, v in self.records[index].items()})

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))


def prepare_tasks(
    path: str | os.PathLike[str], data_dir: str | os.PathLike[str], *, evaluation: bool = False, **options: Any
) -> Prepared[Task]:
    """The problems of `path`, prepared under `data_dir` if they are not there yet.

    Args:
        path: what data.benchmarks.read_problems takes; `options` are its keywords.
        data_dir: where prepared data sets lie.
        evaluation: these are for evaluation: kept apart from those that are trained on.

    Raises:
        UserError: as read_problems.
    """
    # a reader of the user's own is known by its text
    known = {name: inspect.getsource(value) if callable(value) else value for name, value in options.items()}
    made_by = _json([known, repr(TEMPLATES), TOOL_HINT])
    builder = EvalProblems if evaluation else RlProblems
    return _prepare(builder, _decode_task, path, place_of(str(path)), data_dir, options, made_by)


def prepare_conversations(path: str | os.PathLike[str], data_dir: str | os.PathLike[str]) -> Prepared[Conversation]:
    """The SFT trajectories of `path`, prepared under `data_dir` if need be. Raises as read_conversations."""
    return _prepare(SftTrajectories, _decode_conversation, path, path, data_dir, {}, "")


def _prepare(
    builder_class: type[_Builder],
    decode: Callable[[dict[str, str]], T],
    path: str | os.PathLike[str],
    place: str | os.PathLike[str],
    data_dir: str | os.PathLike[str],
    options: dict[str, Any],
    made_by: str,
) -> Prepared[T]:
    digest = hashlib.sha256((made_by + fingerprint(place)).encode())
    stem = re.sub(r"\W+", "_", Path(place).stem).strip("_").lower() or "data"
    config = Config(name=f"{stem}_{digest.hexdigest()[:12]}", path=str(path), options=options)
    with _quiet():
        builder = builder_class(data_dir=str(data_dir), config=config, file_format="array_record")
        try:
            builder.download_and_prepare(file_format="array_record")
        except OSError as e:
            builder = builder_class(data_dir=str(data_dir), config=config, file_format="array_record")
            if not builder.is_prepared():  # else another process was there first
                raise UserError(f"data_dir {data_dir} cannot be written ({e}); choose another") from e
        records = builder.as_data_source(split="train")  # type: ignore[call-arg]  (hidden by its decorator)
    skipped = Path(builder.data_path, "skipped.txt")
    lines = skipped.read_text().splitlines() if skipped.exists() else []
    return Prepared(records, decode, lines)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and notices of TFDS, which would land in the middle of a run's own."""
    logger, level = logging.getLogger("absl"), logging.getLogger("absl").level
    tfds.disable_progress_bar()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tfds.enable_progress_bar()
