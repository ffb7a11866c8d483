"""A stand-in for an SGLang server, where none is installed: its tokens follow from the prefix and the weights alone.

So an answer that was put together from parts must equal one that was never broken. It counts what it computed.
"""

import asyncio
import json

import numpy as np
from aiohttp import web

VOCAB = 97


def next_token(prefix, weights):
    return (sum(prefix) * 31 + 7 * len(prefix) + weights) % VOCAB


def continuation(prompt, count, weights=0):
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, weights))
    return ids[len(prompt) :]


class FakeSGLang:
    """`async with FakeSGLang() as server`: `server.url`; it goes no further than `hold_at` tokens in all, if given."""

    def __init__(self, piece=8):
        self.piece, self.version, self.weights, self.generated = piece, "default", 0, 0
        self.running = asyncio.Event()
        self.running.set()
        self.aborted: set[str] = set()
        self.hold_at = None  # tokens in all
        self.cut_after = None  # tokens of an answer, after which its connection breaks
        self.seen: list[dict] = []

    async def __aenter__(self):
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{name}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        self.hold_at = None
        await self._runner.cleanup()

    async def _handle(self, request):
        name = request.match_info["name"]
        body = await request.json() if request.can_read_body else {}
        if name == "generate":
            return await self._generate(request, body)
        if name == "pause_generation":
            self.running.clear()
        elif name == "continue_generation":
            self.running.set()
        elif name == "abort_request":
            self.aborted.add(body["rid"])
        elif name == "update_weights_from_disk":
            self.version, self.weights = body["weight_version"], int(body["model_path"])
        answers = {
            "model_info": {"weight_version": self.version},
            "server_info": {"context_length": 4096, "incremental_streaming_output": True},
        }
        return web.json_response(answers.get(name, {"success": True}))

    async def _generate(self, request, body):
        ids, left = list(body["input_ids"]), body["sampling_params"]["max_new_tokens"]
        prompt, spans, self.seen = len(ids), [], [*self.seen, body]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while left:
            await self.running.wait()
            new, start = [], len(ids) - prompt
            for _ in range(min(left, self.piece)):
                new.append(next_token(ids, self.weights))
                ids.append(new[-1])
            left -= len(new)
            self.generated += len(new)
            if spans and spans[-1]["version"] == self.version:
                spans[-1]["end"] += len(new)
            else:
                spans.append({"version": self.version, "start": start, "end": start + len(new)})
            aborted = body["rid"] in self.aborted
            meta = {
                "finish_reason": {"type": "abort"} if aborted else None if left else {"type": "length"},
                "output_token_logprobs": [[-i / VOCAB, i, None] for i in new],
                "weight_versions": spans if aborted or not left else None,
                "prompt_tokens": prompt,
            }
            await response.write(b"data: " + json.dumps({"output_ids": new, "meta_info": meta}).encode() + b"\n\n")
            if aborted:
                break
            if self.cut_after is not None and len(ids) - prompt >= self.cut_after:
                request.transport.close()
                return response
            while self.hold_at is not None and self.generated >= self.hold_at:
                await asyncio.sleep(0.002)
        await response.write_eof()
        return response


def expect(completion, prompt, spans):
    """The completion is `spans`, [(weights, version, tokens)], one after the other."""
    ids, versions = list(prompt), []
    for weights, version, count in spans:
        ids += continuation(ids, count, weights)
        versions += [version] * count
    assert completion.ids.tolist() == ids[len(prompt) :]
    assert completion.version.tolist() == versions
    np.testing.assert_allclose(completion.logprobs, -completion.ids / VOCAB, rtol=1e-6)
