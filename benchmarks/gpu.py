"""Measure this project on an NVIDIA GPU, beside torch, with one command.

    python -m launch.benchmark gpu                                  # a GPU of 80 GB, all parts
    python -m launch.benchmark gpu --parts=attention,matmul --layers=8

attention: forward and gradient of each backend on one packed row of agentic lengths, and the distance of each from the
  blockwise backend in float32; then torch's own kernel on the same row.
matmul: the rate of a large bfloat16 product, the reference for everything else.
train: one update (SFT, float32 master weights, AdamW, full rematerialisation) of the model's shape with random weights,
  here and in transformers with every attention that torch offers here, on the same sequences.
fits: one GRPO update of a row of --long tokens, and the peak of the device's memory.
decode: python -m launch.benchmark decode, for the same shape.

Each side is a process of its own with the whole card, one after the other: two do not fit together. With --layers=18
torch's float32 master weights also fit on a card of 80 GB. Figures are medians of --rounds after two warm-up rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import harness
from launch.command import refuse
from open_agentrl_jax.planning.shapes import SHAPES
from open_agentrl_jax.types import UserError

MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Work:
    """The workload, equal for every side."""

    model: str = "qwen3_4b"
    layers: int = 0  # 0: all
    length: int = 16384  # tokens in a packed row
    sequences: int = 12  # per update
    long: int = 23040  # tokens per row of `fits`
    rounds: int = 5

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, as ModelConfig names it."""
        known = SHAPES[self.model]
        return known | ({"num_layers": self.layers} if self.layers else {})

    @property
    def rows(self) -> list[np.ndarray]:
        """The token sequences of an update; the last token of each is only ever a target."""
        from open_agentrl_jax.planning import workload

        rng, sizes = np.random.default_rng(0), workload.lengths(self.sequences, mean=self.length // 4, cap=self.length)
        return [rng.integers(1, self.shape["vocab_size"], size + 1).astype(np.int32) for size in sizes]

    @property
    def useful(self) -> int:
        """Tokens that an update trains on."""
        return sum(len(row) - 1 for row in self.rows)


def one_row(work: Work) -> Any:
    """One packed row of --length tokens as a Batch of one micro-batch: the fullest that the lengths give."""
    from open_agentrl_jax.planning import workload

    batch, used = workload.packed(
        workload.lengths(24, mean=work.length // 4, cap=work.length), rows=1, length=work.length
    )
    filled = (batch.segment_ids[:used] > 0).sum((1, 2)) + batch.segment_ids[:used].max((1, 2))  # full, and of many
    return dataclasses.replace(
        batch, **{f.name: getattr(batch, f.name)[filled.argmax()][None] for f in dataclasses.fields(batch)}
    )


def attention_flops(segments: np.ndarray, work: Work) -> float:
    """Operations of forward and gradient, seven products, over the pairs of tokens that see each other."""
    sizes = np.unique(segments[segments > 0], return_counts=True)[1].astype(float)
    return 7 * 2 * float((sizes * (sizes + 1) / 2).sum()) * work.shape["num_heads"] * work.shape["head_dim"]


def attention_part(work: Work, *, small: bool = False) -> list[dict[str, Any]]:
    """Every backend on one packed row; `small`: on a machine where only the portable ones run."""
    import jax
    import jax.numpy as jnp

    from open_agentrl_jax.models import attention, triton
    from open_agentrl_jax.models.blocks import Where

    batch, shape = one_row(work), work.shape
    where = Where(jnp.asarray(batch.segment_ids[0]), jnp.asarray(batch.positions[0]))
    kinds = ("num_heads", "num_kv_heads", "num_kv_heads", "num_heads")
    keys = jax.random.split(jax.random.key(0), 4)
    exact = [
        jax.random.normal(key, (1, work.length, shape[n], shape["head_dim"]))
        for key, n in zip(keys, kinds, strict=True)
    ]
    half = [x.astype(jnp.bfloat16) for x in exact]

    def both(compute: Callable[..., Any], arrays: list[Any]) -> Callable[[], list[Any]]:
        def total(q: Any, k: Any, v: Any, weight: Any, at: Where) -> Any:
            o = compute(q, k, v, at, at)
            return (o * weight).astype(jnp.float32).sum(), o

        values = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
        return lambda: jax.tree.leaves(jax.block_until_ready(values(*arrays, where)))[1:]  # o, dq, dk, dv

    tile = triton.Tile
    sides: dict[str, Callable[..., Any]] = dict(attention.BACKENDS)
    del sides["plain"], sides["splash"], sides["splash_static"]
    if small:
        del sides["triton"], sides["cudnn"]
    else:  # what the compiler takes without spilling, by the side of the default
        for name, tiles in {
            "triton 64x64": triton.Tiles(tile(64, 64, 4, 3), tile(64, 64, 4, 3), tile(64, 64, 4, 3)),
            "triton 128x128": triton.Tiles(tile(128, 128, 8, 2), tile(128, 128, 8, 2), tile(64, 128, 8, 3)),
        }.items():
            sides[name] = functools.partial(triton.triton, tiles=tiles)
    with jax.default_matmul_precision("highest"):
        wanted = both(attention.blockwise, [x.astype(jnp.float32) for x in half])()
    found, flops = [], attention_flops(batch.segment_ids[0], work)
    for name, compute in sides.items():
        try:
            run = both(compute, half)
            error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(run(), wanted, strict=True))
            row = harness.timed(run, work.rounds)
            found.append({"side": name, **row, "tflops": flops / row["seconds"] / 1e12, "error": error})
        except Exception as fault:  # a kernel that does not compile or run is a finding, not the end
            found.append({"side": name, "failed": " ".join(str(fault).split())[:300]})
    return found


def matmul_part(work: Work, *, size: int = 8192) -> list[dict[str, Any]]:
    """Square, and of the model's widest layer."""
    import jax
    import jax.numpy as jnp

    found, shape = [], work.shape
    sizes = {"square": (size, size, size), "layer": (work.length, shape["hidden_size"], shape["intermediate_size"])}
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b))
    for name, (m, k, n) in sizes.items():
        a, b = (jax.random.normal(jax.random.key(0), s, jnp.bfloat16) for s in ((m, k), (k, n)))
        # Ten at a time: a launch from Python takes as long as a small product.
        row = harness.timed(lambda a=a, b=b: jax.block_until_ready([multiply(a, b) for _ in range(10)]), work.rounds)
        found.append({"side": name, **row, "tflops": 10 * 2.0 * m * k * n / row["seconds"] / 1e12})
    return found


