"""Half of what a tiny run costs is compiling: all runs of a session, and the next ones, share what one has compiled."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def compiled(pytestconfig):
    """A compilation cache that the commands find in their environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(pytestconfig.cache.mkdir("compiled")))
        patch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**28))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield
