"""`POST /v1/chat/completions`: from a request to K streamed replies and a durable comparison.

Owns one request's life: admission, streaming, deadline, disconnect, recording. Which version writes which reply is
`deployment.py`'s choice; how tokens come about is `engine/`'s.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from engine.engine import PromptTooLong, QueueFull, SamplingParams, Sequence, UnknownVersion
from engine.source import Sampling
from server.access import User, runtime_of
from server.auth import Identity
from server.bridge import EngineFailed, Piece, Stream
from server.candidates import Plan
from server.deployment import Slots, UnknownModel
from server.errors import ApiError, as_api_error, error_body
from server.runtime import Runtime
from server.schema import ChatRequest
from store.records import Completion, NewComparison

log = structlog.get_logger("plaudit")
router = APIRouter()
GOLDEN = 0x9E3779B97F4A7C15  # spreads one request's seed over its replies


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request, who: User) -> Response:
    """Sample n replies to a conversation."""
    runtime = runtime_of(request)
    runtime.quota.spend("chat", who.voter)
    chat = await Chat.admit(runtime, body, who)
    try:
        first = await chat.next_pieces(request)  # so that a deadline in the queue is still a 504, not a broken stream
    except BaseException:
        chat.close()
        raise
    if body.stream:
        return EventStream(chat.events(first), chat.deadline, chat.close)
    try:
        return await _unless_gone(request, chat.collect())
    finally:
        chat.close()


class Chat:
    """One admitted request."""

    def __init__(
        self, runtime: Runtime, body: ChatRequest, who: Identity, slots: Slots, prompt_ids: list[int], plan: Plan, conversation_id: str
    ) -> None:  # fmt: skip
        self.runtime, self.body, self.who, self.slots, self.prompt_ids = runtime, body, who, slots, prompt_ids
        self.n, self.plan = body.n or 1, plan
        self.shown = tuple(range(self.n))  # which of the sequences, in the order shown
        self.messages = [message.plain() for message in body.messages]
        self.created = time.time()
        self.deadline = asyncio.get_running_loop().time() + runtime.settings.request_timeout_s
        self.comparison_id = "cmp_" + secrets.token_hex(12)
        self.conversation_id = conversation_id
        # Blind until the vote: a name would say which reply is whose.
        self.model = f"plaudit@{slots.versions[0]}" if self.n == 1 else "plaudit"
        own = runtime.sampling
        self.sampling = Sampling(
            own.temperature if body.temperature is None else body.temperature,
            own.top_p if body.top_p is None else body.top_p,
        )
        self.seeds = [(slots.seed + i * GOLDEN) % 2**63 for i in range(plan.sampled)]
        self.stream: Stream
        self._closed = False
        self._waited = False

    @classmethod
    async def admit(cls, runtime: Runtime, body: ChatRequest, who: Identity) -> Chat:
        """Check what only the server can know, and queue the replies. Raises ApiError."""
        conversation_id = (body.metadata or {}).get("conversation_id") or "conv_" + secrets.token_hex(12)
        runtime.erasures.chat_begins(conversation_id)
        try:
            return await cls._admit(runtime, body, who, conversation_id)
        except BaseException:
            runtime.erasures.chat_over(conversation_id)
            raise

    @classmethod
    async def _admit(cls, runtime: Runtime, body: ChatRequest, who: Identity, conversation_id: str) -> Chat:
        """`admit`, of a conversation whose erasure is looked out for."""
        if runtime.draining:
            raise ApiError(503, "the server is shutting down", code="draining", retry_after_s=5)
        await _own_conversation(runtime, body, who)
        limit = runtime.settings.max_tokens
        if body.length_limit is not None and body.length_limit > limit:
            raise ApiError(400, f"max_tokens is at most {limit} here", param="max_tokens")
        try:
            prompt_ids = await asyncio.to_thread(runtime.tokenizer.render, [m.plain() for m in body.messages])
        except ValueError as refused:
            raise ApiError(400, str(refused), param="messages") from refused
        if not prompt_ids:
            raise ApiError(400, "the model's chat template makes nothing of this conversation: add a message of the user's", param="messages")
        room = runtime.max_context - len(prompt_ids)
        if room < 1:
            raise ApiError(400, f"the conversation has {len(prompt_ids)} tokens; this model takes {runtime.max_context}, "
                           "the reply included. Shorten it", param="messages", code="context_length_exceeded")
        seed = body.seed if body.seed is not None else runtime.draw_seed()
        try:
            plan = await runtime.candidates.plan(body.lets_choose, body.n or 1, seed)
            slots = await runtime.deployment.take(body.model, plan.sampled, seed, mix=plan.heads is None)
        except UnknownModel as unknown:
            raise ApiError(404, str(unknown), param="model", code="model_not_found") from unknown
        chat = cls(runtime, body, who, slots, prompt_ids, plan, conversation_id)
        params = [
            SamplingParams(
                temperature=chat.sampling.temperature,
                top_p=chat.sampling.top_p,
                max_tokens=min(body.length_limit or limit, room),
                stop=body.stops,
                seed=s,
            )
            for s in chat.seeds
        ]
        try:
            chat.stream = await runtime.bridge.submit(prompt_ids, params, list(slots.versions), who.voter)
        except BaseException as refused:
            runtime.deployment.give_back(slots)
            if isinstance(refused, QueueFull):
                raise ApiError(429, "the queue is full; try again", code="queue_full", retry_after_s=1) from refused
            if isinstance(refused, PromptTooLong):
                raise ApiError(400, str(refused), param="messages", code="context_length_exceeded") from refused
            if isinstance(refused, UnknownVersion):
                raise ApiError(503, "that version was just unloaded; try again", retry_after_s=1) from refused
            raise
        runtime.running_chats += 1
        return chat

    def close(self) -> None:
        """Free the slots and the versions; called once or more, always."""
        if self._closed:
            return
        self._closed = True
        self.runtime.running_chats -= 1
        if not self.stream.finished:
            self.runtime.metrics.cancelled.inc()
        self.runtime.bridge.cancel(self.stream)
        self.runtime.deployment.give_back(self.slots)
        self.runtime.erasures.chat_over(self.conversation_id)

    async def pieces(self) -> list[Piece]:
        """What the last steps added. Raises 504 at the deadline, 503 when the engine failed."""
        try:
            async with asyncio.timeout_at(self.deadline):
                pieces = await self.stream.pieces()
        except TimeoutError:
            seconds = self.runtime.settings.request_timeout_s
            raise ApiError(504, f"no complete reply within {seconds:g} s; ask for fewer tokens, or try again") from None
        except EngineFailed as failed:
            raise ApiError(503, str(failed), code="engine_failed", retry_after_s=1) from failed
        broken = [self.slots.versions[piece.index] for piece in pieces if piece.finish_reason == "cancelled"]
        if broken:  # not by us: the engine met NaN or infinity in this version's arithmetic
            log.error("reply_broke_down", version=broken[0])
            raise ApiError(503, "a reply broke down in the model's arithmetic; try again", code="engine_failed", retry_after_s=1)
        if self.plan.heads is None:
            self.note_first_text(bool(pieces))
        return pieces

    def note_first_text(self, some: bool = True) -> None:
        """Observe, once, how long the first text took."""
        if some and not self._waited:
            self._waited = True
            self.runtime.metrics.first_token.observe(time.time() - self.created)

    async def next_pieces(self, request: Request) -> list[Piece]:
        """The first pieces; raises ClientGone when nobody waits for them any more."""
        return await _unless_gone(request, self.pieces())

    @property
    def sequences(self) -> list[Sequence]:
        """The replies that are shown, in order."""
        return [self.stream.sequences[i] for i in self.shown]

    async def choose(self) -> None:
        """Where there are more finished replies than are shown, choose; leave it to chance when that cannot be done in time."""
        if self.plan.heads is None:
            return
        replies = [sequence.token_ids for sequence in self.stream.sequences]
        try:
            async with asyncio.timeout_at(self.deadline):
                chosen = self.runtime.candidates.choose(self.plan.heads, self.prompt_ids, replies, self.n, self.slots.seed)
                self.shown = await chosen
        except (TimeoutError, ValueError, RuntimeError) as why:  # the first n are as random as any
            log.warning("candidates_not_chosen", reason=type(why).__name__)
            self.plan = replace(self.plan, note={"drawn": "random", "because": "failed"})
        self.note_first_text()

    async def shown_pieces(self, first: list[Piece]) -> AsyncIterator[list[Piece]]:
        """What is added to the replies shown: step by step, or whole where they are chosen among more."""
        if self.plan.heads is None:
            yield first
            while not self.stream.finished:
                yield await self.pieces()
            return
        await self.wait()
        yield [
            Piece(index, s.text, tuple(s.token_ids), tuple(s.logprobs), s.finish_reason) for index, s in enumerate(self.sequences)
        ]

    async def wait(self) -> None:
        """Until every reply is finished, and those to show are chosen."""
        while not self.stream.finished:
            await self.pieces()
        await self.choose()

    async def collect(self) -> Response:
        """The whole answer at once."""
        await self.wait()
        await self.record()
        choices = []
        for index, sequence in enumerate(self.sequences):
            message = {"role": "assistant", "content": sequence.text, "refusal": None}
            logprobs = self.logprobs(sequence.token_ids, sequence.logprobs) if self.body.logprobs else None
            choices.append({"index": index, "message": message, "logprobs": logprobs,
                            "finish_reason": sequence.finish_reason})
        return JSONResponse({**self.envelope("chat.completion"), "choices": choices, "usage": self.usage()})

    async def events(self, first: list[Piece]) -> AsyncIterator[bytes]:
        """Server-sent events: one chunk per reply and step. The last finish reason is sent once all is durable."""
        usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        extra: dict[str, Any] = {"usage": None} if usage else {}
        envelope = {**self.envelope("chat.completion.chunk"), **extra}

        def chunk(index: int, delta: dict[str, str], logprobs: Any = None, reason: str | None = None) -> bytes:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return _event({**envelope, "choices": [choice]})

        yield b"".join(chunk(i, {"role": "assistant", "content": ""}) for i in range(self.n))
        unfinished = self.n
        try:
            async for pieces in self.shown_pieces(first):
                out = []
                for piece in pieces:
                    logprobs = self.logprobs(piece.token_ids, piece.logprobs) if self.body.logprobs else None
                    if piece.text or (logprobs and logprobs["content"]):
                        out.append(chunk(piece.index, {"content": piece.text}, logprobs))
                    if piece.finish_reason is not None:
                        unfinished -= 1
                        if unfinished == 0:
                            if out:
                                yield b"".join(out)
                            await self.record()
                            out = []
                        out.append(chunk(piece.index, {}, None, piece.finish_reason))
                if unfinished == 0:
                    if usage:
                        out.append(_event({**envelope, "choices": [], "usage": self.usage()}))
                    yield b"".join([*out, b"data: [DONE]\n\n"])
                    return
                if out:
                    yield b"".join(out)
        except Exception as error:
            shown = as_api_error(error)
            self.runtime.metrics.broken_streams.labels(shown.code).inc()
            log.warning("stream_broke_off", status=shown.status_code, code=shown.code)
            yield _event(error_body(shown.status_code, str(shown.detail), shown.param, shown.code))

    async def record(self) -> None:
        """Make the comparison durable."""
        completions = tuple(
            Completion(i, s.text, tuple(s.token_ids), tuple(s.logprobs), s.version, s.finish_reason or "cancelled", self.seeds[which])
            for i, (s, which) in enumerate(zip(self.sequences, self.shown, strict=True))
        )
        settings = {
            "model": self.body.model, "n": self.n, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p,
            "max_tokens": self.body.length_limit, "stop": list(self.body.stops), "seed": self.slots.seed,
            "mixed": self.slots.mixed, "prompt_tokens": len(self.prompt_ids), "choice": self.choice_note(),
        }
        settings = {name: value for name, value in settings.items() if value not in (None, [])}
        new = NewComparison(
            id=self.comparison_id, conversation_id=self.conversation_id, voter=self.who.voter,
            messages=tuple(self.messages), settings=settings, completions=completions,
            continues="conversation_id" in (self.body.metadata or {}),
        )
        await self.runtime.db(self.runtime.store.record_comparison, new)
        metrics = self.runtime.metrics
        metrics.prompt_tokens.inc(len(self.prompt_ids))
        for completion in completions:
            metrics.tokens.inc(len(completion.token_ids))
            metrics.replies.labels(completion.version, completion.finish_reason).inc()

    def choice_note(self) -> dict[str, Any] | None:
        """How the replies came to be shown; of those that were not, only the seeds are kept."""
        if self.plan.note is None or len(self.seeds) == self.n:
            return self.plan.note
        return {**self.plan.note, "seeds": self.seeds, "shown": list(self.shown)}

    def envelope(self, kind: str) -> dict[str, Any]:
        """The fields every answer and every chunk shares."""
        return {
            "id": "chatcmpl-" + self.comparison_id, "object": kind, "created": int(self.created), "model": self.model,
            "plaudit": {"comparison_id": self.comparison_id, "conversation_id": self.conversation_id},
        }

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt (once) and of all replies shown."""
        completion = sum(len(s.token_ids) for s in self.sequences)
        return {"prompt_tokens": len(self.prompt_ids), "completion_tokens": completion,
                "total_tokens": len(self.prompt_ids) + completion}

    def logprobs(self, token_ids: Any, values: Any) -> dict[str, Any]:
        """OpenAI's shape; special tokens show as empty text."""
        content = []
        for token_id, value in zip(token_ids, values, strict=True):
            token = self.runtime.tokenizer.decode([token_id])
            whole = "\N{REPLACEMENT CHARACTER}" not in token  # part of a character: its bytes are not known from here
            content.append({"token": token, "logprob": value, "bytes": list(token.encode()) if whole else None,
                            "top_logprobs": []})
        return {"content": content, "refusal": None}


class EventStream(Response):
    """Sends server-sent events until they end, the client leaves, or it stops reading past the deadline."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], deadline: float, on_end: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._deadline, self._on_end = events, deadline, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            left_s = self._deadline + 5 - asyncio.get_running_loop().time()  # the events end themselves before that
            await asyncio.wait({pump, gone}, timeout=max(left_s, 0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            pump.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await pump
            self._on_end()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientGone(ApiError):
    """The client left; the answer is written for the log alone."""

    def __init__(self) -> None:
        super().__init__(499, "the client left")


def _event(data: dict[str, Any]) -> bytes:
    """One server-sent event, in ASCII: many clients split text at U+0085 and U+2028 too, which a reply may hold."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, or ClientGone as soon as the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for waiting in (task, gone):
            waiting.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _own_conversation(runtime: Runtime, body: ChatRequest, who: Identity) -> None:
    """Raise 404 when the request continues a conversation that is not there or not theirs."""
    conversation_id = (body.metadata or {}).get("conversation_id")
    if conversation_id is None:
        return
    if await runtime.db(runtime.store.owner, conversation_id) != who.voter:
        raise ApiError(404, "there is no such conversation of yours", param="metadata.conversation_id")
