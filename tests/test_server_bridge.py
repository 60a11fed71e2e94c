"""The engine thread and asyncio: deltas, cancellation, failures and an idle thread that costs nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engine.engine import Engine, QueueFull, SamplingParams
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from server.bridge import EngineBridge, EngineFailed, Piece

ENDLESS = SamplingParams(max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def parts(tiny_llama: Path) -> tuple[CausalModel, ChatTokenizer]:
    return CausalModel.load(tiny_llama), ChatTokenizer.load(tiny_llama)


def run(engine: Engine, scenario: Callable[[EngineBridge], Awaitable[None]]) -> None:
    async def main() -> None:
        bridge = EngineBridge(engine)
        bridge.start()
        try:
            async with asyncio.timeout(60):
                await scenario(bridge)
        finally:
            await bridge.stop()
        assert not bridge.alive

    asyncio.run(main())


async def read(bridge: EngineBridge, prompt: list[int], params: list[SamplingParams]) -> list[list[Piece]]:
    stream = await bridge.submit(prompt, params, ["base"] * len(params))
    found: list[list[Piece]] = [[] for _ in params]
    while not stream.finished:
        for piece in await stream.pieces():
            found[piece.index].append(piece)
    for sequence, pieces in zip(stream.sequences, found, strict=True):
        assert "".join(p.text for p in pieces) == sequence.text
        assert [i for p in pieces for i in p.token_ids] == sequence.token_ids
        assert [x for p in pieces for x in p.logprobs] == sequence.logprobs
        assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    return found


def test_pieces_add_up_to_what_the_engine_alone_makes(parts: tuple[CausalModel, ChatTokenizer]) -> None:
    model, tokenizer = parts
    prompt = tokenizer.render([{"role": "user", "content": "Hello!"}])
    params = [SamplingParams(max_tokens=12 + i, seed=i) for i in range(3)]
    alone = [s.token_ids for s in Engine(model, tokenizer).generate([prompt] * 3, params)]

    async def scenario(bridge: EngineBridge) -> None:
        both = await asyncio.gather(read(bridge, prompt, params), read(bridge, prompt, params))
        for found in both:
            assert [[i for p in pieces for i in p.token_ids] for pieces in found] == alone

    run(Engine(model, tokenizer), scenario)


def test_cancelling_frees_the_slots(parts: tuple[CausalModel, ChatTokenizer]) -> None:
    async def scenario(bridge: EngineBridge) -> None:
        stream = await bridge.submit([5, 6], [ENDLESS] * 4, ["base"] * 4)
        await stream.pieces()
        assert bridge.stats.running == 4
        bridge.cancel(stream)
        await bridge.call(lambda engine: None)  # a round trip: the cancellation has been done
        assert bridge.stats.running == 0 and bridge.stats.cancelled == 4

    run(Engine(*parts), scenario)


def test_a_failing_step_fails_the_running_requests_and_no_later_one(
    parts: tuple[CausalModel, ChatTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(*parts)
    step, broken = engine.step, threading.Event()

    def sometimes() -> list:
        if broken.is_set():
            broken.clear()
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(engine, "step", sometimes)

    async def scenario(bridge: EngineBridge) -> None:
        stream = await bridge.submit([5, 6], [ENDLESS], ["base"])
        await stream.pieces()
        broken.set()
        with pytest.raises(EngineFailed):
            while True:
                await stream.pieces()
        assert len(await read(bridge, [5, 6], [SamplingParams(max_tokens=3)])) == 1

    run(engine, scenario)


def test_errors_of_add_and_call_come_back_to_the_caller(parts: tuple[CausalModel, ChatTokenizer]) -> None:
    async def scenario(bridge: EngineBridge) -> None:
        await bridge.submit([5], [ENDLESS] * 3, ["base"] * 3)
        with pytest.raises(QueueFull):
            await bridge.submit([5], [SamplingParams(max_tokens=1)] * 3, ["base"] * 3)
        with pytest.raises(ZeroDivisionError):
            await bridge.call(lambda engine: 1 // 0)

    run(Engine(*parts, max_sequences=3, max_queue=2), scenario)


def test_an_idle_thread_uses_no_processor(parts: tuple[CausalModel, ChatTokenizer]) -> None:
    async def scenario(bridge: EngineBridge) -> None:
        await read(bridge, [5, 6], [SamplingParams(max_tokens=3)])
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.05

    run(Engine(*parts), scenario)


def test_stopping_ends_what_runs(parts: tuple[CausalModel, ChatTokenizer]) -> None:
    async def scenario(bridge: EngineBridge) -> None:
        stream = await bridge.submit([5, 6], [ENDLESS], ["base"])
        await bridge.stop()
        with pytest.raises(EngineFailed):
            while True:
                await stream.pieces()

    run(Engine(*parts), scenario)
