"""What the chat page does when something happens on it: a message is sent, a card is clicked, an old conversation is opened.

`ui.chat` says which event each answers. State is in `ui.exchange`, HTML in `ui.cards`, the wire in `ui.client`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from ui import cards
from ui.client import ApiClient, Piece, Problem, Visitor
from ui.exchange import Chat, ballot
from ui.pace import paced
from ui.sentences import status_line
from ui.visitor import new_identity, visitor_of

MAX_REPLIES = 4
MOST_LISTED = 999  # past conversations: the API gives a thousand at most
MORE = 100  # past conversations that "Show older ones" adds to the list


class ChatHandlers:
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
        at = clicked if isinstance(clicked := data.get("at"), int | float) else math.inf
        if chat.phase == "streaming" and at >= chat.cast_at and data.get("comparison") not in (None, chat.comparison_id):
            chat.cast_at = at if at < math.inf else chat.cast_at
            await self.late(chat, who, str(data["comparison"]), data)
            return (*(gr.skip(),) * 5, chat)
        if chat.phase not in ("empty", "choosing", "voted"):
            return (*(gr.skip(),) * 5, chat)
        if chat.comparison_id is None or chat.comparison_id != data.get("comparison"):
            gr.Warning("These replies are no longer the newest of this conversation. Please open it again, from the list at the side.")
            return (*(gr.skip(),) * 5, chat)
        if act == "edit":
            return _open_editor(chat, index, draft)
        if at < chat.cast_at:  # Gradio hands over quick clicks in any order; the last one counts
            return (*(gr.skip(),) * 5, chat)
        chat.cast_at = at if at < math.inf else chat.cast_at
        if act == "undo":
            return await self.undo(chat, who)
        choice = _choice(act, index)
        return (*(gr.skip(),) * 5, chat) if choice is None else await self.cast(chat, who, choice, None, again=False)

    async def late(self, chat: Chat, who: Visitor, comparison_id: str, data: dict[str, Any]) -> None:
        """A click that reaches us after the message that was sent behind it counts: Gradio hands over quick events in any order."""
        choice, undo = _choice(data.get("act"), _number(data)), data.get("act") == "undo"
        if choice is None and not undo:
            return
        try:
            async with chat.voting:
                await (self.client.withdraw(who, comparison_id) if undo else self.client.vote(who, comparison_id, ballot(choice, None)))
        except Problem as problem:
            gr.Warning(f"Your pick {'could not be taken back' if undo else 'is not saved'}. {problem}")
        else:
            gr.Info(f"Your pick is {'taken back' if undo else 'saved'}. Your next message was taken in before that, so the conversation goes on as it was.")

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
    index = _number(data)
    return index if index is not None and 0 <= index < len(chat.replies) else None


def _number(data: dict[str, Any]) -> int | None:
    """The reply that a click names, whether there is one of that number or not."""
    try:
        return int(data["index"])
    except (KeyError, TypeError, ValueError):
        return None


def _choice(act: Any, index: int | None) -> Any:
    """What a click says: the reply picked, "tie", "none", or None for anything else."""
    return index if act == "pick" else act if act in ("tie", "none") else None


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
