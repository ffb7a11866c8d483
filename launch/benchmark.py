"""Benchmarks by name: `python -m launch.benchmark <name> [options]`."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "train": "benchmarks.train",  # an update here, in torch + transformers, and in Tunix, on the same sequences
    "sandbox": "benchmarks.sandbox",  # calls a second, latency and CPU time of the Python tool
    "rollout": "benchmarks.rollout",  # the path around SGLang servers against their own speed; refit; overlap
    "decode": "benchmarks.decode",  # the embedded engine against bandwidth and matmul rate of the machine
    "memory": "benchmarks.memory",  # the chunked head against all logits at once
    "gpu": "benchmarks.gpu",  # attention, products, an update and decoding on an NVIDIA GPU
    "scaling": "benchmarks.scaling",  # an update against length, rows, devices and width
}


def main() -> None:
    """Runs the benchmark that the first argument names."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in BENCHMARKS:
        asked = name in ("-h", "--help")
        usage = f"usage: python -m launch.benchmark {{{','.join(BENCHMARKS)}}} [options]"
        print(usage, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    importlib.import_module(BENCHMARKS[name]).main(arguments)


if __name__ == "__main__":
    main()
