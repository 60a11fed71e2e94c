"""A tiny API with the shapes of docs/design.md, for the pages' own tests. It chats from fixed texts and learns nothing."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

TEXTS = (
    "The moon is a ball of rock that goes round the Earth. It takes about **27 days** for one trip.",
    "Happy to tell you! Here is the moon in short:\n\n- It is made of rock.\n- It shines by the light of the sun.\n- People first walked on it in 1969.",
    "The moon is our nearest neighbour in space.",
    "The moon pulls on the seas, and so it makes the tides.",
)


def error(status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None) -> JSONResponse:
    """An error in the OpenAI shape."""
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": code}}, status, headers=headers)


class Fake:
    """What the fake server has seen, and what it should say."""

    def __init__(self) -> None:
        self.pause_s = 0.0
        self.fail: JSONResponse | None = None  # answer everything with this
        self.key: str | None = None
        self.texts: tuple[str, ...] = TEXTS
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.votes: list[dict[str, Any]] = []
        self.withdrawn: list[str] = []
        self.erased: list[str] = []
        self.steered: list[str] = []
        self.cut_off = 0  # streams whose reader left
        self.break_after: int | None = None  # chunks, then an error event
        self.status: dict[str, Any] = {
            "live": "v000001", "live_since": time.time() - 7200, "votes": 0, "votes_until_next_round": 6,
            "learner_state": "idle", "progress": None,
        }
        self.adapters: dict[str, Any] = {"data": [], "live": "base"}
        self.rounds: list[dict[str, Any]] = []
        self.conversations: list[dict[str, Any]] = []
        self.kept: set[str] = set()  # conversations that may be continued
        self.vote_s = 0.0  # how long a vote takes

    def app(self) -> FastAPI:
        """The application; `ui.mount` can go on top."""
        api = FastAPI()

        @api.middleware("http")
        async def gate(request: Request, call_next: Any) -> Any:
            if request.url.path.startswith("/v1/"):
                self.headers.append(dict(request.headers))
                if self.fail is not None:
                    return self.fail
                if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                    return error(401, "send your key as `Authorization: Bearer ...`")
            return await call_next(request)

        @api.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            body = await request.json()
            continued = (body.get("metadata") or {}).get("conversation_id")
            if continued is not None and continued not in self.kept:
                return error(404, "there is no such conversation of yours")
            self.asked.append(body)
            return StreamingResponse(self._stream(body), media_type="text/event-stream")

        @api.put("/v1/comparisons/{comparison}/vote")
        async def vote(comparison: str, request: Request) -> JSONResponse:
            body = await request.json()
            await asyncio.sleep(self.vote_s)
            self.votes.append({"comparison": comparison, **body})
            self.status["votes_until_next_round"] -= 1
            n = self.asked[-1]["n"]
            choices = [{"index": i, "version": "v000001" if i % 2 == 0 else "base"} for i in range(n)]
            return JSONResponse({"vote_id": "vote-1", "comparison_id": comparison, "choices": choices}, 201)

        @api.delete("/v1/comparisons/{comparison}/vote")
        async def withdraw(comparison: str) -> dict[str, bool]:
            await asyncio.sleep(self.vote_s)
            self.withdrawn.append(comparison)
            self.status["votes_until_next_round"] += 1
            return {"withdrawn": True}

        @api.get("/v1/status")
        async def status() -> dict[str, Any]:
            return self.status

        @api.get("/v1/conversations")
        async def conversations(limit: int = 50) -> dict[str, Any]:
            return {"data": self.conversations[:limit]}

        @api.get("/v1/conversations/{conversation}")
        async def conversation(conversation: str) -> Any:
            if conversation in self.erased:
                return error(404, "there is no such conversation of yours")
            self.kept.add(conversation)
            choices = [{"index": i, "text": TEXTS[i], "finish_reason": "stop"} for i in range(2)]
            question = [{"role": "user", "content": "What are bees?"}]
            return {"conversation_id": conversation, "comparisons": [
                {"comparison_id": "cmp-7", "messages": question, "choices": choices, "vote": None}]}

        @api.delete("/v1/conversations/{conversation}")
        async def erase(conversation: str) -> dict[str, Any]:
            self.erased.append(conversation)
            self.conversations = [row for row in self.conversations if row["conversation_id"] != conversation]
            return {"erased": True}

        @api.get("/v1/adapters")
        async def adapters() -> dict[str, Any]:
            return self.adapters

        @api.post("/v1/adapters/rollback")
        async def rollback() -> dict[str, Any]:
            self.steered.append("rollback")
            return {}

        @api.post("/v1/adapters/{version}/promote")
        async def promote(version: str) -> dict[str, Any]:
            self.steered.append(f"promote {version}")
            self.adapters["live"] = version
            return {}

        @api.get("/v1/learner")
        async def learner() -> dict[str, Any]:
            return {"state": self.status["learner_state"], "progress": self.status["progress"], "round": 3,
                    "votes_pending": 10, "votes_until_next_round": 6, "last_verdict": "passed", "reason": None}

        @api.post("/v1/learner/{action}")
        async def steer(action: str) -> dict[str, Any]:
            self.steered.append(action)
            return {}

        @api.get("/v1/rounds")
        async def rounds() -> dict[str, Any]:
            return {"data": self.rounds}

        @api.get("/v1/stats")
        async def stats() -> dict[str, Any]:
            return {"conversations": 21, "comparisons": 64, "votes": 48, "unheard_of": {"x": 1}}

        return api

    async def _stream(self, body: dict[str, Any]) -> Any:
        number = len(self.asked)
        ids = {"comparison_id": f"cmp-{number}", "conversation_id": "conv-1"}
        words = [self.texts[i % len(self.texts)].split(" ") for i in range(body["n"])]
        sent = 0
        try:
            for step in range(max(map(len, words)) + 1):
                for index, reply in enumerate(words):
                    if step > len(reply):
                        continue
                    delta = {"content": reply[step] + (" " if step + 1 < len(reply) else "")} if step < len(reply) else {}
                    choice = {"index": index, "delta": delta, "finish_reason": None if step < len(reply) else "stop"}
                    yield f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice], 'plaudit': ids})}\n\n"
                    sent += 1
                    if self.break_after is not None and sent >= self.break_after:
                        yield f"data: {json.dumps({'error': {'message': 'The model ran out of memory.'}})}\n\n"
                        return
                await asyncio.sleep(self.pause_s)
            self.kept.add(ids["conversation_id"])  # as the server does: an exchange that did not end is not kept
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cut_off += 1
            raise
