"""The pages' parts: safe rendering, plain sentences, the conversation's state, and the client against a tiny API."""

from __future__ import annotations

import asyncio
import copy
import re
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.ui_fake import TEXTS, Fake, error
from ui import cards, figures, operator, sentences
from ui.client import ApiClient, Problem, Visitor
from ui.exchange import Chat, Reply, ballot
from ui.handlers import ChatHandlers
from ui.pace import paced
from ui.render import markdown, plain

WHO = Visitor("voter-1")
ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)><script>alert(1)</script></svg>",
    "<iframe src='https://evil.example'></iframe>",
    "<style>body{display:none}</style>",
    "<a href='javascript:alert(1)'>x</a>",
    "<div onclick=alert(1) style='position:fixed;inset:0'>x</div>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "[x](vbscript:msgbox(1))",
    "[x](file:///etc/passwd)",
    "[x](//evil.example/x)",
    "[x](/operator)",
    "<javascript:alert(1)>",
    "![x](https://evil.example/pixel.png)",
    "![x](data:image/svg+xml;base64,PHN2Zy8+)",
    "[![x](https://evil.example/pixel.png)](https://evil.example)",
    "![<img src=y onerror=alert(1)>](https://evil.example/p.png \"' onload='alert(1)\")",
    "[x](https://evil.example/\"onmouseover=alert(1))",
    "[x](https://evil.example 'title\" onclick=\"alert(1)')",
    "[ref]\n\n[ref]: javascript:alert(1)",
    "```html\n<script>alert(1)</script>\n```",
    "`<img src=x onerror=alert(1)>`",
    "```\"onload=alert(1)\nx\n```",
    "| a |\n|---|\n| <img src=x onerror=alert(1)> |",
    "<!--><script>alert(1)</script>-->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<form action=https://evil.example><button>x</button></form>",
    "<base href=https://evil.example>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "{{constructor.constructor('alert(1)')()}} ${alert(1)} `${alert(1)}`",
    "<details open ontoggle=alert(1)>",
    "\u202e\u2066<script>",
    "[https://[your-server]/admin](https://example.com) <http://[abc> [x](http://[bad/y)",
    "<scr\x00ipt>alert(1)</scr\x00ipt>",
]
TAGS = frozenset(re.findall(r"\w+", "p br strong em s code pre ul ol li blockquote hr a span h3 h4 h5 h6 table thead tbody tr th td"))
ATTRIBUTES = {"a": {"href", "rel", "target"}, "span": {"class"}, "code": {"class"}, "ol": {"start"}, "th": {"style"}, "td": {"style"}}


