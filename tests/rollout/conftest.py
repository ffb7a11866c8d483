"""Real SGLang servers for the tests marked `sglang`, shared by all of them."""

import contextlib
import os
import pathlib

import pytest

from open_agentrl_jax.rollout import servers
from open_agentrl_jax.types import UserError


def pytest_collection_modifyitems(items):
    """Skips what needs a server where none is installed, and says how to install it. CI installs it and never skips.

    Nor do several workers run it: each would start servers of its own.
    """
    if os.environ.get("CI_SGLANG") == "1":
        return
    reason = ""
    try:
        servers.interpreter()
        if "PYTEST_XDIST_WORKER" in os.environ:
            reason = "real SGLang servers are for one process: pytest -n 0 -m sglang tests/rollout"
    except UserError:
        reason = f"needs the SGLang server: {servers.KINDS['sglang'].install}, then pytest -n 0 -m sglang tests/rollout"
    for item in items:
        if reason and "sglang" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


VOCAB, CONTEXT = 512, 1024


def make_checkpoint(path: pathlib.Path, family: str, seed: int) -> str:
    """A random model whose log-probs differ much from token to token, in bfloat16 as trainers publish it."""
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
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=16, **sizes))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    model.to(torch.bfloat16).save_pretrained(path)
    return str(path)


class Checkpoints:
    """Folders of tiny models, and the log-probs that they give: the trainer's forward, by another implementation."""

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
        """[t], of ids[i] given ids[:i]; 0 for the first."""
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
def launched(checkpoint, count, logs):
    with servers.LaunchedServers(
        checkpoint, count, log_dir=logs, context_length=CONTEXT, max_tokens=16 * CONTEXT
    ) as these:
        these.wait()
        yield these


@pytest.fixture(scope="session")
def qwen3(checkpoints, tmp_path_factory):
    """Two real servers, started when first asked for: that takes half a minute or more."""
    with launched(checkpoints.paths["qwen3", 0], 2, tmp_path_factory.mktemp("qwen3")) as these:
        yield these


@pytest.fixture(scope="session")
def qwen2(checkpoints, tmp_path_factory):
    """One real server."""
    with launched(checkpoints.paths["qwen2", 0], 1, tmp_path_factory.mktemp("qwen2")) as these:
        yield these