def model_flops(work: Work) -> float:
    """Operations of an update, nothing computed again: six a matrix parameter and token, and attention's products."""
    from open_agentrl_jax.models.config import ModelConfig
    from open_agentrl_jax.models.qwen import abstract_params

    params = abstract_params(ModelConfig(**work.shape))
    layers = sum(x.size for x in params["layers"].values() if x.ndim == 3)
    matrices = layers + params["embed"].size  # the head, whether or not it is the embedding
    pairs = sum((len(row) - 1) * len(row) / 2 for row in work.rows)
    attend = 3 * 2 * 2 * pairs * work.shape["num_heads"] * work.shape["head_dim"] * work.shape["num_layers"]
    return 6.0 * matrices * work.useful + attend


def _state(work: Work) -> Any:
    """The model, its optimizer and a state of random weights, made on the device."""
    import jax
    import jax.numpy as jnp

    from open_agentrl_jax.config import Optim
    from open_agentrl_jax.models import qwen
    from open_agentrl_jax.models.config import ModelConfig
    from open_agentrl_jax.train import state as states
    from open_agentrl_jax.train.optimizer import make_optimizer

    half = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = ModelConfig(**work.shape, compute_dtype=half, remat="full")
    optimizer = make_optimizer(Optim(lr=1e-6), 1000)
    leaves, tree = jax.tree.flatten(qwen.abstract_params(model))

    @jax.jit
    def make() -> Any:
        keys = jax.random.split(jax.random.key(0), len(leaves))
        drawn = [0.02 * jax.random.normal(k, x.shape, jnp.float32) for k, x in zip(keys, leaves, strict=True)]
        return states.create(jax.tree.unflatten(tree, drawn), optimizer)

    return model, optimizer, make()


def _peak() -> float:
    """GiB that this process has held on the device at most; 0 where the device does not tell."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / harness.GIB


def train_part(work: Work) -> list[dict[str, Any]]:
    """This project's update."""
    import jax

    from open_agentrl_jax.train.packing import Example, pack
    from open_agentrl_jax.train.step import likelihood, make_step

    model, optimizer, state = _state(work)
    holder, step = [state], make_step(model, optimizer, likelihood)
    del state
    examples = [Example(row, np.ones(len(row), bool)) for row in work.rows]
    batch, used = pack(examples, rows=1, length=work.length)
    batch = jax.tree.map(jax.numpy.asarray, batch)

    def run() -> None:
        holder[0], _ = jax.block_until_ready(step(holder[0], batch, jax.numpy.int32(used)))

    row = harness.timed(run, work.rounds)
    return [{"side": "ours", **row, "tokens/s": work.useful / row["seconds"], "GiB": _peak(), "rows": used}]


