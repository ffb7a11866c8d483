"""A stand-in for an SGLang server: each token follows from the prefix and the weights alone.

So an answer assembled from parts must equal an uninterrupted one. It counts the tokens it computes.
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
    """`async with FakeSGLang() as server`: serves at `server.url`; stops at `hold_at` tokens in total, if set.

    `info` is its /server_info, `raw` maps endpoints to literal answers, `nonsense` lists replacements for answers of
    /generate, one per request: a dict replaces fields of the answer or its meta_info, anything else the whole answer.
    """

    def __init__(self, piece=8, host="127.0.0.1", prefix="", key="", tls=None):
        self.piece, self.version, self.weights, self.generated = piece, "default", 0, 0
        self.host, self.prefix, self.key, self.tls = host, prefix, key, tls
        self.running = asyncio.Event()
        self.running.set()
        self.loading = asyncio.Event()  # cleared: the server is slow to load weights
        self.loading.set()
        self.aborted: set[str] = set()
        self.hold_at = None  # tokens in total
        self.cut_after = None  # tokens of an answer, after which its connection breaks
        self.down = False  # answers 503
        self.info = {"context_length": 4096, "incremental_streaming_output": True}
        self.raw: dict[str, str] = {}
        self.nonsense: list = []
        self.received: list[str] = []  # buckets of a process group, by the name of their first tensor
        self.seen: list[dict] = []

    async def __aenter__(self):
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", f"{self.prefix}/{{name}}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, 0, ssl_context=self.tls).start()
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"http{'s' * bool(self.tls)}://{host}:{self._runner.addresses[0][1]}{self.prefix}"
        return self

    async def __aexit__(self, *_):
        self.hold_at = None
        await self._runner.cleanup()

    async def _handle(self, request):
        name = request.match_info["name"]
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if self.down:
            return web.json_response({}, status=503)
        if name in self.raw:
            return web.Response(text=self.raw[name], content_type="application/json")
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
            await self.loading.wait()
            self.version, self.weights = body["weight_version"], int(body["model_path"])
        elif name == "update_weight_version":
            self.version = body["new_version"]
        elif name == "update_weights_from_tensor":
            await self.loading.wait()
            self.version = body["weight_version"]
        elif name == "update_weights_from_distributed":
            self.version, self.received = body["weight_version"], [*self.received, body["names"][0]]
            self.weights = int(body["names"][0]) if self.version.isdecimal() else -1
        answers = {"model_info": {"weight_version": self.version}, "server_info": self.info}
        return web.json_response(answers.get(name, {"success": True}))

    async def _generate(self, request, body):
        ids, left = list(body["input_ids"]), body["sampling_params"]["max_new_tokens"]
        prompt, spans, self.seen = len(ids), [], [*self.seen, body]
        nonsense = self.nonsense.pop(0) if self.nonsense else {}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if body["stream"]:
            await response.prepare(request)
        while left:
            await self.running.wait()
            new, start = [], len(ids) - prompt
            for _ in range(min(left, self.piece) if body["stream"] else left):
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
            answer = {"output_ids": new, "meta_info": meta}
            if isinstance(nonsense, dict):
                answer |= {key: value for key, value in nonsense.items() if key in ("output_ids", "error")}
                meta |= {key: value for key, value in nonsense.items() if key not in ("output_ids", "error")}
            else:
                answer = nonsense
            if not body["stream"]:
                return web.json_response(answer)
            await response.write(b"data: " + json.dumps(answer).encode() + b"\n\n")
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
    """Checks that the completion consists of `spans`, [(weights, version, tokens)], in order."""
    ids, versions = list(prompt), []
    for weights, version, count in spans:
        ids += continuation(ids, count, weights)
        versions += [version] * count
    assert completion.ids.tolist() == ids[len(prompt) :]
    assert completion.version.tolist() == versions
    np.testing.assert_allclose(completion.logprobs, -completion.ids / VOCAB, rtol=1e-6)
