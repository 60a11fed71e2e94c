"""The chat page: type, watch the replies stream side by side, pick one, go on.

Owns which event changes what on the page. State is in `ui.exchange`, HTML in `ui.cards`, the wire in `ui.client`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ui import cards
from ui.client import ApiClient, Piece, Problem, Visitor
from ui.exchange import Chat, ballot
from ui.pace import paced
from ui.sentences import status_line
from ui.theme import ACTING, HIDDEN

POLL_S = 2.0
MAX_REPLIES = 4
MOST_LISTED = 999  # past conversations: the API gives a thousand at most
MORE = 100  # past conversations that "Show older ones" adds to the list
# The conversation that this tab showed before it was loaded anew (keys.js keeps its id)
BEFORE = "(before, ...rest) => [sessionStorage.getItem('plaudit.open') || '', ...rest]"
# A message goes with the conversation that the page shows; what it came with is left as it is
SHOWN = "(text, n, shown, ...rest) => [text, n, document.querySelector('section.exchange')?.dataset.conversation || '', ...rest]"


def new_identity(identity: Any, voter: str = "") -> dict[str, str]:
    """What this browser keeps: a random voter id, made once (`voter`, if it has spoken as that already), and perhaps a key."""
    known = identity if isinstance(identity, dict) else {}
    return {"voter": str(known.get("voter") or voter or secrets.token_urlsafe(18)), "key": str(known.get("key") or "")}


def visitor_of(identity: Any, request: gr.Request, chat: Chat | None = None) -> Visitor:
    """Who the browser behind `request` is. A new one's `identity` comes with its first answer: until then `chat` says who speaks."""
    known, headers = new_identity(identity, chat.speaker() if chat else ""), request.headers
    return Visitor(known["voter"], known["key"], headers.get("host") or "", headers.get("origin") or "")


