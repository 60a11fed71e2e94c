"""Who the person behind a browser is to the API: a random voter id that the browser keeps, and perhaps a key."""

from __future__ import annotations

import secrets
from typing import Any

import gradio as gr

from ui.client import Visitor
from ui.exchange import Chat


def new_identity(identity: Any, voter: str = "") -> dict[str, str]:
    """What this browser keeps: a random voter id, made once (`voter`, if it has spoken as that already), and perhaps a key."""
    known = identity if isinstance(identity, dict) else {}
    return {"voter": str(known.get("voter") or voter or secrets.token_urlsafe(18)), "key": str(known.get("key") or "")}


def visitor_of(identity: Any, request: gr.Request, chat: Chat | None = None) -> Visitor:
    """Who the browser behind `request` is. A new one's `identity` comes with its first answer: until then `chat` says who speaks."""
    known, headers = new_identity(identity, chat.speaker() if chat else ""), request.headers
    return Visitor(known["voter"], known["key"], headers.get("host") or "", headers.get("origin") or "")
