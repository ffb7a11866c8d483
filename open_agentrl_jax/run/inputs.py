"""What a run reads, as its config names it: problems to train on, held-out problems, SFT conversations."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.config import Config, row_config
from open_agentrl_jax.data.benchmarks import read_problems
from open_agentrl_jax.data.conversations import Conversation, read_conversations, write_conversations
from open_agentrl_jax.data.generated import GENERATED
from open_agentrl_jax.data.loader import Mixture, Source, Subset, read_mixture
from open_agentrl_jax.data.rows import MAX_BAD, refuse_many_bad
from open_agentrl_jax.reference.behaviour import BEHAVIOURS
from open_agentrl_jax.run.world import reader_of
from open_agentrl_jax.sandbox.client import Sandbox
from open_agentrl_jax.train.packing import Example
from open_agentrl_jax.train.sft import example
from open_agentrl_jax.types import Task, UserError

log = logging.getLogger(__name__)


def problems(config: Config, path: str, chat: Chat, *, evaluation: bool) -> tuple[Subset[Task], list[str]]:
    """The problems of a file, or generated ones, that fit the prompt budget; and what was left out, in words."""
    tasks: Source[Task]
    if made := GENERATED.get(path):
        count = made.EVAL_PROBLEMS if evaluation else made.TRAIN_PROBLEMS
        # Held-out problems are the same for every seed, so that runs compare.
        tasks, notes = made.problems(0 if evaluation else config.seed, count, evaluation=evaluation), []
    else:
        # The prompts speak of a Python tool, and of no other: what else may be called its schema tells.
        python = any(schema["function"]["name"] == PythonTool.name for schema in chat.tools)
        how: dict[str, Any] = {"format": reader_of(config), "tools": python, "check": not config.reward.grader}
        if config.data.data_dir:
            from open_agentrl_jax.data.builders import prepare_tasks  # imported late: TFDS takes a second

            table = prepare_tasks(path, config.data.data_dir, evaluation=evaluation, **how)
        else:
            table = read_problems(path, **how)
        tasks, notes = table, []
        if table.skipped:
            notes.append(f"{path}: skipped {len(table.skipped)} rows, e.g. {table.skipped[0]}")
    chosen = list(range(len(tasks)))
    if len(distinct := _distinct(tasks)) < len(chosen):
        # Some public sets repeat each row. In evaluation, copies counted as problems make intervals too narrow.
        once = "evaluated eval.samples times" if evaluation else "played once per epoch"
        notes.append(f"{path}: {len(chosen)} rows hold {len(distinct)} problems; each is {once}")
        chosen = distinct
    chosen = chosen[: (evaluation and config.data.eval_limit) or None]
    count = len(chosen)
    fitting = [i for i in chosen if len(chat.prompt(tasks[i].messages)) <= config.agent.max_prompt]
    if len(fitting) < count:
        notes.append(
            f"{path}: dropped {count - len(fitting)} of {count} problems, longer with the tool's schema than "
            f"agent.max_prompt={config.agent.max_prompt}"
        )
    if not fitting:
        raise UserError(f"{path}: no problem fits agent.max_prompt={config.agent.max_prompt} tokens; raise it")
    return Subset(tasks, fitting), notes


def _distinct(tasks: Source[Task]) -> list[int]:
    """The first index of each pair of problem and answer."""
    first: dict[bytes, int] = {}
    for i, task in enumerate(tasks):
        first.setdefault(hashlib.sha256(repr((task.messages, task.answer)).encode()).digest(), i)
    return list(first.values())


@dataclasses.dataclass(frozen=True)
class Row:
    """Problems of one source of several. Their `extra` holds the source's place and name."""

    source: Source[Task]
    place: int
    name: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Task:
        task = self.source[index]
        return dataclasses.replace(task, extra={**task.extra, "row": self.place, "row_name": self.name})

    def __iter__(self) -> Iterator[Task]:
        return (self[i] for i in range(len(self)))


