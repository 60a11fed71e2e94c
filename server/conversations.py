"""`/v1/conversations` and `GET /v1/comparisons/{id}`: reading and erasing what was said.

Own ones only; operators may read and erase all. A comparison hides its versions until the one it was shown to has voted.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from server.access import User, runtime_of
from server.auth import Identity
from server.errors import ApiError
from server.runtime import Runtime
from server.votes import shown_to
from store.records import Comparison, Conversation

router = APIRouter()


def wire_comparison(comparison: Comparison) -> dict[str, Any]:
    """A comparison as the one it was shown to may see it, and operators with them."""
    cast = comparison.vote
    choices = []
    for completion in comparison.completions:
        choice = {"index": completion.index, "text": completion.text, "finish_reason": completion.finish_reason}
        if cast is not None:
            choice["version"] = completion.version
        choices.append(choice)
    vote = None
    if cast is not None:
        vote = {"vote_id": cast.id, "kind": cast.kind, "groups": cast.groups, "edit": cast.edit, "comment": cast.comment,
                "created": cast.created}
    return {
        "comparison_id": comparison.id,
        "conversation_id": comparison.conversation_id,
        "created": comparison.created,
        "messages": comparison.messages,
        "choices": choices,
        "vote": vote,
    }


@router.get("/v1/comparisons/{comparison_id}")
async def get_comparison(comparison_id: str, request: Request, who: User) -> dict[str, Any]:
    """One comparison; each reply's version only after the vote."""
    return wire_comparison(await shown_to(runtime_of(request), comparison_id, who, or_operator=True))


@router.get("/v1/conversations")
async def list_conversations(
    request: Request, who: User, limit: Annotated[int, Query(ge=1, le=1000)] = 50, mine: bool = False
) -> dict[str, Any]:
    """Newest first. An operator sees all, or with `mine` their own."""
    runtime = runtime_of(request)
    voter = None if who.operator and not mine else who.voter
    rows = await runtime.db(runtime.store.conversations, voter, limit)
    data = [
        {"conversation_id": row.id, "title": row.title, "created": row.created, "updated": row.updated,
         "mine": row.voter == who.voter}
        for row in rows
    ]
    return {"data": data}


@router.get("/v1/conversations/{conversation_id}")
async def get_conversation(conversation_id: str, request: Request, who: User) -> dict[str, Any]:
    """A conversation whole: its tree of messages and its comparisons in order."""
    conversation = await _theirs(runtime_of(request), conversation_id, who)
    messages = [
        {"id": m.id, "parent_id": m.parent_id, "role": m.role, "content": m.content, "created": m.created,
         "comparison_id": m.completion[0] if m.completion else None, "index": m.completion[1] if m.completion else None}
        for m in conversation.messages
    ]
    return {
        "conversation_id": conversation.id,
        "created": conversation.created,
        "messages": messages,
        "comparisons": [wire_comparison(comparison) for comparison in conversation.comparisons],
    }


@router.delete("/v1/conversations/{conversation_id}")
async def delete_conversation(conversation_id: str, request: Request, who: User) -> dict[str, Any]:
    """Erase: the words go, the votes leave, and the versions that learned from them are listed."""
    runtime = runtime_of(request)
    conversation = await _theirs(runtime, conversation_id, who)
    report = await runtime.db(runtime.store.erase_conversation, conversation_id, who.actor)
    await runtime.erasures.erased(conversation_id)
    for comparison in conversation.comparisons:
        runtime.deployment.scoreboard.drop(comparison.id)
    return {"conversation_id": conversation_id, "erased": True, **report}


async def _theirs(runtime: Runtime, conversation_id: str, who: Identity) -> Conversation:
    conversation = await runtime.db(runtime.store.conversation, conversation_id)
    if conversation is None or not (conversation.voter == who.voter or who.operator):
        raise ApiError(404, "there is no such conversation of yours")
    return conversation
