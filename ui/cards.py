"""The chat page's HTML: welcome, settled turns, the replies side by side, past conversations.

Pure functions from state to HTML. Other people's words only get in through `ui.render`. Buttons carry `data-act`,
which acting.js turns into events.
"""

from __future__ import annotations

from typing import Any

from ui.exchange import Chat, Reply
from ui.render import markdown, plain
from ui.sentences import clock, version_name

EXAMPLES = ("Tell me about the moon", "Hello! Who are you?", "What are bees?", "Give me five facts about penguins")
MARK = (
    '<svg class="mark" viewBox="0 0 24 24" aria-hidden="true"><rect x="2" y="4" width="9" height="16" rx="3"/>'
    '<rect class="picked" x="13" y="4" width="9" height="16" rx="3"/><path d="m15.3 12.2 1.7 1.7 3-3.4"/></svg>'
)
OLDER = '<button type="button" class="choice older" data-act="older">Show older ones</button>'
OLDEST = '<p class="note">Conversations before these are kept, and not listed here.</p>'
TICK = '<svg class="tick" viewBox="0 0 16 16" aria-hidden="true"><path d="m3 8.5 3.2 3.2L13 4.8"/></svg>'


def masthead(page: str, live: Any = None) -> str:
    """The bar at the top. `page` is `chat` or `operator`."""
    other = '<a href="/operator">Operator</a>' if page == "chat" else '<a href="/">Chat</a>'
    badge = f'<span class="live" title="The version that answers now">{version_name(live)}</span>' if live else ""
    return (
        f'<header class="masthead {page}"><a class="brand" href="/" aria-label="Plaudit, start page">{MARK}<span>Plaudit</span></a>'
        f'{badge}<nav aria-label="Pages">{other}</nav></header>'
    )


def welcome() -> str:
    """What a newcomer sees first."""
    chips = "".join(
        f'<button type="button" class="chip" data-act="ask" data-text="{plain(text)}">{plain(text)}</button>' for text in EXAMPLES
    )
    return (
        '<section class="welcome"><h1>Every message gets several replies.<br>Pick the one you like.</h1>'
        "<p>The assistant learns from the picks while you chat, and gets better without a restart.</p>"
        f'<div class="chips" role="group" aria-label="Examples to try">{chips}</div></section>'
    )


def thread(chat: Chat) -> str:
    """The settled turns, or the welcome when there is nothing yet."""
    if not chat.turns:
        return welcome() if chat.phase == "empty" else ""
    rows = []
    for number, turn in enumerate(chat.turns):
        if number == chat.unseen and number:
            rows.append('<p class="note seam">The assistant no longer sees what is above</p>')
        rows.append(_said(turn.message))
        notes = [text for text in (plain(turn.note), f"written by {version_name(turn.version)}" if turn.version else "") if text]
        note = f'<p class="note">{" · ".join(notes)}</p>' if notes else ""
        body = f'<div class="prose-box" dir="auto">{markdown(turn.reply)}</div>' if turn.reply is not None else ""
        rows.append(f'<div class="answered{"" if body else " empty"}">{body}{note}</div>')
    return f'<section class="thread" aria-label="Conversation so far">{"".join(rows)}</section>'


def exchange(chat: Chat) -> str:
    """The open exchange: the message, its replies as cards, and what can be done with them."""
    if chat.phase == "empty":
        return ""
    cards = "".join(_card(chat, index, reply) for index, reply in enumerate(chat.replies))
    busy = "true" if chat.phase == "streaming" else "false"
    problem = f'<p class="problem" role="alert">{plain(chat.problem)}</p>' if chat.problem else ""
    hide_cards = chat.phase == "failed" and not any(reply.text for reply in chat.replies)
    shown = "" if hide_cards else f'<div class="cards" aria-busy="{busy}">{cards}</div>'
    ids = "".join(  # by which the page is found again should the server have forgotten it
        f' data-{name}="{plain(value)}"' for name, value in (("conversation", chat.conversation_id), ("comparison", chat.comparison_id)) if value
    )
    return (
        f'<section class="exchange k{len(chat.replies)} {chat.phase}" data-phase="{chat.phase}" data-turn="{chat.number}"{ids} '
        f'aria-label="Your message and its replies">{_said(chat.message)}{shown}{problem}{_choices(chat)}</section>'
    )


def _said(message: str) -> str:
    return f'<div class="asked"><div class="bubble" dir="auto"><span class="sr">You said: </span>{plain(message)}</div></div>'