def training_problems(config: Config, chat: Chat, schemas: Sequence[Any] = ()) -> tuple[Mixture[Task], list[str]]:
    """The training problems, source by source; and what was left out, in words.

    Args:
        config: names the sources.
        chat: of the run.
        schemas: of the tools of each row of `data.sources`, for the length of prompts; empty: those of `chat`.
    """
    notes: list[str] = []
    rows = config.data.sources

    def read(path: str) -> Subset[Task]:
        place = next(places)
        own = row_config(config, rows[place]) if rows else config
        found, more = problems(own, path, chat.showing(schemas[place]) if schemas else chat, evaluation=False)
        notes.extend(more)
        return found

    places = itertools.count()
    mixture = read_mixture("data.sources" if rows else "data.train", config.data.problems, read)
    if rows:
        labelled = [Row(source, i, rows[i].label) for i, source in enumerate(mixture.sources)]
        mixture = Mixture[Task](labelled, mixture.weights)
    return mixture, notes


def refuse_overlap(train: Iterable[Task], held_out: Iterable[Task]) -> None:
    """Evaluation problems must not be trained on.

    Raises:
        UserError: a problem is in both.
    """

    def text(task: Task) -> str:
        return " ".join(str(task.extra.get("problem") or task.messages[-1].content).split())

    seen = {text(task): task.id for task in train}
    for task in held_out:
        if (twin := seen.get(text(task))) is not None:
            raise UserError(f"data.eval: problem {task.id} is also in data.train (as {twin}); use disjoint files")


def demonstrations(
    config: Config, directory: Path, sandbox: Sandbox, run: Callable[[Any], Any]
) -> Mixture[Conversation]:
    """The SFT conversations of `data.sft`, source by source; generated ones are written once to the run directory."""

    def read(path: str) -> Source[Conversation]:
        if path in GENERATED:
            return read_conversations(generated_demonstrations(config, path, directory, sandbox, run))
        if config.data.data_dir:
            from open_agentrl_jax.data.builders import prepare_conversations  # imported late, as above

            return prepare_conversations(path, config.data.data_dir)
        return read_conversations(path)

    return read_mixture("data.sft", config.data.sft, read)


def generated_demonstrations(
    config: Config, name: str, directory: Path, sandbox: Sandbox, run: Callable[[Any], Any]
) -> Path:
    """The file of the demonstrations of a generated data set, written if it is missing."""
    path = directory / "sft.parquet"
    if not path.exists():
        tool = PythonTool(sandbox)

        async def output(call: Any) -> str:
            result = await tool(call)
            if result.status == "infrastructure":
                raise UserError(f"the sandbox failed while demonstrations were made: {result.text}")
            return result.text

        made = run(GENERATED[name].demonstrations(config.seed, GENERATED[name].DEMONSTRATIONS, output))
        conversations = [
            Conversation(f"{name}/{i}", messages, [PythonTool.schema], name) for i, messages in enumerate(made)
        ]
        temporary = path.with_name("sft.writing.parquet")
        write_conversations(temporary, conversations)
        os.replace(temporary, path)
    return path


def sft_examples(config: Config, chat: Chat, conversations: Iterable[Conversation]) -> list[Example]:
    """Conversations as masked token sequences, each with the tools of its own row where it has some.

    Raises:
        UserError: no conversation is usable, or the template cannot render more than 1 % of them.
    """
    sft_mask = BEHAVIOURS[config.behaviour].sft_mask
    made: list[Example] = []
    bad: list[str] = []
    total = unseen = 0
    shows_reasoning = chat.shows_reasoning()
    for conversation in conversations:
        total += 1
        unseen += not shows_reasoning and any(message.reasoning for message in conversation.messages)
        try:
            ids, mask = chat.conversation(conversation.messages, conversation.tools or None)
        except ValueError as error:
            bad.append(f"conversation {conversation.id}: {error}")
            continue
        one = example(ids, sft_mask(mask), max_length=config.sft.max_length)
        if one.mask.any():
            made.append(one)
    refuse_many_bad("data.sft", bad, total, "see the tokenizer's chat template")
    copies = len(made) - len({one.tokens.tobytes() for one in made})
    if copies > MAX_BAD * len(made):
        log.warning("data.sft: %d of %d conversations are copies of others", copies, len(made))
    if unseen:
        log.warning("data.sft: the chat template leaves out the reasoning_content of %d conversations", unseen)
    if not made:
        raise UserError("data.sft: no conversation has an assistant token within sft.max_length; raise it")
    return made