class Inspector(HTMLParser):
    """Lists every tag and attribute a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_a_model_writes_becomes_active_html(attack: str) -> None:
    for text in (attack, f"Before {attack} after", f"> {attack}", f"- {attack}\n- b"):
        for tag, attributes in Inspector(markdown(text)).found:
            assert tag in TAGS, (tag, text)
            assert set(attributes) <= ATTRIBUTES.get(tag, set()), (tag, attributes)
            if tag == "a":
                assert re.match(r"https?://", attributes["href"] or ""), attributes
                assert attributes["rel"] == "noopener noreferrer nofollow"
            if "style" in attributes:
                assert re.fullmatch(r"text-align:(left|right|center)", attributes["style"] or ""), attributes


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_a_person_writes_becomes_html(attack: str) -> None:
    assert Inspector(f'<p title="{plain(attack)}">{plain(attack)}</p>').found[1:] == []


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_card_shows_only_the_tags_of_our_own_templates(attack: str) -> None:
    harmless = Chat(phase="voted", message="x", replies=[Reply("x", "stop", "v1")] * 2, comparison_id="c", choice=0)
    hostile = Chat(phase="voted", message=attack, replies=[Reply(attack, "stop", attack)] * 2, comparison_id="c", choice=0, problem=attack)
    allowed = {tag for tag, _ in Inspector(cards.exchange(harmless)).found}
    for tag, attributes in Inspector(cards.exchange(hostile)).found:
        assert tag in allowed | TAGS
        assert not any(name.startswith("on") or name in ("src", "srcdoc", "style") for name in attributes if tag not in ("th", "td"))


def test_markdown_that_people_expect_is_shown() -> None:
    html = markdown("# Title\n\n**bold** and *it*\n\n1. one\n2. two\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n`x < y`")
    for part in ("<h3>Title</h3>", "<strong>bold</strong>", "<ol>", "<li>one</li>", "<td>1</td>", "<code>x &lt; y</code>"):
        assert part in html


@pytest.mark.parametrize("text", ["look", "https://accounts.google.com@evil.example/"])
def test_a_name_before_an_at_does_not_pass_for_the_host(text: str) -> None:
    shown = markdown(f"[{text}](https://accounts.google.com@evil.example/)")
    assert "(evil.example)" in shown


def test_a_link_says_where_it_leads() -> None:
    html = markdown("[your bank](https://evil.example/login) and [https://good.example/a](https://good.example/a)")
    assert 'your bank</a> <span class="link-host">(evil.example)</span>' in html
    assert "good.example)" not in html
    assert "(evil.example)" in markdown("[https://bank.example](https://evil.example)"), "a link that lies about its host"


def test_an_image_is_its_description() -> None:
    assert markdown("![a **cat**](https://x.example/c.png)") == '<p><span class="no-image">[image: a cat]</span></p>\n'


def test_our_templates_never_hand_text_to_gradios_own_template_language() -> None:
    """gr.HTML compiles its html_template with Handlebars and evaluates it: values must only come in through ${value}."""
    from ui.chat import build_chat
    from ui.operator import build_operator

    async def pages() -> list:
        return [build("http://api.example") for build in (build_chat, build_operator)]

    for page in asyncio.run(pages()):
        found = [b["props"] for b in page.get_config_file()["components"] if b["type"] == "html"]
        assert found
        assert {props["html_template"] for props in found} == {"${value}"}


# --- pace


def test_updates_are_coalesced_and_nothing_is_lost() -> None:
    async def many() -> AsyncIterator[int]:
        for i in range(400):
            yield i
            await asyncio.sleep(0.001)

    async def collect() -> tuple[list[int], int, float]:
        started, items, batches = time.monotonic(), [], 0
        async for batch in paced(many()):
            items += batch
            batches += 1
        return items, batches, time.monotonic() - started

    items, batches, seconds = asyncio.run(collect())
    assert items == list(range(400))
    assert batches <= 20 * seconds + 1


def test_an_error_of_the_source_comes_after_what_it_gave() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise Problem("broken")

    async def collect() -> list[int]:
        seen: list[int] = []
        with pytest.raises(Problem, match="broken"):
            async for batch in paced(broken()):
                seen += batch
        return seen

    assert asyncio.run(collect()) == [1]


def test_leaving_early_closes_the_source() -> None:
    closed = []

    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(0.001)
        finally:
            closed.append(True)

    async def leave() -> None:
        batches = paced(endless())
        await anext(batches)
        await batches.aclose()

    asyncio.run(leave())
    assert closed == [True]


def test_a_link_whose_text_is_no_address_says_where_it_leads() -> None:
    assert "(example.com)" in markdown("[https://[your-server]/admin](https://example.com)")


# --- what the page does


async def said(page: ChatHandlers, chat: Chat, text: str) -> list:
    return [update async for update in page.converse(text, 2, chat, WHO)]


def test_what_was_stopped_is_in_no_conversation_and_can_be_tried_again() -> None:
    async def run() -> None:
        fake = Fake()
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        async for _ in page.converse("Hi", 2, chat, WHO):
            if chat.replies and chat.replies[0].text:
                page.stop(chat)
        assert (chat.phase, chat.conversation_id) == ("stopped", None)
        await said(page, chat, "Hi")
        assert (chat.phase, chat.conversation_id, chat.problem) == ("choosing", "conv-1", "")
        await said(page, chat, "And?")
        assert chat.phase == "choosing" and fake.asked[-1]["metadata"]["conversation_id"] == "conv-1"

    asyncio.run(run())


@pytest.mark.parametrize("undo", [False, True])
def test_a_vote_that_takes_long_leaves_the_next_exchange_alone(undo: bool) -> None:
    async def run() -> None:
        fake = Fake()
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        await said(page, chat, "Hi")
        if undo:
            await page.cast(chat, WHO, 1, None)
        fake.vote_s = 0.2
        vote = asyncio.create_task(page.undo(chat, WHO) if undo else page.cast(chat, WHO, 1, None))
        await asyncio.sleep(0.05)
        fake.pause_s = 0.05
        await said(page, chat, "And?")
        assert await vote == (gr.skip(),) * 6
        assert chat.phase == "choosing" and chat.choice is None and not any(reply.version for reply in chat.replies)
        assert [reply.text for reply in chat.replies] == list(TEXTS[:2]) and chat.turns[0].reply == TEXTS[1]
        assert len(fake.withdrawn if undo else fake.votes) == 1

    asyncio.run(run())


def test_a_vote_that_takes_long_does_not_bring_back_a_conversation_that_was_left() -> None:
    async def run() -> None:
        fake = Fake()
        fake.vote_s = 0.2
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        await said(page, chat, "Hi")
        vote = asyncio.create_task(page.cast(chat, WHO, 1, None))
        await asyncio.sleep(0.05)
        request: Any = SimpleNamespace(headers={})
        fresh = (await page.restart(chat, {}, request))[-1]
        assert await vote == (gr.skip(),) * 6 and fresh.phase == "empty"

    asyncio.run(run())


def test_a_page_that_is_slow_to_open_leaves_what_was_begun_meanwhile() -> None:
    async def run() -> None:
        page, chat = ChatHandlers(client_of(Fake().app())), Chat()
        await said(page, chat, "Hi")
        shown = await page.opened(None, chat, cast(Any, SimpleNamespace(headers={})))
        assert len(shown) == 5 and not any(isinstance(part, Chat) for part in shown)
        assert (chat.phase, chat.comparison_id, chat.live_when_opened) == ("choosing", "cmp-1", "v000001")

    asyncio.run(run())


def test_a_message_that_is_too_long_by_itself_is_said_to_be_and_costs_no_memory_of_what_went_before() -> None:
    async def run() -> None:
        fake = Fake()
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        fake.fail = error(400, "too many tokens", code="context_length_exceeded")
        await said(page, chat, "moon " * 9)
        assert chat.problem == "This message is too long for this model. Please shorten it." and not chat.too_long
        fake.fail = None
        await said(page, chat, "Hi")
        fake.fail = error(400, "too many tokens", code="context_length_exceeded")
        await said(page, chat, "bees " * 9)
        assert "conversation" in chat.problem and chat.too_long and chat.unseen == 0
        async for _ in page.asked("", 2, chat, {}, at(), event(act="shorter")):
            pass
        assert "message is too long" in chat.problem and chat.unseen == 0
        fake.fail = None
        await said(page, chat, "Once more")
        await said(page, chat, "And more")
        fake.fail = error(400, "too many tokens", code="context_length_exceeded")
        await said(page, chat, "bees " * 9)
        updates = [update async for update in page.asked("", 2, chat, {}, at(), event(act="shorter"))]
        threads = [update[1] for update in updates if update[1] != gr.skip()]
        assert "no longer sees" in threads[0] and "no longer sees" not in threads[-1], "it stays true what the page says is seen"
        fake.fail = None
        await said(page, chat, "And?")
        assert [m["content"] for m in fake.asked[-1]["messages"]][:2] == ["Hi", TEXTS[0]]

    asyncio.run(run())


def test_a_page_that_is_loaded_anew_goes_on_with_its_conversation() -> None:
    async def run() -> None:
        fake = Fake()
        page, who = ChatHandlers(client_of(fake.app())), {"voter": "ann"}
        new = Chat()
        *shown, chat = await page.came_back("conv-9", new, who, at())
        assert (chat.conversation_id, chat.phase, chat.speaker()) == ("conv-9", "choosing", new.speaker()) and "What are bees?" in shown[1]
        begun = Chat()
        await said(page, begun, "Hi")
        assert await page.came_back("conv-9", begun, who, at()) == (*(gr.skip(),) * 6, begun)
        class Slow(ApiClient):
            async def conversations(self, who: Visitor, limit: int = 50) -> list[dict[str, Any]]:
                late.begin("Hi", 2)  # somebody writes while the list is asked for
                return await super().conversations(who, limit)

        late, slow = Chat(), ChatHandlers(client_of(fake.app(), Slow))
        assert await slow.came_back("conv-9", late, who, at()) == (*(gr.skip(),) * 6, late) and late.phase == "streaming"
        fake.erased.append("conv-9")
        fresh = Chat()
        for before in ("conv-9", ""):
            assert await page.came_back(before, fresh, who, at()) == (*(gr.skip(),) * 6, fresh)

    asyncio.run(run())


def test_a_conversation_that_was_erased_in_another_window_says_so() -> None:
    async def run() -> None:
        fake = Fake()
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        await said(page, chat, "Hi")
        fake.kept.clear()
        await said(page, chat, "And?")
        assert chat.phase == "failed" and "start a new one" in chat.problem

    asyncio.run(run())


def test_older_conversations_are_listed_when_asked_for() -> None:
    async def run() -> None:
        fake = Fake()
        fake.conversations = [{"conversation_id": f"conv-{i}", "title": "x", "updated": 1.0} for i in range(160)]
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        shown = [await page.listed(WHO, chat)]
        while "Show older" in shown[-1]:
            history, chat = await page.older(Chat().after(chat), {}, at())
            shown.append(history)
        assert [text.count("<li") for text in shown] == [50, 150, 160]
        fake.conversations *= 7
        chat.listed = 998
        history, _ = await page.older(chat, {}, at())
        assert history.count("<li") == 999 and "Show older" not in history and "not listed here" in history

    asyncio.run(run())


def at(**headers: str) -> Any:
    """A request of a browser."""
    return SimpleNamespace(headers=headers)


def event(**data: Any) -> Any:
    """What acting.js sends."""
    return SimpleNamespace(_data=data)


def test_a_newcomer_is_one_voter_before_the_browser_has_told_who_it_is_and_after() -> None:
    async def run() -> None:
        fake = Fake()
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        async for _ in page.asked("", 2, chat, None, at(), event(act="ask", text="Hi")):
            pass
        await page.act("", chat, None, at(), event(act="pick", index="1", comparison="cmp-1"))
        identity = (await page.opened(None, chat, at()))[0]
        await page.act("", chat, identity, at(), event(act="undo", comparison="cmp-1"))
        fresh = (await page.restart(chat, None, at()))[-1]
        await page.tick(None, fresh, at())
        assert len(fake.votes) == len(fake.withdrawn) == 1
        assert {headers["plaudit-voter"] for headers in fake.headers} == {identity["voter"]}
        copied = Chat()  # as Gradio does for each tab
        assert len({copy.deepcopy(copied).speaker() for _ in range(5)}) == 5

    asyncio.run(run())


def test_a_page_that_the_server_has_forgotten_is_found_again() -> None:
    """The server was started anew, or Gradio gave up the state of a page that was away for an hour; the page shows what it showed."""
    async def run() -> None:
        fake = Fake()
        page, who = ChatHandlers(client_of(fake.app())), {"voter": "ann"}
        fake.asked.append({"n": 2})
        shown = cards.exchange(Chat.reopened(await page.client.conversation(WHO, "conv-9")))
        assert 'data-conversation="conv-9" data-comparison="cmp-7"' in shown
        *_, chat = await page.act("", Chat(), who, at(), event(act="pick", index="1", conversation="conv-9", comparison="cmp-7"))
        assert fake.votes == [{"comparison": "cmp-7", "favourite": 1}] and (chat.phase, chat.choice) == ("voted", 1)
        async for _ in page.typed("And why?", 2, "conv-9", Chat(), who, at()):
            pass
        asked = fake.asked[-1]
        assert asked["metadata"]["conversation_id"] == "conv-9"
        assert [m["content"] for m in asked["messages"]] == ["What are bees?", TEXTS[0], "And why?"]

    asyncio.run(run())


def test_what_a_forgotten_page_cannot_know_is_said_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows a message that was stopped, or an open edit box: neither is kept by anybody."""
    warned: list[str] = []
    monkeypatch.setattr(gr, "Warning", warned.append)

    async def run() -> None:
        fake = Fake()
        page, who = ChatHandlers(client_of(fake.app())), {"voter": "ann"}
        retry = event(act="retry", conversation="conv-9", comparison="cmp-8")  # cmp-7 is the newest that was kept
        assert [update async for update in page.asked("", 2, Chat(), who, at(), retry)] == [(gr.skip(),) * 8]
        assert fake.asked == [] and "write it again" in warned[0]
        assert (await page.save_edit("A better one", Chat(), who, at()))[:5] == (gr.skip(),) * 5 and "keep a copy" in warned[1]
        stays = await page.past(Chat(), who, at(), event(act="erase", id="conv-8"))
        assert stays[:2] == (gr.skip(), gr.skip()) and page.stop(Chat())[0] == gr.skip()

    asyncio.run(run())


