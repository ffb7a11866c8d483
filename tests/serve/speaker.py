"""An engine that says what a test wants."""

import numpy as np

from open_agentrl_jax.types import Completion


class Speaker:
    """An engine that answers with `texts` in turn, piece by piece where it is asked for pieces."""

    def __init__(self, chat, *texts):
        self.chat, self.texts, self.pending, self.released, self.gate = chat, list(texts), {}, [], None

    async def generate(self, ids, sampling, *, session=""):
        if self.gate is not None:
            await self.gate.wait()
        start, said, script = self.pending.get(session, (0, 0, []))
        if not script or len(ids) != start + said:
            text = self.texts.pop(0)
            if isinstance(text, Exception):
                raise text
            start, said, script = len(ids), 0, [*self.chat.encode(text), self.chat.turn_end]
        piece = script[said : said + sampling.max_tokens]
        said += len(piece)
        done = said == len(script)
        self.pending[session] = (start, said, [] if done else script)
        n = len(piece)
        logprobs = -np.arange(start + said - n, start + said).astype(np.float32) / 100
        return Completion(np.array(piece, np.int32), logprobs, "stop" if done else "length", np.full(n, 2, np.int32))

    async def update_weights(self, path, version): ...

    async def release(self, session):
        self.released.append(session)
