"""An event loop in its own thread, which any event loop may call."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Background:
    """Base class of the sandboxes: their work runs in `loop`, whatever loop calls."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="sandbox", daemon=True)
        self._thread.start()

    async def here(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs work in the loop and waits for it; cancelling the caller cancels the work."""
        if asyncio.get_running_loop() is self.loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Same as `here`, for callers without a loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def close(self) -> None:
        """Ends what is running and frees all resources; a second call does nothing."""
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """Same as `close`, for callers without a loop."""
        if self._thread.is_alive():
            self.wait(self._end())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._release()
        await self.loop.shutdown_default_executor()

    async def _release(self) -> None:
        """Frees what outlives the tasks."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
