"""The engine thread: one thread owns the Engine; asyncio hands it work and gets text back.

What a decode step added for all requests crosses to the event loop in one call. Without work the thread blocks on
a condition and costs nothing. An exception in the engine fails only the requests concerned, and is logged without
any text. Knows nothing of HTTP or versions' meaning.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from engine.engine import Engine, SamplingParams, Sequence
from engine.lora import Adapter

log = structlog.get_logger("plaudit")
T = TypeVar("T")


class EngineFailed(Exception):
    """The engine could not go on with these sequences; the request may be tried again."""


@dataclass(frozen=True)
class Piece:
    """What one step added to one of a request's sequences."""

    index: int  # which of the request's sequences
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # nats, one per token id
    finish_reason: str | None  # set in a sequence's last piece


class Stream:
    """One request's sequences, seen from the event loop. `sequences` may be read once they are finished."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.sequences: list[Sequence] = []
        self._loop = loop
        self._pieces: list[Piece] = []
        self._error: Exception | None = None
        self._wake = asyncio.Event()
        self._open = 0
        self._seen: list[int] = []  # tokens handed over so far; the engine thread's

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended and all its pieces were read."""
        return self._open == 0 and not self._pieces

    async def pieces(self) -> list[Piece]:
        """What was added since the last call; waits for something. Empty at the end. Raises `EngineFailed`."""
        while True:
            if self._error is not None:
                raise self._error
            if self._pieces or self._open == 0:
                break
            self._wake.clear()
            await self._wake.wait()
        pieces, self._pieces = self._pieces, []
        return pieces

    def _take(self, pieces: list[Piece], error: Exception | None = None) -> None:
        self._pieces += pieces
        self._open -= sum(piece.finish_reason is not None for piece in pieces)
        self._error = error or self._error
        self._wake.set()


class EngineBridge:
    """Starts and owns the engine thread. All public methods are called on the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._condition = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._stopping = False
        self._streams: dict[int, tuple[Stream, int]] = {}  # id(sequence) -> its stream and index; the thread's
        self.step_s = 0.0  # what the last decode step took, in seconds; the thread's
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def stats(self) -> Any:
        """The engine's counters; plain numbers, safe to read from here."""
        return self._engine.stats

    def read_adapter(self, path: Path) -> Adapter:
        """A PEFT directory, ready for `Engine.load_version`; no step waits for it. Blocks: to be run off the event loop. Raises AdapterError."""
        return self._engine.model.lora.read(path)

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; called on the event loop that will use the bridge."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Cancel everything and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run `function` on the engine thread between two steps, and return or raise what it does."""
        assert self._loop is not None
        done: asyncio.Future[T] = self._loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

        def command() -> None:
            try:
                result, error = function(self._engine), None
            except Exception as raised:
                result, error = None, raised
            self._to_loop(settle, result, error)

        self._post(command)
        return await done

    async def submit(
        self, prompt_ids: list[int], params: list[SamplingParams], versions: list[str], owner: str = ""
    ) -> Stream:
        """Admit one request of `len(params)` sequences. Raises what `Engine.add` does: QueueFull, PromptTooLong ..."""
        assert self._loop is not None
        stream = Stream(self._loop)

        def add(engine: Engine) -> None:
            sequences = engine.add(prompt_ids, params, versions, owner)
            stream.sequences, stream._open, stream._seen = sequences, len(sequences), [0] * len(sequences)
            for index, sequence in enumerate(sequences):
                self._streams[id(sequence)] = (stream, index)

        try:
            await self.call(add)
        except asyncio.CancelledError:
            self.cancel(stream)
            raise
        return stream

    def cancel(self, stream: Stream) -> None:
        """Give the request's slots back before the next step. Harmless when it has ended."""

        def command() -> None:
            running = [s for s in stream.sequences if id(s) in self._streams]
            if running:
                self._engine.cancel(running)
            for sequence in running:
                del self._streams[id(sequence)]

        self._post(command)

    def _post(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def _to_loop(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop was closed under us: nobody is left to be told
            log.warning("event_loop_gone")

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._commands and not self._stopping and not self._engine.has_work():
                    self._condition.wait()
                commands, self._commands = self._commands, []
                stopping = self._stopping
            for command in commands:
                command()
            if stopping:
                self._fail_all(EngineFailed("the server is shutting down"))
                return
            if self._engine.has_work():
                self._step()

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            deltas = self._engine.step()
        except Exception as error:
            log.error("engine_step_failed", kind=type(error).__name__, running=len(self._streams))
            self._fail_all(EngineFailed("the engine failed on this batch; try again"))
            return
        self.step_s = time.perf_counter() - began
        added: dict[int, tuple[Stream, list[Piece]]] = {}
        for delta in deltas:
            sequence = delta.sequence
            entry = self._streams.get(id(sequence))
            if entry is None:  # cancelled meanwhile
                continue
            stream, index = entry
            begin = stream._seen[index]
            stream._seen[index] = len(sequence.token_ids)
            reason = sequence.finish_reason if delta.finished else None
            piece = Piece(index, delta.text, tuple(sequence.token_ids[begin:]), tuple(sequence.logprobs[begin:]), reason)
            added.setdefault(id(stream), (stream, []))[1].append(piece)
            if delta.finished:
                del self._streams[id(sequence)]
        if added:
            self._to_loop(_deliver, list(added.values()))

    def _fail_all(self, error: Exception) -> None:
        """Fail every running request; a broken step cannot be blamed on one of them."""
        streams = {id(stream): stream for stream, _ in self._streams.values()}
        sequences = [s for stream in streams.values() for s in stream.sequences if id(s) in self._streams]
        self._streams.clear()
        try:
            self._engine.cancel(sequences)
        except Exception as failed:
            log.error("engine_cancel_failed", kind=type(failed).__name__)
        for stream in streams.values():
            self._to_loop(stream._take, [], error)


def _deliver(batch: list[tuple[Stream, list[Piece]]]) -> None:
    for stream, pieces in batch:
        stream._take(pieces)
