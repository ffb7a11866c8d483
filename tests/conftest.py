"""Shapes of the algorithms are checked at run time, in tests only; JAX is quiet and on the CPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook("open_agentrl_jax.algorithms", "beartype.beartype")

from hypothesis import settings  # noqa: E402

# property tests are the same on every run and every machine: no random seed, no clock
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


import pytest  # noqa: E402

from open_agentrl_jax.data import synthetic  # noqa: E402

THINKING = synthetic.CHAT_TEMPLATE.replace(
    "+ message.content }}",
    "+ ('<think>\\n\\n</think>\\n\\n' if loop.last and message.role == 'assistant' else '') + message.content }}",
)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(pytestconfig):
    """A compilation cache for the commands that tests start: half the time of a tiny run is compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(pytestconfig.cache.mkdir("compiled")))
        patch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**28))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return synthetic.train_tokenizer(synthetic.corpus(0, 300))


@pytest.fixture(scope="session")
def thinking_tokenizer():
    made = synthetic.train_tokenizer(synthetic.corpus(0, 300))
    made.chat_template = THINKING
    return made
