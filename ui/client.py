"""The HTTP API as the pages use it: one async method per call, and every failure as a plain sentence.

Owns the wire format (headers, server-sent events, error bodies). Knows nothing of pages or of how things look.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

JSON = dict[str, Any]


class Problem(Exception):
    """A call failed; `str(problem)` is a sentence for the person, saying what to do next."""

    def __init__(self, sentence: str, status: int | None = None, code: str = "") -> None:
        super().__init__(sentence)
        self.status, self.code = status, code

    @property
    def too_long(self) -> bool:
        """Whether the conversation no longer fits the model."""
        return self.code == "context_length_exceeded"

    @property
    def needs_key(self) -> bool:
        """Whether a (different) key would help."""
        return self.status == 401


@dataclass(frozen=True)
class Visitor:
    """Who a call speaks for: an opaque id kept in the browser, and a key where the server asks for one.

    `host` and `origin` are what the browser sent. They are passed on, so that the server's rule about foreign web
    pages holds for what comes through our pages too.
    """

    voter: str = ""
    key: str = ""
    host: str = ""
    origin: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """Headers to send; characters that no header can carry are left out, and so are empty headers."""
        key = _header(self.key)
        named = {
            "Plaudit-Voter": _header(self.voter)[:128],
            "Authorization": f"Bearer {key}" if key else "",
            "Host": _header(self.host),
            "Origin": _header(self.origin),
        }
        return {name: value for name, value in named.items() if value}


@dataclass(frozen=True)
class Piece:
    """What one streamed chunk adds to one reply. `index` is None when it only carries ids."""

    index: int | None
    text: str = ""
    finish_reason: str | None = None
    comparison_id: str | None = None
    conversation_id: str | None = None


class ApiClient:
    """Calls to one Plaudit server. Connections are pooled, so make one per page and per event loop."""

    def __init__(
        self, api_url: str, *, transport: httpx.AsyncBaseTransport | None = None, timeout_s: float = 20.0
    ) -> None:
        # trust_env=False: the server is usually this very process, and no proxy should see the words
        self._http = httpx.AsyncClient(
            base_url=api_url.rstrip("/"),
            transport=transport,
            trust_env=False,
            timeout=httpx.Timeout(timeout_s, read=180.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
        )

    async def close(self) -> None:
        """Close the pooled connections."""
        await self._http.aclose()

    async def chat(
        self, who: Visitor, messages: list[JSON], n: int, conversation_id: str | None = None
    ) -> AsyncIterator[Piece]:
        """Stream `n` replies to `messages`, piece by piece as they are written. Raises `Problem`."""
        metadata = {"choice": "active"}  # what is shown may be chosen for what a vote on it teaches
        if conversation_id:
            metadata["conversation_id"] = conversation_id
        body: JSON = {"model": "plaudit", "messages": messages, "n": n, "stream": True, "metadata": metadata}
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=who.headers) as answer:
                if answer.is_error:
                    await answer.aread()
                    raise problem_of(answer)
                done = False
                async for line in answer.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        done = True
                        break
                    for piece in pieces(_event(data)):
                        yield piece
                if not done:
                    raise Problem("The answer broke off before it was complete. Please try again.")
        except httpx.HTTPError as error:
            raise _unreachable(error) from error

    async def vote(self, who: Visitor, comparison_id: str, body: JSON) -> JSON:
        """Cast or replace the vote on a comparison; the answer reveals which version wrote each reply."""
        return await self._call("PUT", f"/v1/comparisons/{_part(comparison_id)}/vote", who, body)

    async def withdraw(self, who: Visitor, comparison_id: str) -> JSON:
        """Take the vote back."""
        return await self._call("DELETE", f"/v1/comparisons/{_part(comparison_id)}/vote", who)

    async def status(self, who: Visitor) -> JSON:
        """Live version, votes until the next round, what the learner is doing."""
        return await self._call("GET", "/v1/status", who)

    async def conversations(self, who: Visitor, limit: int = 50) -> list[JSON]:
        """This visitor's conversations, newest first, at most `limit` of them (1 to 1,000)."""
        return _rows(await self._call("GET", f"/v1/conversations?mine=true&limit={limit}", who))

    async def conversation(self, who: Visitor, conversation_id: str) -> JSON:
        """One conversation: its messages, and its comparisons in order."""
        return await self._call("GET", f"/v1/conversations/{_part(conversation_id)}", who)

    async def erase(self, who: Visitor, conversation_id: str) -> JSON:
        """Erase a conversation: its words go, its votes leave the next round."""
        return await self._call("DELETE", f"/v1/conversations/{_part(conversation_id)}", who)

    async def adapters(self, who: Visitor) -> JSON:
        """`{"data": [version rows], "live": ...}`."""
        return await self._call("GET", "/v1/adapters", who)

    async def learner(self, who: Visitor) -> JSON:
        """The learner's state and progress."""
        return await self._call("GET", "/v1/learner", who)

    async def rounds(self, who: Visitor) -> list[JSON]:
        """Every round with its figures."""
        return _rows(await self._call("GET", "/v1/rounds", who))

    async def stats(self, who: Visitor) -> JSON:
        """Counts for the dashboard."""
        return await self._call("GET", "/v1/stats", who)

    async def promote(self, who: Visitor, version: str) -> JSON:
        """Make `version` live."""
        return await self._call("POST", f"/v1/adapters/{_part(version)}/promote", who)

    async def rollback(self, who: Visitor) -> JSON:
        """Make the previous version live again."""
        return await self._call("POST", "/v1/adapters/rollback", who)

    async def steer_learner(self, who: Visitor, action: str) -> JSON:
        """`run`, `pause` or `resume` the learner."""
        return await self._call("POST", f"/v1/learner/{_part(action)}", who)

    async def _call(self, method: str, path: str, who: Visitor, body: JSON | None = None) -> JSON:
        content: JSON = {"json": body or {}} if method in ("POST", "PUT") else {}
        try:
            answer = await self._http.request(method, path, headers=who.headers, **content)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        if answer.is_error:
            raise problem_of(answer)
        if not answer.content:
            return {}
        try:
            found = answer.json()
        except ValueError:
            raise Problem("The server's answer could not be read. Is this address really Plaudit?") from None
        return found if isinstance(found, dict) else {"data": found}


