"""How the cost of an update grows: seconds and bytes per device, against one variable at a time.

    python -m launch.benchmark scaling --picture=docs/scaling.svg

The model is that of `launch.benchmark train` with full rematerialisation; the base is 8 rows of 512 tokens, one
sequence per row, on one device. Devices are fake, parts of one processor: they show bytes and collectives, not speed.
Bytes are those of the compiled program: state and batch, and XLA's temporaries.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks import harness

FAKE = 8  # fake devices


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured update."""

    length: int = 512  # tokens per row, all of one sequence
    rows: int = 8
    fsdp: int = 1
    width: int = 128  # of the model; 3 times as many hidden units


SWEEPS = {
    "length": ("tokens per row, 1 row", [Point(length=n, rows=1) for n in (512, 1024, 2048, 4096, 8192)]),
    "rows": ("rows of 512 tokens", [Point(rows=n) for n in (1, 2, 4, 8, 16)]),
    "fsdp": ("devices, 8 rows of 512 in all", [Point(fsdp=n) for n in (1, 2, 4, 8)]),
    "width": ("width of the model, 8 rows of 512", [Point(width=n) for n in (64, 128, 256, 512)]),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one update."""

    seconds: float  # median
    arguments: int  # bytes per device
    temporary: int  # bytes per device

    @property
    def bytes(self) -> int:
        """State, batch and temporaries of one device."""
        return self.arguments + self.temporary


def measure(point: Point, rounds: int) -> Cost:
    """Compiles the update of a point and runs it."""
    import jax
    import numpy as np

    from benchmarks.train import MODEL
    from open_agentrl_jax.config import Optim
    from open_agentrl_jax.models import qwen
    from open_agentrl_jax.models.config import ModelConfig
    from open_agentrl_jax.parallel.mesh import make_mesh
    from open_agentrl_jax.parallel.sharding import P, placer
    from open_agentrl_jax.train import state as states
    from open_agentrl_jax.train.optimizer import make_optimizer
    from open_agentrl_jax.train.packing import Example, pack
    from open_agentrl_jax.train.step import likelihood, make_step

    shape: dict[str, Any] = MODEL | {"hidden_size": point.width, "num_heads": point.width // 32}
    model = ModelConfig("qwen3", intermediate_size=3 * point.width, tie_word_embeddings=True, remat="full", **shape)
    optimizer = make_optimizer(Optim(), 1000)
    mesh = make_mesh(fsdp=point.fsdp, devices=jax.devices()[: point.fsdp])
    ids = np.random.default_rng(0).integers(1, model.vocab_size, (point.rows, point.length + 1), np.int32)
    batch, used = pack([Example(row, np.ones(len(row), bool)) for row in ids], rows=point.rows, length=point.length)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda p: states.create(p, optimizer))(qwen.init(model, 0, mesh))
        arguments = placer(mesh)(batch), jax.device_put(np.int32(used), jax.NamedSharding(mesh, P()))
        program = make_step(model, optimizer, likelihood).lower(state, *arguments).compile()
        holder = [state]

        def run() -> None:
            holder[0], _ = jax.block_until_ready(program(holder[0], *arguments))

        took = harness.timed(run, rounds, warmup=1)["seconds"]
    memory = program.memory_analysis()
    return Cost(took, memory.argument_size_in_bytes, memory.temp_size_in_bytes)


def picture(sweeps: dict[str, tuple[str, list[int], list[Cost]]]) -> str:
    """One panel per sweep, both axes logarithmic: seconds and bytes per device, each against its first point (SVG)."""
    wide, high, edge = 300, 210, 36
    parts = []
    for i, (title, places, costs) in enumerate(sweeps.values()):
        series = {"seconds": [c.seconds for c in costs], "bytes per device": [c.bytes for c in costs]}
        relative = {name: [value / values[0] for value in values] for name, values in series.items()}
        low = math.log2(min(min(values) for values in relative.values()))
        span = math.log2(max(max(values) for values in relative.values())) - low or 1.0
        left, top = wide * (i % 2), high * (i // 2)
        steps = math.log2(places[-1] / places[0])

        def at(place: int, value: float, *, places=places, left=left, top=top, low=low, span=span, steps=steps) -> str:
            x = left + edge + (wide - 2 * edge) * math.log2(place / places[0]) / steps
            return f"{x:.1f},{top + high - edge - (high - 2.2 * edge) * (math.log2(value) - low) / span:.1f}"

        parts.append(f'<text x="{left + edge}" y="{top + 18}" font-size="12">{escape(title)}</text>')
        legend = ""
        for (name, values), colour in zip(relative.items(), ("#1f77b4", "#d62728"), strict=True):
            line = " ".join(at(place, value) for place, value in zip(places, values, strict=True))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            legend += f'<tspan fill="{colour}">{name} x {values[-1]:.2g}</tspan> &#160; '
        parts.append(f'<text x="{left + edge}" y="{top + 32}">{legend}</text>')
        for place in places:
            x = at(place, 2**low).split(",")[0]
            parts.append(f'<text x="{x}" y="{top + high - 16}" text-anchor="middle">{place}</text>')
    body, size = "\n".join(parts), f"{2 * wide} {high * math.ceil(len(sweeps) / 2)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="10">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def main(arguments: list[str]) -> None:
    """The command."""
    parser = harness.parser("scaling", __doc__, rounds=3)
    parser.add_argument("--sweeps", default=",".join(SWEEPS))
    parser.add_argument("--picture", default="", help="also draw the sweeps into this SVG file")
    options = parser.parse_args(arguments)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={FAKE}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    report, drawn = harness.Report("scaling", arguments), {}
    for name in options.sweeps.split(","):
        title, points = SWEEPS[name]
        places = [getattr(point, name) for point in points]
        costs = []
        for place, point in zip(places, points, strict=True):
            costs.append(cost := measure(point, options.rounds))
            rate = point.rows * point.length / cost.seconds
            sizes = {"state and batch MB": cost.arguments / 1e6, "temporaries MB": cost.temporary / 1e6}
            report.add(against=title, at=place, seconds=cost.seconds, **{"tokens/s": rate, **sizes})
        drawn[name] = title, places, costs
    if options.picture:
        Path(options.picture).write_text(picture(drawn))
    report.save(options.out)