def test_a_pick_that_the_page_hands_over_after_the_next_message_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio takes a click and a message that wait together in any order."""
    told: list[str] = []
    monkeypatch.setattr(gr, "Info", told.append)
    monkeypatch.setattr(gr, "Warning", told.append)

    async def run() -> None:
        fake = Fake()
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        await said(page, chat, "Hi")
        shown = chat.comparison_id
        writing = page.typed("And?", 2, "", chat, {}, at())
        await anext(writing)
        assert chat.phase == "streaming"
        for click in ({"act": "pick", "index": "1"}, {"act": "edit", "index": "0"}, {"act": "pick", "index": "0", "at": -1.0}, {"act": "undo", "at": 9.0}, {"act": "tie", "at": 8.0}):
            answer = await page.act("", chat, {}, at(), event(comparison=shown, **click))
            assert answer[:5] == (gr.skip(),) * 5 and chat.phase == "streaming"
        assert [update async for update in writing] and chat.phase == "choosing"
        assert fake.votes == [{"comparison": shown, "favourite": 1}] and fake.withdrawn == [shown]  # the tie was clicked before the undo, and came late
        assert len(told) == 2 and "Your pick is saved" in told[0] and "taken back" in told[1]

    asyncio.run(run())


def test_replies_that_are_no_longer_the_newest_are_not_voted_on_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(gr, "Warning", warned.append)

    async def run() -> None:
        fake = Fake()
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        await said(page, chat, "Hi")
        await said(page, chat, "And?")
        await page.act("", chat, {}, at(), event(act="pick", index="1", comparison="cmp-1"))
        assert fake.votes == [] and "no longer the newest" in warned[0]

    asyncio.run(run())


def test_what_was_written_for_one_reply_survives_a_pick_and_an_edit_of_another() -> None:
    async def run() -> None:
        fake = Fake()
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        await said(page, chat, "Hi")

        async def do(draft: str, **data: Any) -> tuple:
            return await page.act(draft, chat, {}, at(), event(comparison="cmp-1", **data))

        await do("", act="edit", index="0")
        picked = await do("Much better", act="pick", index="1")
        assert picked[2] == picked[3] == gr.skip()  # the panel stays, with what is in it
        assert (await do("Much better", act="edit", index="1"))[3]["value"] == TEXTS[1]
        assert (await do("Other", act="edit", index="0"))[3]["value"] == "Much better"
        assert (await page.save_edit("Much better", chat, {}, at()))[2]["visible"] is False
        assert fake.votes[-1] == {"comparison": "cmp-1", "favourite": 0, "edit": "Much better"}
        page.cancel_edit(chat)
        assert (await do("", act="edit", index="0"))[3]["value"] == "Much better"  # which is its text now
        await do("Not this", act="edit", index="0")
        page.cancel_edit(chat)
        assert (await do("", act="edit", index="0"))[3]["value"] == "Much better"

    asyncio.run(run())


def test_votes_reach_the_server_in_the_order_they_were_cast() -> None:
    async def run() -> None:
        fake = Fake()
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        await said(page, chat, "Hi")
        fake.vote_s = 0.1
        first = asyncio.create_task(page.cast(chat, WHO, 0, None))
        await asyncio.sleep(0.02)
        fake.vote_s = 0.0
        await asyncio.gather(first, page.cast(chat, WHO, 1, None))
        assert [vote["favourite"] for vote in fake.votes] == [0, 1] and chat.choice == 1
        fake.vote_s = 0.1
        undo = asyncio.create_task(page.undo(chat, WHO))
        await asyncio.sleep(0.02)
        await asyncio.gather(undo, page.act("", chat, {}, at(), event(act="pick", index="1", comparison="cmp-1")))
        assert len(fake.votes) == 3 and (chat.choice, chat.phase) == (1, "voted")  # it was picked when it was clicked, and taken back by then
        await page.act("", chat, {}, at(), event(act="pick", index="1", comparison="cmp-1"))
        assert len(fake.votes) == 3

    asyncio.run(run())


def test_of_quick_clicks_the_last_counts_in_whatever_order_they_arrive() -> None:
    async def run() -> None:
        fake = Fake()
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        await said(page, chat, "Hi")
        for index, at_ms in (("1", 2000.5), ("0", 2000.25)):
            await page.act("", chat, {}, at(), event(act="pick", index=index, comparison="cmp-1", at=at_ms))
        assert [vote["favourite"] for vote in fake.votes] == [1] and chat.choice == 1
        await page.act("", chat, {}, at(), event(act="edit", index="1", comparison="cmp-1", at=2000.4))
        assert chat.editing == 1  # an edit takes no vote's place
        await page.act("", chat, {}, at(), event(act="pick", index="0", comparison="cmp-1", at=2001.0))
        assert chat.choice == 0
        await page.act("", chat, {}, at(), event(act="pick", index="1", comparison="cmp-1", at="noon"))
        assert chat.choice == 1 and chat.cast_at == 2001.0  # what is no time is taken as it comes

    asyncio.run(run())


def test_erasing_another_conversation_stops_what_is_written_and_says_so() -> None:
    async def run() -> None:
        page, chat = ChatHandlers(client_of(Fake().app())), Chat()
        chat.begin("Hi", 2)
        left = await page.past(chat, {}, at(), event(act="erase", id="conv-8"))
        assert chat.phase == "stopped" and "Try again" in left[1]
        assert left[2]["visible"] and not left[3]["visible"] and left[-1] is chat

    asyncio.run(run())


def test_a_message_that_was_not_answered_comes_back_only_into_an_empty_box() -> None:
    async def run() -> None:
        fake = Fake()
        fake.fail = error(503, "starting")
        page, chat = ChatHandlers(client_of(fake.app())), Chat()
        assert all(update[0] in ("", gr.skip()) for update in await said(page, chat, "Hi"))
        assert (await page.refresh("", chat, {}, at()))[0] == "Hi"
        assert (await page.refresh("the next one", chat, {}, at()))[0] == gr.skip()
        fake.fail = None
        async for update in page.asked("the next one", 2, chat, {}, at(), event(act="retry")):
            assert update[0] == gr.skip()  # what is in the box is not what is tried again
        assert chat.phase == "choosing" and (await page.refresh("", chat, {}, at()))[0] == gr.skip()
        fake.fail = error(503, "starting")
        await said(page, chat, "Hi")
        fake.fail = None
        assert {update[0] async for update in page.asked("Hi", 2, chat, {}, at(), event(act="retry"))} == {""}

    asyncio.run(run())


def test_the_operator_page_offers_what_can_be_done_with_the_learner() -> None:
    assert 'data-act="resume"' in figures.learner({"state": "ppo", "paused": True}) and "no round follows" in figures.learner({"state": "ppo", "paused": True})
    assert 'data-act="pause"' in figures.learner({"state": "ppo", "paused": False})
    off = figures.learner({"state": "paused", "paused": False, "off": True, "reason": "no learner runs here"})
    assert "Not running" in off and "no learner runs here" in off and "data-act" not in off
    assert "switched off" in sentences.learning({"learner_state": "off"})


def test_going_back_is_refused_where_the_version_before_is_another_by_now() -> None:
    async def run() -> None:
        fake = Fake()
        page, request = operator._Page(client_of(fake.app())), cast(Any, SimpleNamespace(headers={}))
        fake.adapters = {"live": "v000003", "previous": "v000002", "data": []}
        said = (await page.confirmed(("rollback", "v000001"), {}, request))[-1]
        assert "look again" in said and "v000002" in said and fake.steered == []
        assert "v000002 is live" in (await page.confirmed(("rollback", "v000002"), {}, request))[-1]
        assert fake.steered == ["rollback"]

    asyncio.run(run())


# --- client


def client_of(app: FastAPI, kind: type[ApiClient] = ApiClient) -> ApiClient:
    return kind("http://fake", transport=httpx.ASGITransport(app))


def talk(fake: Fake, messages: list[dict[str, str]], n: int, conversation: str | None = None) -> list:
    async def run() -> list:
        return [piece async for piece in client_of(fake.app()).chat(WHO, messages, n, conversation)]

    return asyncio.run(run())


@pytest.mark.parametrize("n", [1, 2, 4])
def test_streamed_replies_arrive_whole_and_apart(n: int) -> None:
    fake = Fake()
    fake.kept.add("conv-9")
    pieces = talk(fake, [{"role": "user", "content": "Hi"}], n, "conv-9")
    for index in range(n):
        assert "".join(p.text for p in pieces if p.index == index) == TEXTS[index]
        assert [p.finish_reason for p in pieces if p.index == index][-1] == "stop"
    assert {p.comparison_id for p in pieces} == {"cmp-1"}
    assert fake.asked == [{"model": "plaudit", "messages": [{"role": "user", "content": "Hi"}], "n": n, "stream": True,
                           "metadata": {"choice": "active", "conversation_id": "conv-9"}}]
    assert fake.headers[0]["plaudit-voter"] == "voter-1"


def test_a_stream_that_reports_an_error_raises_its_sentence() -> None:
    fake = Fake()
    fake.break_after = 3
    with pytest.raises(Problem, match=r"^The model ran out of memory\.$"):
        talk(fake, [{"role": "user", "content": "Hi"}], 2)


def test_a_stream_that_just_ends_is_not_taken_for_complete() -> None:
    def half(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text='data: {"choices": [{"index": 0, "delta": {"content": "The"}}]}\n\n')

    async def run() -> None:
        async for _ in ApiClient("http://x", transport=httpx.MockTransport(half)).chat(WHO, [], 1):
            pass

    with pytest.raises(Problem, match="broke off"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (error(401, "send your key"), "needs a key"),
        (error(403, "this needs an operator's key"), "This needs an operator's key."),
        (error(404, "there is no such comparison of yours"), "not there any more"),
        (error(409, "a round is running"), "A round is running."),
        (error(413, "body"), "too long"),
        (error(429, "queue full", {"Retry-After": "5"}), "in 5 seconds"),
        (error(429, "queue full"), "in a moment"),
        (error(500, "Traceback (most recent call last)"), "Something went wrong on the server (status 500)"),
        (error(503, "the server is shutting down", code="draining"), "starting or stopping"),
        (error(503, "the database is busy; try again"), "The database is busy; try again."),
        (error(504, "deadline"), "took too long"),
        (error(507, "disk"), "disk is full"),
    ],
)
def test_every_failure_is_a_plain_sentence(answer, sentence: str) -> None:
    fake = Fake()
    fake.fail = answer

    async def run() -> None:
        await client_of(fake.app()).vote(WHO, "c", {"favourite": 0})

    with pytest.raises(Problem) as caught:
        asyncio.run(run())
    said = str(caught.value)
    assert sentence in said
    assert said[0].isupper() and said.endswith(".") and "Traceback" not in said
    assert caught.value.needs_key == (answer.status_code == 401)


def test_a_key_that_was_sent_and_refused_is_told_from_none() -> None:
    fake = Fake()
    fake.key = "right"
    with pytest.raises(Problem, match="This key is not known"):
        asyncio.run(client_of(fake.app()).status(Visitor("ann", "wrong")))
    with pytest.raises(Problem, match="needs a key"):
        asyncio.run(client_of(fake.app()).status(Visitor("ann")))


def test_a_server_that_is_gone_or_is_something_else_is_a_plain_sentence() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[Errno 111] Connection refused")

    def other(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text="<html>It works!</html>")

    for transport, sentence in ((refuse, "cannot be reached"), (other, "could not be read")):
        client = ApiClient("http://x", transport=httpx.MockTransport(transport))
        with pytest.raises(Problem, match=sentence):
            asyncio.run(client.status(WHO))


def test_identity_headers_carry_the_key_and_nothing_that_breaks_a_header() -> None:
    assert Visitor("v", "plaudit-1-x").headers == {"Plaudit-Voter": "v", "Authorization": "Bearer plaudit-1-x"}
    assert Visitor("a\r\nX-Evil: 1é").headers == {"Plaudit-Voter": "aX-Evil: 1"}
    assert Visitor("v", host="evil.example", origin="https://evil.example").headers["Origin"] == "https://evil.example"
    assert Visitor().headers == {}


def test_the_page_says_which_host_and_origin_its_browser_came_from() -> None:
    """Else a foreign page would speak through ours as this machine."""
    fake = Fake()
    page, request = ChatHandlers(client_of(fake.app())), at(host="evil.example", origin="https://evil.example")
    asyncio.run(page.tick({}, Chat(), request))
    assert (fake.headers[-1]["host"], fake.headers[-1]["origin"]) == ("evil.example", "https://evil.example")


def test_ids_cannot_lead_to_another_path() -> None:
    seen = []

    def note(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.raw_path)
        return httpx.Response(200, json={})

    client = ApiClient("http://x", transport=httpx.MockTransport(note))
    asyncio.run(client.promote(WHO, "../learner/run?x=1#"))
    assert seen == [b"/v1/adapters/..%2Flearner%2Frun%3Fx%3D1%23/promote"]


# --- conversation state


def answered(chat: Chat, message: str, n: int = 2) -> list[dict[str, str]]:
    messages = chat.begin(message, n)
    for i in range(n):
        chat.add(i, f"{message}-{i}", "stop")
    chat.comparison_id, chat.phase = "c", "choosing"
    return messages


@pytest.mark.parametrize(
    ("choice", "edit", "reply"),
    [(1, None, "a-1"), (1, "better", "better"), ("tie", None, "a-0"), (None, None, "a-0"), ("none", "mine", "mine")],
)
def test_the_favourite_or_its_edit_carries_the_conversation_on(choice, edit, reply: str) -> None:
    chat = Chat()
    assert answered(chat, "a") == [{"role": "user", "content": "a"}]
    chat.choice, chat.edit = choice, edit
    chat.phase = "choosing" if choice is None else "voted"
    assert answered(chat, "b") == [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": reply}, {"role": "user", "content": "b"}]


def test_an_exchange_where_none_was_good_stays_out_of_the_history() -> None:
    chat = Chat()
    answered(chat, "a")
    chat.choice, chat.phase = "none", "voted"
    assert answered(chat, "b") == [{"role": "user", "content": "b"}]
    assert chat.turns[0].reply is None and "not part of the conversation" in cards.thread(chat)


def test_a_stopped_exchange_is_not_a_turn() -> None:
    chat = Chat()
    chat.begin("a", 2)
    chat.add(0, "half", None)
    chat.phase = "stopped"
    assert answered(chat, "b") == [{"role": "user", "content": "b"}]


def test_forgetting_halves_what_is_sent_and_the_page_says_so() -> None:
    chat = Chat()
    for message in "abcd":
        answered(chat, message)
    chat.settle()
    chat.forget()
    assert [m["content"] for m in chat.history()] == ["c", "c-0", "d", "d-0"]
    assert cards.thread(chat).index("no longer sees") > cards.thread(chat).index("b-0")


@pytest.mark.parametrize(
    ("choice", "edit", "body"),
    [
        (1, None, {"favourite": 1}), (0, "x", {"favourite": 0, "edit": "x"}),
        ("tie", None, {"verdict": "tie"}), ("none", "x", {"verdict": "none", "edit": "x"}),
    ],
)
def test_votes_have_the_shape_of_the_contract(choice, edit, body: dict) -> None:
    assert ballot(choice, edit) == body


def test_a_reply_that_reads_like_another_says_so_once_all_are_there() -> None:
    chat = Chat()
    answered(chat, "Hello", n=3)
    chat.replies[0].text, chat.replies[1].text, chat.replies[2].text = "Hi.", "Hello!", "Hi. "
    assert cards.exchange(chat).count("Word for word the same as reply 1.") == 1
    assert chat.twin(2) == 0 and chat.twin(1) is None
    chat.choice, chat.edit, chat.phase = 2, "Hi there.", "voted"
    assert "Word for word" not in cards.exchange(chat)  # it is the visitor's own now
    chat.phase = "streaming"
    assert "Word for word" not in cards.exchange(chat)


def test_versions_are_hidden_until_the_vote_reveals_them() -> None:
    chat = Chat()
    answered(chat, "a")
    assert "version" not in cards.exchange(chat)
    chat.reveal([{"index": 0, "version": "v000007"}, {"index": 1, "version": "base"}, {"index": 9, "version": "x"}, None])
    html = cards.exchange(chat)
    assert "v000007" in html and "the original model" in html


def test_a_stored_conversation_opens_with_its_newest_replies_and_vote() -> None:
    chat = Chat.reopened({
        "conversation_id": "conv",
        "comparisons": [
            {"comparison_id": "c1", "messages": [{"role": "user", "content": "a"}],
             "choices": [{"index": 0, "text": "A", "version": "v1"}, {"index": 1, "text": "B", "version": "base"}],
             "vote": {"kind": "favourite", "groups": [[1], [0]]}},
            {"comparison_id": "c2",
             "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "b"}],
             "choices": [{"index": 1, "text": "D"}, {"index": 0, "text": "C"}], "vote": None},
        ],
    })
    assert [(t.message, t.reply, t.version) for t in chat.turns] == [("a", "B", "base")]
    assert (chat.message, [r.text for r in chat.replies], chat.comparison_id, chat.phase) == ("b", ["C", "D"], "c2", "choosing")


def test_what_another_client_asked_for_is_kept_and_one_reply_is_not_compared() -> None:
    told = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "a"}]
    chat = Chat.reopened({"conversation_id": "conv", "comparisons": [{"comparison_id": "c1", "messages": told, "choices": [{"index": 0, "text": "A"}], "vote": None}]})
    html = cards.exchange(chat)
    assert 'data-act="edit"' in html and 'data-act="none"' in html
    assert 'data-act="pick"' not in html and 'data-act="tie"' not in html and "Pick the reply" not in html
    assert chat.begin("b", 2) == [*told, {"role": "assistant", "content": "A"}, {"role": "user", "content": "b"}]
    chat.forget()
    assert chat.begin("c", 2) == [told[0], {"role": "user", "content": "c"}]


# --- sentences and figures


def test_the_status_line_says_what_happened_to_the_vote() -> None:
    status = {"live": "v000001", "votes": 11, "votes_until_next_round": 5, "learner_state": "idle"}
    assert sentences.status_line(status, saved="Your pick is saved.") == "Your pick is saved. 5 more until the next update."
    assert sentences.status_line(status) == "5 more picks until the next update."
    assert sentences.status_line(status | {"votes_until_next_round": 1}) == "1 more pick until the next update."
    working = status | {"learner_state": "training_reward", "votes": 16, "progress": 0.4}
    assert re.sub("<[^>]+>", "", sentences.status_line(working)) == "The assistant is learning from 16 picks: training the reward model … 40%"


def test_the_status_line_tells_of_a_new_version_with_its_time() -> None:
    at = time.mktime((2026, 5, 3, 14, 3, 0, 0, 0, -1))
    line = sentences.status_line(
        {"live": "v000002", "live_since": at}, live_when_opened="v000001", now_s=at + 60)
    assert re.sub("<[^>]+>", "", line) == "A new version, v000002, went live at 14:03."
    assert "went live" not in sentences.status_line({"live": "v000002"}, live_when_opened="v000002")


ODD = [{}, {"live": None}, {"progress": "x", "learner_state": 3}, {"learner_state": "ppo", "progress": {"step": 1, "steps": 0}},
       {"live": 7, "live_since": "yesterday", "votes_until_next_round": float("nan")}, {"live_since": 1e300}]


@pytest.mark.parametrize("status", ODD)
def test_odd_status_never_breaks_the_line(status: dict) -> None:
    assert isinstance(sentences.status_line(status, live_when_opened="v000001"), str)


@pytest.mark.parametrize("odd", [{}, {"data": None}, {"data": [None, {}]}, {"data": [{"version": None, "gate": "x", "win_rate": "y"}]}])
def test_odd_figures_never_break_the_operator_page(odd: dict) -> None:
    rows = [{}, {"round": "x", "reward": 3, "ppo": [], "gate": {"checks": [None, {}]}}, {"round": 2, "reward": {"accuracy": {"value": 0.7, "low": 0.6, "high": 0.8}}}]
    for html in (figures.overview(odd, odd), figures.learner(odd), figures.versions(odd), figures.rounds(rows), figures.charts(rows), figures.rounds([])):
        assert isinstance(html, str)
    assert "70%" in figures.rounds(rows) and "60–80%" in figures.rounds(rows)


def test_a_round_says_where_it_began_and_why_it_made_nothing() -> None:
    html = figures.rounds([
        {"round": 2, "version": "v000002", "ppo": {"note": "began at the reference: <far>"}, "reward": {"words": "works"}},
        {"round": 1, "state": "not_ready", "reward": {"words": "not yet: about 9 more votes"}},
    ])  # fmt: skip
    assert "began at the reference: &lt;far&gt;" in html and "not yet: about 9 more votes" in html and "works" not in html


def test_a_rejected_version_names_its_failing_checks_and_cannot_be_promoted() -> None:
    gate = {"verdict": "rejected", "checks": [{"name": "kl", "passed": True}, {"name": "length_drift", "passed": False}]}
    html = figures.versions({"live": "base", "data": [{"version": "v000001", "status": "rejected", "gate": gate}]})
    assert "length drift" in html and ">kl<" not in html and 'data-act="promote"' not in html


def test_a_version_that_was_shrunk_to_pass_says_so() -> None:
    assert "with 70% of its change" in figures.verdict({"verdict": "pass", "checks": [], "share": 0.7})
    assert "change" not in figures.verdict({"verdict": "pass", "checks": [], "share": 1.0}) + figures.verdict({"verdict": "pass", "checks": []})


def test_a_chart_puts_its_points_where_the_figures_say() -> None:
    svg = figures.chart("t", [(1, 0.0, None), (2, 0.5, None), (3, 1.0, None)], "Round", line=0.5, mark="chance")
    points = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x1, bottom), (x2, middle), (x3, top) = points
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and bottom - middle == pytest.approx(middle - top, abs=0.2)
    assert f'y1="{middle:.1f}" y2="{middle:.1f}"' in svg, "the chance line is at one half"
    for newest, below in ((0.58, True), (0.42, False)):  # a name on the point's side of the line would lie under the point
        svg = figures.chart("t", [(1, 0.7, None), (2, newest, None)], "Round", line=0.5, mark="even")
        assert (float(re.findall(r'y="([\d.]+)" text-anchor="end">even', svg)[0]) > middle) is below


def test_a_reliability_diagram_lies_on_its_diagonal_where_confidence_is_right() -> None:
    row = {"round": 3, "reward": {"reliability": [{"confidence": c, "right": c, "share": 0.3} for c in (0.55, 0.75, 0.95)]}}
    svg = figures.charts([row]).split("Right, against", 1)[1]
    found = re.search(r'class="level" x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)"', svg)
    assert found is not None
    x1, x2, y1, y2 = map(float, found.groups())
    points = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(points) == 3
    for cx, cy in points:
        assert float(cy) == pytest.approx(y1 + (y2 - y1) * (float(cx) - x1) / (x2 - x1), abs=0.2)


def test_accuracy_against_votes_is_drawn_for_the_last_round_that_has_it() -> None:
    curve = [{"votes": 10, "accuracy": 0.6}, {"votes": 40, "accuracy": 0.8}]
    html = figures.charts([{"round": 1, "reward": {"learning_curve": curve}}, {"round": 2, "reward": None}])
    assert "Votes 40: 80%" in html and "Votes 10: 60%" in html


# --- mounted


def test_the_api_answers_while_the_pages_are_being_made_and_a_page_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import ui
    import ui.pages

    go, make = threading.Event(), ui.pages.build_pages
    monkeypatch.setattr(ui.pages, "build_pages", lambda url: (go.wait(30), make(url))[1])
    with TestClient(ui.mount(Fake().app(), "http://127.0.0.1:1")) as client, ThreadPoolExecutor() as beside:
        page = beside.submit(client.get, "/")
        assert client.get("/v1/status").json()["live"] == "v000001"
        assert not page.done()
        go.set()
        assert "text/html" in page.result(30).headers["content-type"]


def test_gradio_is_imported_without_writing_stubs_and_everything_else_keeps_its_file() -> None:
    import inspect

    import gradio

    import ui

    with ui.without_type_stubs():
        with pytest.raises(OSError, match="Gradio"):
            inspect.getfile(gradio.Button)
        assert inspect.getfile(Chat).endswith("exchange.py")
    assert inspect.getfile(gradio.Button).endswith("button.py")


def test_pages_that_cannot_be_made_say_so_and_the_api_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import ui
    import ui.pages

    def broken(url: str) -> None:
        raise RuntimeError("no pages today")

    monkeypatch.setattr(ui.pages, "build_pages", broken)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with TestClient(ui.mount(Fake().app(), "http://127.0.0.1:1"), raise_server_exceptions=False) as client:
        assert client.get("/").status_code == 500
        assert client.get("/v1/status").json()["live"] == "v000001"


@pytest.fixture(scope="module")
def mounted() -> TestClient:
    import ui

    return TestClient(ui.mount(Fake().app(), "http://127.0.0.1:1"))


def test_the_api_keeps_its_paths_under_the_pages(mounted: TestClient) -> None:
    assert mounted.get("/v1/status").json()["live"] == "v000001"
    assert "text/html" in mounted.get("/").headers["content-type"]
    assert mounted.get("/operator").url.path == "/operator/"


@pytest.mark.parametrize("path", ["/", "/operator/"])
def test_a_page_names_no_other_host_to_load_from_and_forbids_it(mounted: TestClient, path: str) -> None:
    page = mounted.get(path)
    loads = re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["'](https?:[^"']+)""", page.text)
    assert loads == []
    assert "fonts.googleapis.com" not in page.text
    policy = page.headers["content-security-policy"]
    assert "connect-src 'self'" in policy and "img-src 'self' data:" in policy and "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/operator/gradio_api/upload", "/gradio_api/proxy=https://x.hf.space/a", "/gradio_api/file=/etc/passwd", "/gradio_api/upload%0A", "/gradio_api/process_recording", "/operator/gradio_api/info"])
def test_gradios_doors_that_no_page_uses_are_shut(mounted: TestClient, path: str) -> None:
    assert mounted.post(path, files={"files": b"x"}).status_code == 404
    assert mounted.get(path).status_code == 404