def _card(chat: Chat, index: int, reply: Reply) -> str:
    n = index + 1
    votable = chat.phase in ("choosing", "voted") and chat.comparison_id is not None
    chosen = chat.choice == index
    classes = ["card", "chosen" if chosen else "passed" if chat.phase == "voted" and isinstance(chat.choice, int) else ""]
    version = f'<span class="version"><span class="sr">written by </span>{version_name(reply.version)}</span>' if reply.version else ""
    if chosen and chat.edit:
        version += '<span class="version edited">edited by you</span>'
    text = chat.edit if chosen and chat.edit else reply.text
    waiting = chat.phase == "streaming" and reply.finish_reason is None
    body = markdown(text) if text else ('<p class="dots" aria-label="Writing"><i></i><i></i><i></i></p>' if waiting else "<p class='note'>(nothing)</p>")
    cut = '<p class="note">Cut at the length limit.</p>' if reply.finish_reason == "length" else ""
    if chat.phase == "stopped" and reply.finish_reason is None:
        cut = '<p class="note">Stopped.</p>'
    if votable and (twin := chat.twin(index)) is not None and text == reply.text:
        cut += f'<p class="note">Word for word the same as reply {twin + 1}.</p>'
    buttons = '<footer class="waiting"></footer>' if chat.phase == "streaming" else ""
    several = len(chat.replies) > 1  # another client may have asked for one: nothing to compare it with
    if votable:
        label = "Picked" if chosen else "Pick this instead" if chat.phase == "voted" else "Pick this"
        pick = (
            f'<button type="button" class="pick" data-act="pick" data-index="{index}" aria-pressed="{str(chosen).lower()}" '
            f'aria-label="{label}: reply {n}">{TICK if chosen else ""}{label}</button>' if several else ""
        )
        edit = f'<button type="button" class="quiet" data-act="edit" data-index="{index}" aria-label="Edit reply {n}">Edit</button>'
        buttons = f"<footer>{pick}{edit}</footer>"
    clickable = f' data-card data-act="pick" data-index="{index}"' if votable and several and not chosen else ""
    writing = " writing" if waiting and text else ""
    return (
        f'<article class="{" ".join(filter(None, classes))}{writing}" aria-labelledby="reply-{n}"{clickable}>'
        f'<header><span class="key" aria-hidden="true">{n}</span><h2 id="reply-{n}"><span class="sr">Reply {n}</span></h2>{version}</header>'
        f'<div class="prose-box" dir="auto">{body}</div>{cut}{buttons}</article>'
    )


def _button(act: str, key: str, label: str, pressed: bool | None = None) -> str:
    state = "" if pressed is None else f' aria-pressed="{str(pressed).lower()}"'
    return f'<button type="button" class="choice" data-act="{act}"{state} aria-keyshortcuts="{key}">{label}<kbd aria-hidden="true">{key}</kbd></button>'


def _choices(chat: Chat) -> str:
    if chat.too_long:
        return f'<div class="choices">{_button("shorter", "R", "Try again without the oldest messages")}</div>'
    if chat.phase in ("stopped", "failed"):
        return f'<div class="choices">{_button("retry", "R", "Try again")}</div>'
    if chat.phase == "streaming" or chat.comparison_id is None:
        return '<div class="choices" role="group" aria-live="polite"></div>'
    several = len(chat.replies) > 1
    buttons = [_button("tie", "T", "Tie", chat.choice == "tie")] if several else []
    buttons += [_button("none", "N", "None good", chat.choice == "none")]
    if chat.phase == "voted":
        if chat.choice == "none":
            buttons += [_button("edit", "E", "Write a better one"), _button("retry", "R", "Try again")]
        buttons.append(_button("undo", "U", "Take back"))
        hint = '<span class="hint">Changed your mind? Pick again. Or write on: your next message follows your pick.</span>'
    else:
        keys = f"1–{len(chat.replies)}"
        hint = f'<span class="hint">Pick the reply you like<span class="keys">: click it, or press <kbd>{keys}</kbd></span></span>' if several else ""
    return f'<div class="choices" role="group" aria-live="polite">{hint}{"".join(buttons)}</div>'


def status(line: str) -> str:
    """The line under the box, read out to those who cannot see it change."""
    return f'<p role="status">{line}</p>'


def keys_switch() -> str:
    """The switch of the single keys; keys.js owns what it does."""
    return '<button type="button" id="single-keys" class="switch" aria-pressed="true">Single keys pick and vote</button>'


def trouble(problem: Exception) -> str:
    """A failed call, in the status line."""
    return f'<span class="problem">{plain(problem)}</span>'


def past(rows: list[dict[str, Any]], current: str | None, older: str = "") -> str:
    """The list of past conversations. older: what stands below it, OLDER or OLDEST where there are more."""
    if not rows:
        return '<p class="note">Your conversations will be listed here.</p>'
    items = []
    for row in rows:
        name = plain(row.get("conversation_id") or row.get("id") or "")
        title = plain(_title(row))
        here = ' aria-current="true"' if name and name == current else ""
        items.append(
            f'<li{here}><button type="button" class="open" data-act="open" data-id="{name}"><span dir="auto">{title}</span>'
            f'<small>{clock(row.get("updated") or row.get("created"))}</small></button>'
            f'<button type="button" class="erase" data-act="erase" data-id="{name}" aria-label="Erase: {title}" title="Erase" '
            'data-confirm="Erase this conversation? Its words and its votes will be gone.">×</button></li>'
        )
    return f'<ul class="past">{"".join(items)}</ul>{older}'


def _title(row: dict[str, Any]) -> str:
    title = row.get("title")
    return title.strip()[:80] if isinstance(title, str) and title.strip() else "Conversation"