def fits_part(work: Work) -> list[dict[str, Any]]:
    """The update of the paper's RL, for one row as long as a trajectory may be."""
    import jax

    from open_agentrl_jax.config import Loss
    from open_agentrl_jax.train.step import make_step, policy_gradient

    model, optimizer, state = _state(work)
    step = make_step(model, optimizer, policy_gradient(Loss(), width=work.long))
    batch = jax.tree.map(jax.numpy.asarray, one_row(dataclasses.replace(work, length=work.long)))
    state, _ = jax.block_until_ready(step(state, batch, jax.numpy.int32(1)))
    started = time.perf_counter()
    _, metrics = jax.block_until_ready(step(state, batch, jax.numpy.int32(1)))
    finite = bool(np.isfinite(metrics["actor/grad_norm"]))
    return [{"side": "ours", "seconds": time.perf_counter() - started, "GiB": _peak(), "finite": finite}]


PARTS: dict[str, Callable[[Work], list[dict[str, Any]]]] = {
    "attention": attention_part,
    "matmul": matmul_part,
    "train": train_part,
    "fits": fits_part,
}
# In torch: part -> its sides, see benchmarks/gpu_torch.py.
TORCH = {"attention": ("varlen",), "train": ("varlen", "flash_attention_2", "sdpa")}


def measured(part: str, rows: list[dict[str, Any]], rate: float, work: Work) -> Iterator[dict[str, Any]]:
    """The rows of a part, with their share of the measured matmul rate where the operations are known."""
    for row in rows:
        done = row["tflops"] * 1e12 if "tflops" in row else 0.0
        if part == "train" and "seconds" in row:
            done = model_flops(work) / row["seconds"]
        share = {"of matmul rate": done / rate} if rate and done and part != "matmul" else {}
        yield {"part": part, **row, **share}


def card() -> str:
    """The GPU's name.

    Raises:
      UserError: there is none that JAX can use.
    """
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, jax.__version__)"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    name = done.stdout.strip()
    if not name.startswith("gpu"):
        raise UserError(f"launch.benchmark gpu: JAX finds no GPU here ({name or 'no device'}); install jax[cuda12]")
    return name


def measure(parts: list[str], work: Work, report: harness.Report) -> None:
    """Runs the parts, each side in a process of its own, and reports each as it is done."""
    rate, given = 0.0, json.dumps(dataclasses.asdict(work))
    environment = {MEMORY: os.environ.get(MEMORY, "0.95")}  # JAX's default of three quarters is too little
    for part in sorted(parts, key=lambda name: name != "matmul"):  # first: the others are relative to it
        sides = [("benchmarks.gpu", [part]), *(("benchmarks.gpu_torch", [part, side]) for side in TORCH.get(part, ()))]
        rows = []
        for module, arguments in sides:
            rows += harness.in_process(module, [*arguments, given], environment=environment)
        rate = rate or max((row["tflops"] * 1e12 for row in rows if part == "matmul" and "tflops" in row), default=0.0)
        for row in measured(part, rows, rate, work):
            report.add(**row)


def main(arguments: list[str]) -> None:
    """The command."""
    parser = harness.parser("gpu", __doc__, rounds=5)
    parser.add_argument("--parts", default=",".join([*PARTS, "decode"]))
    for field in dataclasses.fields(Work):
        if field.name != "rounds":
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    parts, out = options.pop("parts").split(","), options.pop("out")
    try:
        if unknown := set(parts) - {*PARTS, "decode"}:
            raise UserError(f"--parts: {', '.join(sorted(unknown))}: use some of {', '.join([*PARTS, 'decode'])}")
        if options["model"] not in SHAPES:
            raise UserError(f"--model={options['model']}: use one of {', '.join(SHAPES)}")
        print(card())
    except UserError as error:
        refuse(str(error))
    work, report = Work(**options), harness.Report("gpu", arguments)
    measure([part for part in parts if part != "decode"], work, report)
    report.save(out)
    if "decode" in parts:
        sizes = ["--batches=1,16,64", "--lengths=512,4096"] + ([f"--layers={work.layers}"] if work.layers else [])
        command = [sys.executable, "-m", "launch.benchmark", "decode", f"--model={work.model}", *sizes]
        subprocess.run(command, check=False)


if __name__ == "__main__":
    _, part, given = sys.argv[1:4]
    print(json.dumps(PARTS[part](Work(**json.loads(given)))))
