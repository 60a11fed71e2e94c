"""`PUT` and `DELETE /v1/comparisons/{id}/vote`: one person's judgement of what they were shown.

A vote is answered only after a durable commit, and the answer says which version wrote which reply. What a vote
changes in what is served is `deployment.py`'s.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from server.access import User, runtime_of
from server.auth import Identity
from server.errors import ApiError
from server.runtime import Runtime
from server.schema import VoteRequest
from store.errors import NotFound
from store.records import Ballot, Comparison, Shown

router = APIRouter()
NOT_YOURS = "there is no such comparison of yours"


async def shown_to(runtime: Runtime, comparison_id: str, who: Identity, *, or_operator: bool = False) -> Comparison:
    """The comparison, if it was shown to this voter (or an operator may look). Raises 404."""
    comparison = await runtime.db(runtime.store.comparison, comparison_id)
    if comparison is None or not (comparison.voter == who.voter or (or_operator and who.operator)):
        raise ApiError(404, NOT_YOURS)
    return comparison


@router.put("/v1/comparisons/{comparison_id}/vote")
async def put_vote(comparison_id: str, body: VoteRequest, request: Request, who: User) -> JSONResponse:
    """Cast or replace a vote: 201 the first time, 200 after that."""
    runtime = runtime_of(request)

    def judge(shown: Shown) -> Ballot:
        if shown.voter != who.voter:
            raise NotFound(NOT_YOURS)
        kind, groups = body.judgement(len(shown.versions))
        return Ballot(comparison_id, who.voter, groups, kind, body.edit, body.comment)

    try:
        cast = await runtime.ballots.cast(comparison_id, judge)
    except NotFound:
        raise ApiError(404, NOT_YOURS) from None
    except ValueError as wrong:
        raise ApiError(400, str(wrong)) from wrong
    vote, shown = cast.vote, cast.shown
    runtime.metrics.votes.labels(vote.kind).inc()
    runtime.deployment.count(shown, who.voter, vote.groups)
    await runtime.deployment.weigh()  # raises nothing that a disk says: the vote is kept
    choices = [{"index": index, "version": version} for index, version in enumerate(shown.versions)]  # which version wrote which
    answer = {"vote_id": vote.id, "comparison_id": comparison_id, "kind": vote.kind, "choices": choices}
    return JSONResponse(answer, 201 if cast.first else 200)


@router.delete("/v1/comparisons/{comparison_id}/vote")
async def delete_vote(comparison_id: str, request: Request, who: User) -> dict[str, Any]:
    """Withdraw a vote: it leaves the next round's data, and the versions that learned from it are listed."""
    runtime = runtime_of(request)
    await shown_to(runtime, comparison_id, who)
    learned = await runtime.db(runtime.store.withdraw_vote, comparison_id, who.voter)
    if learned is None:
        raise ApiError(404, "you have no vote on this comparison")
    runtime.deployment.scoreboard.drop(comparison_id, who.voter)
    return {"comparison_id": comparison_id, "withdrawn": True, **learned}
