"""Half of what a tiny run costs is compiling: all runs of a session, of all workers, share what one has compiled."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory, worker_id):
    """A compilation cache that the commands find in their environment."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        yield
