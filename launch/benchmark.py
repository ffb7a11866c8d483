"""Benchmarks by name: `python -m launch.benchmark <name> [options]`."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from launch.command import refuse

BENCHMARKS = {
    "train": "benchmarks.train",  # one update here, in torch + transformers, and in Tunix, on the same sequences
    "sandbox": "benchmarks.sandbox",  # calls per second, latency and CPU time of the Python tool
    "rollout": "benchmarks.rollout",  # the path around SGLang servers relative to their own speed; overlap
    "refit": "benchmarks.refit",  # new weights into a running SGLang server, relative to a copy of the same bytes
    "decode": "benchmarks.decode",  # the embedded engine relative to the machine's bandwidth and matmul rate
    "memory": "benchmarks.memory",  # the chunked head relative to all logits at once
    "gpu": "benchmarks.gpu",  # attention, matrix products, one update and decoding on an NVIDIA GPU
    "scaling": "benchmarks.scaling",  # one update against length, rows, devices and width
}


def main() -> None:
    """Runs the benchmark that the first argument names."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in BENCHMARKS:
        asked = name in ("-h", "--help")
        usage = f"usage: python -m launch.benchmark {{{','.join(BENCHMARKS)}}} [options]"
        print(usage, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    if importlib.util.find_spec("benchmarks") is None:
        refuse("launch.benchmark: the benchmarks are not installed; run it in a checkout of the repository")
    importlib.import_module(BENCHMARKS[name]).main(arguments)


if __name__ == "__main__":
    main()
