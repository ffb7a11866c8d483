"""A proxy before a real server that produces the faults of networks and machines, one request at a time."""

import asyncio
import dataclasses

import aiohttp
from aiohttp import web


@dataclasses.dataclass
class Fault:
    """`kind`: "status" (answers 500), "hang" (never answers), "truncate" (cuts after `value` bytes), "delay" (waits
    `value` seconds), "path" (loads the folder `value` instead). It strikes `times` requests to `path` with `text`.
    """

    path: str
    kind: str
    value: float | str = 0
    times: int = 10**9
    text: str = ""
    struck: int = 0


class Proxy:
    """`async with Proxy(url) as proxy`: requests to `proxy.url` go to `url`, but for `proxy.faults`."""

    def __init__(self, target: str):
        self.target, self.url = target, ""
        self.faults: list[Fault] = []

    async def __aenter__(self):
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        await self._http.close()
        await self._runner.cleanup()

    def fault(self, path: str, kind: str, **values) -> Fault:
        self.faults.append(Fault(path, kind, **values))
        return self.faults[-1]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        body = await request.read()
        struck = (f for f in self.faults if f.path == path and f.struck < f.times and f.text.encode() in body)
        fault = next(struck, None)
        if fault is not None:
            fault.struck += 1
        kind, value = (fault.kind, fault.value) if fault else ("", 0)
        if kind == "status":
            return web.json_response({"error": {"message": "injected"}}, status=500)
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "delay":
            await asyncio.sleep(float(value))
        if kind == "path":
            text = body.decode()
            start = text.index('"model_path": "') + len('"model_path": "')
            body = (text[:start] + str(value) + text[text.index('"', start) :]).encode()
        headers = {"Content-Type": request.headers.get("Content-Type", "application/json")}
        try:
            async with self._http.request(
                request.method, f"{self.target}/{path}", data=body or None, headers=headers
            ) as answer:
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
                await response.prepare(request)
                sent = 0
                async for data in answer.content.iter_any():
                    if kind == "truncate" and sent + len(data) > value:
                        await response.write(data[: int(value) - sent])
                        assert request.transport is not None
                        request.transport.close()
                        return response
                    await response.write(data)
                    sent += len(data)
                await response.write_eof()
                return response
        except aiohttp.ClientError:
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=502)