def pieces(chunk: JSON) -> list[Piece]:
    """The pieces of one chat completion chunk. Raises `Problem` when the chunk is an error."""
    if "error" in chunk:
        said = _sentence(_said(chunk)) or "The answer broke off before it was complete. Please try again."
        raise Problem(said, code=_said(chunk, "code"))
    ids = chunk.get("plaudit") or {}
    comparison, conversation = ids.get("comparison_id"), ids.get("conversation_id")
    found = [
        Piece(
            int(choice.get("index", 0)),
            (choice.get("delta") or {}).get("content") or "",
            choice.get("finish_reason"),
            comparison,
            conversation,
        )
        for choice in chunk.get("choices") or []
    ]
    return found or [Piece(None, "", None, comparison, conversation)]


def problem_of(answer: httpx.Response) -> Problem:
    """The plain sentence for an error response."""
    status = answer.status_code
    try:
        body = answer.json()
    except ValueError:
        body = None
    said, code = _said(body), _said(body, "code")
    if code == "context_length_exceeded":
        sentence = "This conversation has become too long for this model."
    elif status == 401 and "authorization" in answer.request.headers:
        sentence = "This key is not known to the server. Please check it, or ask the person who runs it for another."
    elif status == 401:
        sentence = "This server needs a key. Ask the person who runs it, and paste the key here."
    elif status == 403:
        sentence = _sentence(said) or "You are not allowed to do this; it takes an operator's key."
    elif status == 404:
        sentence = "That is not there any more, or it is not yours."
    elif status == 413:
        sentence = "That is too long to send. Please shorten it."
    elif status == 429:
        wait = answer.headers.get("Retry-After", "")
        when = f"in {wait} second{'' if wait == '1' else 's'}" if wait.isdigit() else "in a moment"
        sentence = f"The assistant is busy right now. Please try again {when}."
    elif status == 503 and said and code != "draining":  # a reply broke down, or the database could not answer
        sentence = _sentence(said)
    elif status == 503:
        sentence = "The server is starting or stopping. Please try again in a moment."
    elif status == 504:
        sentence = "The answer took too long and was given up. Please try again, perhaps with a shorter message."
    elif status == 507:
        sentence = "The server's disk is full, so nothing can be saved. Please tell the person who runs it."
    elif status < 500 and said:
        sentence = _sentence(said)
    else:
        sentence = f"Something went wrong on the server (status {status}). Please try again."
    return Problem(sentence, status, code)


def _said(body: Any, name: str = "message") -> str:
    error = body.get("error") if isinstance(body, dict) else None
    found = error.get(name) if isinstance(error, dict) else None
    return found.strip() if isinstance(found, str) else ""


def _sentence(said: str) -> str:
    return said and said[0].upper() + said[1:] + ("" if said[-1] in ".!?" else ".")


def _header(value: str) -> str:
    return "".join(c for c in value if c.isascii() and c.isprintable()).strip()


def _event(data: str) -> JSON:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Problem("The server's answer could not be read. Please try again.")
    return found


def _rows(body: JSON) -> list[JSON]:
    return [row for row in body.get("data") or [] if isinstance(row, dict)]


def _part(text: str) -> str:
    return quote(str(text), safe="@")


def _unreachable(error: httpx.HTTPError) -> Problem:
    if isinstance(error, httpx.TimeoutException):
        return Problem("The server took too long to answer. Please try again.")
    return Problem("The server cannot be reached. Is it still running? Please try again in a moment.")
