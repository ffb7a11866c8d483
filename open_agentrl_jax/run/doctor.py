"""Checks of everything that can be known about a run within a minute, without training or creating the run directory.

Every check returns one line about what it found, or raises a UserError that names the field and the cure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from open_agentrl_jax.agent import templates
from open_agentrl_jax.config import Config
from open_agentrl_jax.models import gguf, hf, peft
from open_agentrl_jax.models.attention import row_parts, why_slow
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel import mesh as meshes
from open_agentrl_jax.planning import memory, workload
from open_agentrl_jax.planning.ahead import longest_sequence
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.engines import check_generation
from open_agentrl_jax.run.policy import compute_dtype, load_tokenizer, make_chat, mesh_of
from open_agentrl_jax.run.world import open_world, spec_of
from open_agentrl_jax.sandbox.client import open_sandbox
from open_agentrl_jax.train.packing import choose_packing
from open_agentrl_jax.types import Message, UserError

MANY_USEFUL = 0.8  # a fraction of useful tokens that needs no advice


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the table; `text` of a failed check contains its cure."""

    check: str
    ok: bool
    text: str


def examine(config: Config) -> Iterator[Finding]:
    """Runs all checks; an error in one does not stop the others."""
    for name, check in CHECKS.items():
        try:
            yield Finding(name, True, check(config))
        except UserError as error:
            yield Finding(name, False, str(error))
        except Exception as error:  # a broken installation raises anything; report it as this check's result
            yield Finding(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def devices(config: Config) -> str:
    """Devices found and expected."""
    return meshes.count_devices().removeprefix("devices: ")


def mesh(config: Config) -> str:
    """Mesh and packing, and the fraction of useful tokens."""
    laid_out = mesh_of(config)
    packing = choose_packing(config, longest_sequence(config), laid_out)
    sizes = "one device" if laid_out is None else " ".join(f"{k}={v}" for k, v in laid_out.shape.items())
    useful, cure = packed(config)
    text = f"{sizes}; {packing.rows} rows of {packing.length} tokens, about {useful:.0%} useful"
    return f"{text}; {cure}" if cure else text


def packed(config: Config) -> tuple[float, str]:
    """The fraction of useful tokens, and fields that raise it where it is low; "" where it is not.

    A row holds the longest sequence whole. With more rows than a mini-batch fills, only `seq` helps: it puts several
    devices on one row.
    """
    laid_out, longest = mesh_of(config), longest_sequence(config)
    packing = choose_packing(config, longest, laid_out)
    reinforced = config.rl.steps or config.rl.epochs
    sequences = config.rl.prompts // config.rl.mini_batches * config.rl.samples if reinforced else config.sft.batch_size
    lengths = (packing.length, *packing.more_lengths)
    useful = workload.utilization(sequences, rows=packing.rows, lengths=lengths, longest=longest)
    if laid_out is None or useful >= MANY_USEFUL:
        return useful, ""
    shape = dict(laid_out.shape)
    better = workload.better_packing(
        sequences, groups=shape["data"] * shape["fsdp"], seq=shape["seq"], length=packing.length, longest=longest
    )
    if better is None or better[0] < useful + 0.1:
        return useful, ""
    found, seq, more = better
    return useful, f"mesh.seq={seq} with packing.rows=0 and packing.more_lengths={more} makes about {found:.0%} useful"


def memory_table(config: Config) -> str:
    """Memory per device, from the model's config.json."""
    entries, available = _memory(config), memory.device_bytes()
    memory.check(entries, available)
    total = sum(entry.bytes for entry in entries)
    parts = ", ".join(f"{entry.name} {entry.bytes / memory.GIB:.2f}" for entry in entries)
    return f"about {total / memory.GIB:.2f} of {available / memory.GIB:.2f} GiB per device: {parts}"


def attention(config: Config) -> str:
    """Whether the attention kernels of the accelerator take the rows."""
    if why := slow_attention(config):
        raise UserError(f"attention is the slow blockwise one: {why}")
    return "the fast path" if jax.default_backend() != "cpu" else "blockwise (CPU)"


def slow_attention(config: Config) -> str:
    """Why the run computes attention by the portable backend on an accelerator; "" if it does not."""
    model, laid_out = _model(config), mesh_of(config)
    if model.attention not in ("auto", "blockwise"):
        return ""
    packing = choose_packing(config, longest_sequence(config), laid_out)
    part = packing.length // row_parts(model.num_kv_heads, laid_out)
    return why_slow(part, model.head_dim, np.dtype(model.compute_dtype))


def preflight(config: Config, say: Callable[[str], None], table: Callable[..., None]) -> None:
    """What a run checks and prints at its start: the memory table, and a fast path that it does not take.

    Raises:
      UserError: the run cannot fit the devices.
    """
    if why := slow_attention(config):
        say(f"attention is the slow blockwise one: {why}")
    useful, cure = packed(config)
    if cure:
        say(f"packing: about {useful:.0%} of a micro-batch's places hold tokens; {cure}")
    entries, available = _memory(config), memory.device_bytes()
    if sum(entry.bytes for entry in entries) > memory.GIB:  # a laptop-sized model needs no table
        rows = memory.rows(entries, available)
        table("memory per device, estimated", ["", "GiB", "reduced by"], rows)
    memory.check(entries, available)


def tokenizer(config: Config) -> str:
    """The tokenizer loads and its template renders a conversation."""
    if not (config.model.path or config.model.tokenizer):
        return "created with the model at the start"
    chat = _chat(config)
    return f"{len(chat.prompt(_HELLO))} tokens for a first prompt with its tools"


def data(config: Config) -> str:
    """The files of problems and conversations exist and can be read."""
    found = []
    if not (config.model.path or config.model.tokenizer):
        return "generated problems"
    chat = _chat(config)
    train: Any = []
    if config.data.problems and (config.rl.steps or config.rl.epochs):
        train, _ = inputs.training_problems(config, chat)
        found.append(f"{len(train)} problems")
    if config.data.eval:
        held_out, _ = inputs.problems(config, config.data.eval, chat, evaluation=True)
        inputs.refuse_overlap(train, held_out)
        found.append(f"{len(held_out)} held out")
    if config.data.sft and config.data.sft not in inputs.GENERATED and (config.sft.steps or config.sft.epochs):
        with tempfile.TemporaryDirectory() as folder, _sandbox(config) as (sandbox, run):
            found.append(f"{len(inputs.demonstrations(config, Path(folder), sandbox, run))} conversations")
    return ", ".join(found) or "none needed"


def servers(config: Config) -> str:
    """Rollout servers are installed or answer."""
    if config.rollout.engine == "local":
        return "embedded engine"
    check_generation(config)
    return ", ".join(config.rollout.servers) or f"{config.rollout.launch_servers} to be launched on this machine"


def sandbox(config: Config) -> str:
    """The sandbox runs a program; its isolation level."""
    with _sandbox(config) as (opened, run):
        result = run(opened.run("print(6 * 7)"))
    if result.stdout.strip() != "42":
        raise UserError(f"sandbox: print(6 * 7) gave {result.status}: {result.stderr[-300:]}")
    meta = opened.metadata
    return f"level {meta['level']}: {meta['plan']}" if "plan" in meta else str(meta)


def storage(config: Config) -> str:
    """Write a file and its marker where the run is kept; another process reads them back."""
    folders = {"run_dir": Path(config.directory).absolute()}
    if config.rollout.weights_dir:
        folders["rollout.weights_dir"] = Path(config.rollout.weights_dir).absolute()
    for field, folder in folders.items():
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        write_and_read_back(there, field)
    return ", ".join(map(str, folders.values()))


def write_and_read_back(folder: Path, field: str) -> None:
    """Publishes a file as the run does (content, then a marker) and reads it in another process.

    Raises:
      UserError: the folder is not writable or another process does not see the content.
    """
    name, content = f".doctor-{uuid.uuid4().hex}", os.urandom(1024).hex()
    file, marker = folder / name, folder / f"{name}.done"
    code = "import sys, pathlib as l; f, m = map(l.Path, sys.argv[1:]); print(m.exists() and f.read_text())"
    try:
        file.write_text(content)
        marker.write_text("")
        done = subprocess.run(
            [sys.executable, "-c", code, str(file), str(marker)], capture_output=True, text=True, timeout=60
        )
        if done.stdout.strip() != content:
            raise UserError(
                f"{field}: {folder}: another process does not read back what was written; use a shared disk"
            )
    except OSError as error:
        raise UserError(f"{field}: {folder}: {error.strerror}; give a writable folder") from error
    finally:
        for path in (file, marker):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


CHECKS: dict[str, Callable[[Config], str]] = {
    "devices": devices,
    "mesh": mesh,
    "memory": memory_table,
    "attention": attention,
    "servers": servers,
    "sandbox": sandbox,
    "storage": storage,
    "tokenizer": tokenizer,
    "data": data,
}

_HELLO = [Message("user", "What is 6 * 7?")]


def _model(config: Config) -> ModelConfig:
    """The model's shape as the run computes it; a new model's from the fields of model.new."""
    how: dict[str, Any] = {name: getattr(config.model, name) for name in ("reduce_dtype", "remat", "attention")}
    how |= {"compute_dtype": compute_dtype(config), "lora": peft.adapters_of(config.model.lora)}
    if config.model.path.endswith(".gguf"):
        return dataclasses.replace(gguf.describe(config.model.path)[0], **how)
    if config.model.path:
        return ModelConfig.from_hf(hf.resolve(config.model.path, weights=False), **how)
    new = dataclasses.asdict(config.model.new)
    return ModelConfig(**new | {"vocab_size": new["vocab_size"] or 1024}, **how)


def _memory(config: Config) -> Sequence[memory.Entry]:
    return memory.table(config, _model(config), mesh_of(config), processes=jax.process_count())


def _chat(config: Config) -> Any:
    source = config.model.tokenizer or config.model.path
    with tempfile.TemporaryDirectory() as folder:
        if source.endswith(".gguf"):
            gguf.save_tokenizer(source, Path(folder))
            source = folder
        loaded = load_tokenizer(source)[1]
    templates.use(loaded, config.model.template)
    loop = EventLoop()
    world: Any = open_world(config)
    try:
        return make_chat(config, loaded, world.schemas)
    finally:
        loop.run(world.close())
        loop.close()


@contextlib.contextmanager
def _sandbox(config: Config) -> Iterator[tuple[Any, Callable[[Any], Any]]]:
    loop, opened = EventLoop(), open_sandbox(spec_of(config))
    try:
        yield opened, loop.run
    finally:
        loop.run(opened.close())
        loop.close()