class _Page:
    """The event handlers of the chat page, over one client."""

    def __init__(self, client: ApiClient) -> None:
        self.client = client

    async def opened(self, identity: Any, chat: Chat, request: gr.Request) -> tuple[Any, ...]:
        """identity, masthead, history, status, key panel: what a fresh page shows. The chat stays: somebody may have begun one already."""
        identity = new_identity(identity, chat.speaker())
        who = visitor_of(identity, request)
        try:
            status = await self.client.status(who)
        except Problem as problem:
            return identity, cards.masthead("chat"), cards.past([], None), cards.status(cards.trouble(problem)), _shown(problem.needs_key)
        chat.live_when_opened = status.get("live")
        return (
            identity, cards.masthead("chat", status.get("live")), await self.listed(who, chat),
            cards.status(status_line(status)), _shown(False),
        )

    async def came_back(self, before: str, chat: Chat, identity: Any, request: gr.Request) -> tuple[Any, ...]:
        """As `past`: a page that was loaded anew goes on with what it showed, unless something was begun meanwhile or it is no longer there."""
        who, nothing = visitor_of(identity, request, chat), (*(gr.skip(),) * 6, chat)
        found = await self.found_again(chat, who, before or None, quiet=True)
        if found is chat:
            return nothing
        shown = await self._switched(found, who)
        return shown if chat.untouched else nothing

    async def listed(self, who: Visitor, chat: Chat) -> str:
        """The list of past conversations; empty when it cannot be had."""
        try:
            rows = await self.client.conversations(who, chat.listed + 1)
        except Problem:
            return cards.past([], None)
        older = "" if len(rows) <= chat.listed else cards.OLDER if chat.listed < MOST_LISTED else cards.OLDEST
        return cards.past(rows[: chat.listed], chat.conversation_id, older)

    async def tick(self, identity: Any, chat: Chat, request: gr.Request) -> tuple[Any, ...]:
        """masthead, status, key panel: asked for every two seconds."""
        try:
            status = await self.client.status(visitor_of(identity, request, chat))
        except Problem as problem:
            return gr.skip(), cards.status(cards.trouble(problem)), _shown(True) if problem.needs_key else gr.skip()
        chat.live_when_opened = chat.live_when_opened or status.get("live")
        return (
            cards.masthead("chat", status.get("live")),
            cards.status(status_line(status, saved=chat.saved, live_when_opened=chat.live_when_opened)), gr.skip(),
        )

    async def found_again(self, chat: Chat, who: Visitor, conversation: str | None, *, quiet: bool = False) -> Chat:
        """What the page shows, where the server has forgotten it: it was started anew, or the page was away for an hour. quiet: a failure is not told."""
        if conversation is None or not chat.untouched:
            return chat
        try:
            return Chat.reopened(await self.client.conversation(who, conversation)).after(chat)
        except Problem as problem:
            if not quiet:
                gr.Warning(str(problem))
            return chat

    async def typed(
        self, text: str, n: int, shown: str, chat: Chat, identity: Any, request: gr.Request, draft: str = ""
    ) -> AsyncIterator[tuple[Any, ...]]:
        """A message was sent from the box. shown: the conversation that the page shows, if any. draft: what is in the editor."""
        who = visitor_of(identity, request, chat)
        if _unsaved(chat, draft):
            yield (gr.skip(),) * 8
            return
        chat = await self.found_again(chat, who, shown or None)
        async for update in self.converse(text, n, chat, who):
            yield update

    async def asked(
        self, typed: str, n: int, chat: Chat, identity: Any, request: gr.Request, event: gr.EventData
    ) -> AsyncIterator[tuple[Any, ...]]:
        """An example was clicked, or the last message is tried again."""
        text, who = event._data.get("text") or "", visitor_of(identity, request, chat)
        if event._data.get("act") in ("retry", "shorter"):
            found = await self.found_again(chat, who, event._data.get("conversation"))
            # what was stopped or failed is kept nowhere: then another exchange is found, or none
            text = found.message if found is chat or found.comparison_id == event._data.get("comparison") else ""
            if not text:
                gr.Warning("The server no longer has this message. Please write it again.")
                yield (gr.skip(),) * 8
                return
            chat = found
            unseen = chat.unseen
            if event._data.get("act") == "shorter":
                chat.forget()
            if chat.choice == "none":  # nothing of it goes on; do not keep an empty turn as well
                chat.phase = "stopped"
        async for _, *rest in self.converse(text, n, chat, who):
            yield "" if (typed or "").strip() == text else gr.skip(), *rest  # what else is in the box was not sent
        if event._data.get("act") == "shorter" and chat.phase == "failed":
            chat.unseen = unseen  # it was not what was in the way, or not alone
            yield gr.skip(), cards.thread(chat), *(gr.skip(),) * 6

    async def converse(self, text: str, n: int, chat: Chat, who: Visitor) -> AsyncIterator[tuple[Any, ...]]:
        """box, thread, exchange, send, stop, edit panel, key panel, chat: while the replies are written."""
        text, n = (text or "").strip(), min(MAX_REPLIES, max(2, int(n)))
        if not text or chat.phase == "streaming":
            yield (gr.skip(),) * 8
            return
        messages = chat.begin(text, n)
        number = chat.number
        source = self.client.chat(who, messages, n, chat.conversation_id)
        yield "", cards.thread(chat), cards.exchange(chat), _shown(False), _shown(True), _shown(False), gr.skip(), chat
        same: list[Any] = [gr.skip()] * 8
        problem: Problem | None = None
        conversation_id: str | None = None
        try:
            async for batch in paced(source):
                if chat.number != number or chat.phase != "streaming":
                    return
                conversation_id = _take_in(chat, batch) or conversation_id
                yield *same[:2], cards.exchange(chat), *same[3:]
        except Problem as raised:
            problem = raised
        if chat.number != number or chat.phase != "streaming":
            return
        if problem is None and chat.comparison_id is None:
            problem = Problem("The server sent no replies that can be voted on. Please try again.")
        if problem is None:  # only now is there such a conversation: the server keeps none of what was stopped or failed
            chat.conversation_id = conversation_id or chat.conversation_id
        chat.phase, chat.problem = ("failed", str(problem)) if problem else ("choosing", "")
        chat.too_long = problem is not None and problem.too_long and bool(chat.history())
        if problem is not None and problem.too_long and not chat.too_long:
            chat.problem = "This message is too long for this model. Please shorten it."
        elif problem is not None and problem.status == 404 and chat.conversation_id:
            chat.problem = "This conversation is no longer kept; it may have been erased in another window. Please start a new one."
        yield (
            gr.skip(), gr.skip(), cards.exchange(chat), _shown(True), _shown(False), gr.skip(),
            _shown(True) if problem and problem.needs_key else gr.skip(), chat,
        )

    def stop(self, chat: Chat) -> tuple[Any, ...]:
        """exchange, send, stop, chat: the person has read enough. The stream itself is cancelled by Gradio."""
        if chat.phase == "streaming":
            chat.phase = "stopped"
        return _exchange(chat), _shown(True), _shown(False), chat

    async def act(self, draft: str, chat: Chat, identity: Any, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        """exchange, status, edit panel, edit box, key panel, chat: a card or a button of the exchange was used."""
        data, who = event._data, visitor_of(identity, request, chat)
        chat = await self.found_again(chat, who, data.get("conversation"))
        act, index = data.get("act"), _index(data, chat)
        if chat.phase not in ("empty", "choosing", "voted"):
            return (*(gr.skip(),) * 5, chat)
        if chat.comparison_id is None or chat.comparison_id != data.get("comparison"):
            gr.Warning("These replies are no longer the newest of this conversation. Please open it again, from the list at the side.")
            return (*(gr.skip(),) * 5, chat)
        if act == "edit":
            return _open_editor(chat, index, draft)
        at = clicked if isinstance(clicked := data.get("at"), int | float) else math.inf
        if at < chat.cast_at:  # Gradio hands over quick clicks in any order; the last one counts
            return (*(gr.skip(),) * 5, chat)
        chat.cast_at = at if at < math.inf else chat.cast_at
        if act == "undo":
            return await self.undo(chat, who)
        choice = index if act == "pick" else act if act in ("tie", "none") else None
        return (*(gr.skip(),) * 5, chat) if choice is None else await self.cast(chat, who, choice, None, again=False)

    async def cast(self, chat: Chat, who: Visitor, choice: Any, edit: str | None, *, again: bool = True) -> tuple[Any, ...]:
        """Send the vote; the page says it is saved only after the server has said so, if it still shows what was voted on.

        again: also where this reply is picked already.
        """
        number, comparison_id = chat.number, str(chat.comparison_id)
        async with chat.voting:
            if not again and chat.number == number and choice == chat.choice and chat.phase == "voted":
                return (*(gr.skip(),) * 5, chat)
            before = (chat.choice, chat.edit)
            if chat.number == number:  # else the exchange it is about is settled, and has what was picked before
                chat.choice, chat.edit = choice, edit
            try:
                answer = await self.client.vote(who, comparison_id, ballot(choice, edit))
            except Problem as problem:
                if chat.number != number:
                    gr.Warning(f"Your pick is not saved. {problem}")
                    return _left()
                chat.choice, chat.edit = before
                chat.problem = f"Your pick is not saved. {problem}"
                return cards.exchange(chat), gr.skip(), gr.skip(), gr.skip(), _shown(problem.needs_key), chat
            if chat.number != number:
                return _left()
            chat.reveal(answer.get("choices"))
            chat.phase, chat.problem, chat.saved = "voted", "", _saved(choice, edit)
        line = await self.line(chat, who)
        return (cards.exchange(chat), line, gr.skip(), gr.skip(), gr.skip(), chat) if chat.number == number else _left()

    async def undo(self, chat: Chat, who: Visitor) -> tuple[Any, ...]:
        """Withdraw the vote."""
        number, comparison_id = chat.number, str(chat.comparison_id)
        async with chat.voting:
            try:
                await self.client.withdraw(who, comparison_id)
            except Problem as problem:
                if chat.number != number:
                    gr.Warning(f"Your pick could not be taken back. {problem}")
                    return _left()
                chat.problem = f"Your pick could not be taken back. {problem}"
                return cards.exchange(chat), gr.skip(), gr.skip(), gr.skip(), gr.skip(), chat
            if chat.number != number:
                return _left()
            chat.choice = chat.edit = chat.editing = None
            chat.phase, chat.problem, chat.saved, chat.drafts = "choosing", "", "Your pick is taken back.", {}
        line = await self.line(chat, who)
        return (cards.exchange(chat), line, _shown(False), gr.skip(), gr.skip(), chat) if chat.number == number else _left()

    async def save_edit(self, text: str, chat: Chat, identity: Any, request: gr.Request) -> tuple[Any, ...]:
        """exchange, status, edit panel, edit box, key panel, chat: the edited reply is the vote now."""
        text, index = (text or "").strip(), chat.editing
        if index is None:
            gr.Warning("The server no longer knows which reply this was for. Please keep a copy, and open the conversation again from the list at the side.")
        if index is None or not text:
            return (*(gr.skip(),) * 5, chat)
        choice = "none" if index < 0 else index
        unchanged = index >= 0 and text == chat.replies[index].text.strip()
        exchange, line, _, *rest = await self.cast(chat, visitor_of(identity, request, chat), choice, None if unchanged else text)
        if saved := chat.phase == "voted" and not chat.problem:
            chat.editing = None
            chat.drafts.pop(index, None)
        return exchange, line, _shown(False) if saved else gr.skip(), *rest

    def cancel_edit(self, chat: Chat) -> tuple[Any, ...]:
        """edit panel, chat: what was written is not wanted."""
        if chat.editing is not None:
            chat.drafts.pop(chat.editing, None)
        chat.editing = None
        return _shown(False), chat

    async def line(self, chat: Chat, who: Visitor) -> str:
        """The status line as of now."""
        try:
            status = await self.client.status(who)
        except Problem:
            status = {}
        return cards.status(status_line(status, saved=chat.saved, live_when_opened=chat.live_when_opened))

    async def restart(self, chat: Chat, identity: Any, request: gr.Request, draft: str = "") -> tuple[Any, ...]:
        """thread, exchange, send, stop, edit panel, history, chat: a new conversation."""
        if _unsaved(chat, draft):
            return (*(gr.skip(),) * 6, chat)
        fresh = Chat().after(chat)
        chat.phase, chat.number = "stopped", fresh.number  # whatever is under way for it is no longer shown
        return await self._switched(fresh, visitor_of(identity, request, chat))

    async def past(self, chat: Chat, identity: Any, request: gr.Request, event: gr.EventData, draft: str = "") -> tuple[Any, ...]:
        """The same outputs: an old conversation was opened or erased."""
        if event._data.get("act") != "erase" and _unsaved(chat, draft):
            return (*(gr.skip(),) * 6, chat)
        who, data, fresh = visitor_of(identity, request, chat), event._data, Chat().after(chat)
        chosen = str(data.get("id") or "")
        chat.phase = "stopped" if chat.phase == "streaming" else chat.phase  # Gradio has cancelled what was being written
        try:
            if data.get("act") == "erase":
                await self.client.erase(who, chosen)
                if chosen != chat.conversation_id:
                    return await self._stays(chat, who)
            else:
                fresh = Chat.reopened(await self.client.conversation(who, chosen)).after(chat)
        except Problem as problem:
            gr.Warning(str(problem))
            return await self._stays(chat, who)
        chat.number = fresh.number
        return await self._switched(fresh, who)

    async def older(self, chat: Chat, identity: Any, request: gr.Request) -> tuple[str, Chat]:
        """history, chat: more of the past conversations are to be listed."""
        chat.listed = min(chat.listed + MORE, MOST_LISTED)
        return await self.listed(visitor_of(identity, request, chat), chat), chat

    async def _switched(self, chat: Chat, who: Visitor) -> tuple[Any, ...]:
        return (
            cards.thread(chat), cards.exchange(chat), _shown(True), _shown(False), _shown(False),
            await self.listed(who, chat), chat,
        )

    async def _stays(self, chat: Chat, who: Visitor) -> tuple[Any, ...]:
        """The conversation stays, with what was being written stopped."""
        return gr.skip(), _exchange(chat), _shown(True), _shown(False), gr.skip(), await self.listed(who, chat), chat

    async def refresh(self, typed: str, chat: Chat, identity: Any, request: gr.Request) -> tuple[Any, ...]:
        """box, history after an exchange. A message that was not answered is given back, unless the next one is being written."""
        back = chat.message if chat.phase == "failed" and not typed.strip() else gr.skip()
        return back, await self.listed(visitor_of(identity, request, chat), chat)

    def keep_key(self, key: str, identity: Any) -> tuple[Any, ...]:
        """identity, key box: remember the key in this browser; an empty one forgets it."""
        return new_identity(identity) | {"key": (key or "").strip()}, ""


def _take_in(chat: Chat, batch: list[Piece]) -> str | None:
    """Add the pieces; the conversation that they name."""
    for piece in batch:
        chat.add(piece.index, piece.text, piece.finish_reason)
        chat.comparison_id = piece.comparison_id or chat.comparison_id
    return next((piece.conversation_id for piece in batch if piece.conversation_id), None)


def _open_editor(chat: Chat, index: int | None, draft: str) -> tuple[Any, ...]:
    index = -1 if index is None else index  # a reply written from nothing
    if chat.editing is not None:
        chat.drafts[chat.editing] = draft or ""  # not saved, and not lost
    chat.editing, chat.problem = index, ""
    text = chat.drafts.get(index, _as_saved(chat, index))
    label = f"Make reply {index + 1} better" if index >= 0 else "Write the reply you would have liked"
    return cards.exchange(chat), gr.skip(), _shown(True), gr.update(value=text, label=label), gr.skip(), chat


def _as_saved(chat: Chat, index: int) -> str:
    """What the editor of a reply begins with: its last saved edit, or the reply."""
    return chat.edit if chat.edit and chat.choice in (index, "none") else chat.replies[index].text if index >= 0 else ""


def _unsaved(chat: Chat, draft: str) -> bool:
    """Whether the open editor holds a reply that somebody wrote and has not saved; then says so."""
    if chat.editing is None or (draft or "").strip() in ("", _as_saved(chat, chat.editing).strip()):
        return False
    gr.Warning("You are writing a better reply. Please save it first, or cancel it.")
    return True


def _index(data: dict[str, Any], chat: Chat) -> int | None:
    try:
        index = int(data["index"])
    except (KeyError, TypeError, ValueError):
        return None
    return index if 0 <= index < len(chat.replies) else None


def _saved(choice: Any, edit: str | None) -> str:
    if edit:
        return "Your better reply is saved."
    return {"tie": "Your tie is saved.", "none": "Saved: none of these was good."}.get(choice, "Your pick is saved.")


def _exchange(chat: Chat) -> Any:
    """The open exchange, or what the page shows where the server has none."""
    return gr.skip() if chat.phase == "empty" else cards.exchange(chat)


def _left() -> tuple[Any, ...]:
    """Outputs of `act` that change nothing: the page shows another exchange by now, which this is not about."""
    return (gr.skip(),) * 6


def _shown(visible: bool) -> Any:
    return gr.update(visible=visible)


def build_chat(api_url: str, client: ApiClient | None = None) -> gr.Blocks:
    """The chat page, talking to the API at `api_url`. Mount it with `ui.mount`, which brings its styles and keys."""
    on = _Page(client or ApiClient(api_url))
    with gr.Blocks(title="Plaudit", analytics_enabled=False, fill_width=True) as page:
        identity = gr.BrowserState(None, storage_key="plaudit.visitor", secret="plaudit.visitor")
        chat = gr.State(Chat())
        with gr.Sidebar(open=False, width=280, elem_id="sidebar"):
            fresh = gr.Button("New conversation", elem_id="fresh", size="md")
            history = gr.HTML(cards.past([], None), js_on_load=ACTING, elem_id="history", apply_default_css=False)
            gr.HTML(cards.keys_switch(), js_on_load=None, elem_id="keys", apply_default_css=False)
        masthead = gr.HTML(cards.masthead("chat"), elem_id="top", js_on_load=None, apply_default_css=False)
        with gr.Column(elem_id="page"):
            with gr.Column(visible=False, elem_id="key-panel", elem_classes="sheet") as key_panel:
                key = gr.Textbox(
                    label="Key", type="password", elem_id="key",
                    info="This server asks for a key. It is kept in this browser only.",
                )
                keep = gr.Button("Use this key", variant="primary", elem_id="use-key")
            thread = gr.HTML(cards.thread(Chat()), js_on_load=ACTING, elem_id="thread", apply_default_css=False)
            exchange = gr.HTML("", js_on_load=ACTING, elem_id="exchange", apply_default_css=False)
            with gr.Column(visible=False, elem_id="editor", elem_classes="sheet") as editor:
                draft = gr.Textbox(label="Make it better", lines=4, max_lines=12, elem_id="draft", autofocus=True)
                with gr.Row():
                    save = gr.Button("Save as the best reply", variant="primary", elem_id="save-edit")
                    drop = gr.Button("Cancel", elem_id="cancel-edit")
        with gr.Column(elem_id="dock"):
            with gr.Row(elem_id="composer"):
                box = gr.Textbox(
                    show_label=False, label="Your message", placeholder="Write a message", lines=1, max_lines=6,
                    autofocus=True, container=False, scale=1, elem_id="box",
                )
                replies = gr.Dropdown(
                    [(f"{n} replies", n) for n in range(2, MAX_REPLIES + 1)], value=2, label="How many replies",
                    show_label=False, container=False, filterable=False, elem_id="replies", min_width=104, scale=0,
                )
                send = gr.Button("Send", variant="primary", elem_id="send", scale=0, min_width=84)
                stop = gr.Button("Stop", variant="secondary", elem_id="stop", scale=0, min_width=84, visible=False)
            status = gr.HTML(cards.status(""), elem_id="status", js_on_load=None, apply_default_css=False)
            shown, before = gr.Textbox(visible=False), gr.Textbox(visible=False)
        timer = gr.Timer(POLL_S)

        opened = [identity, masthead, history, status, key_panel]
        talk = [box, thread, exchange, send, stop, editor, key_panel, chat]
        acted = [exchange, status, editor, draft, key_panel, chat]
        switched = [thread, exchange, send, stop, editor, history, chat]
        page.load(on.opened, [identity, chat], opened, **HIDDEN).then(on.came_back, [before, chat, identity], switched, js=BEFORE, **HIDDEN)
        timer.tick(on.tick, [identity, chat], [masthead, status, key_panel], **HIDDEN)
        streams = [
            box.submit(on.typed, [box, replies, shown, chat, identity, draft], talk, js=SHOWN, **HIDDEN),
            send.click(on.typed, [box, replies, shown, chat, identity, draft], talk, js=SHOWN, **HIDDEN),
            thread.ask(on.asked, [box, replies, chat, identity], talk, **HIDDEN),
            exchange.ask(on.asked, [box, replies, chat, identity], talk, **HIDDEN),
        ]
        for stream in streams:
            stream.then(on.refresh, [box, chat, identity], [box, history], **HIDDEN)
        stop.click(on.stop, [chat], [exchange, send, stop, chat], cancels=streams, **HIDDEN)
        exchange.act(on.act, [draft, chat, identity], acted, trigger_mode="multiple", **HIDDEN)  # a quick second key is one, too
        save.click(on.save_edit, [draft, chat, identity], acted, **HIDDEN)
        draft.submit(on.save_edit, [draft, chat, identity], acted, **HIDDEN)
        drop.click(on.cancel_edit, [chat], [editor, chat], **HIDDEN)
        fresh.click(on.restart, [chat, identity, draft], switched, cancels=streams, **HIDDEN)
        history.older(on.older, [chat, identity], [history, chat], **HIDDEN)
        history.act(on.past, [chat, identity, draft], switched, cancels=streams, **HIDDEN)
        for trigger in (keep.click, key.submit):
            trigger(on.keep_key, [key, identity], [identity, key], **HIDDEN).then(on.opened, [identity, chat], opened, **HIDDEN)
    page.queue(default_concurrency_limit=None, api_open=False)
    return page
