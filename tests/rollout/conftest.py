"""Real SGLang servers for the tests marked `sglang`: torch SGLang, and sglang-jax for the tests of `qwen3`."""

import contextlib
import os
import pathlib

import pytest

from open_agentrl_jax.rollout import servers
from open_agentrl_jax.types import UserError

RUN = "pytest -n 0 -m sglang tests/rollout"


def missing(kind: str) -> str:
    """Why a server cannot be started here; empty if it can."""
    try:
        servers.interpreter(kind)
    except UserError:
        return f"needs the server: {servers.KINDS[kind].install}, then {RUN}"
    # Each worker would start servers of its own.
    return f"real servers need one process: {RUN}" if "PYTEST_XDIST_WORKER" in os.environ else ""


def pytest_collection_modifyitems(items):
    """Skips tests whose server is not installed. CI installs the servers it names in CI_SGLANG and never skips them."""
    required = os.environ.get("CI_SGLANG", "").split(",")
    reasons = {kind: "" if kind in required else missing(kind) for kind in servers.KINDS}
    for item in items:
        if "sglang" in item.keywords:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            kind = parameters.get("kind") or parameters.get("qwen3", "sglang")
            if reasons[kind]:
                item.add_marker(pytest.mark.skip(reason=reasons[kind]))


VOCAB, CONTEXT = 512, 1024


def make_checkpoint(path: pathlib.Path, family: str, seed: int) -> str:
    """A random model with widely varying log-probs, in bfloat16 as trainers publish it."""
    import torch
    import transformers

    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=family == "qwen3",
    )
    torch.manual_seed(seed)
    if family == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=128, **sizes))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    model.to(torch.bfloat16).save_pretrained(path)
    return str(path)


class Checkpoints:
    """Folders of tiny models and their log-probs: the trainer's forward in another implementation."""

    def __init__(self, root: pathlib.Path):
        self.paths = {
            (family, seed): make_checkpoint(root / f"{family}-{seed}", family, seed)
            for family in ("qwen3", "qwen2")
            for seed in range(3)
        }
        import transformers

        load = transformers.AutoModelForCausalLM.from_pretrained
        self._models = {key: load(path, dtype="float32") for key, path in self.paths.items()}

    def logprobs(self, key, ids, temperature: float = 1.0):
        """[t - 1] log-probs of ids[i + 1] given ids[: i + 1]."""
        return self.distributions(key, ids, temperature).gather(1, self._tensor(ids)[1:, None])[:, 0].numpy()

    def distributions(self, key, ids, temperature: float = 1.0):
        """[t - 1, v] log-probs, a torch tensor."""
        import torch

        with torch.no_grad():
            logits = self._models[key](self._tensor(ids)[None]).logits[0, :-1]
        return torch.log_softmax(logits / temperature, -1)

    @staticmethod
    def _tensor(ids):
        import torch

        return torch.tensor([int(i) for i in ids])


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@contextlib.contextmanager
def launched(checkpoint, count, logs, kind):
    with servers.LaunchedServers(
        checkpoint, count, log_dir=logs, context_length=CONTEXT, max_tokens=16 * CONTEXT, kind=kind
    ) as these:
        these.wait()
        yield these


@pytest.fixture(scope="session", params=["sglang", "sglang_jax"])
def qwen3(checkpoints, tmp_path_factory, request):
    """Two real servers of one kind; they take half a minute or more to start."""
    with launched(checkpoints.paths["qwen3", 0], 2, tmp_path_factory.mktemp("qwen3"), request.param) as these:
        these.kind = request.param
        yield these


@pytest.fixture(scope="session")
def qwen2(checkpoints, tmp_path_factory):
    """One real SGLang server."""
    with launched(checkpoints.paths["qwen2", 0], 1, tmp_path_factory.mktemp("qwen2"), "sglang") as these:
        yield these
