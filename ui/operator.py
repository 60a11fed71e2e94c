"""The operator page: what is live, what the learner is doing, versions and rounds, and the few things one can do about them.

Owns which event changes what on the page. HTML is in `ui.figures`, the wire in `ui.client`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from ui import cards, figures
from ui.client import ApiClient, Problem, Visitor
from ui.sentences import version_name
from ui.theme import ACTING, HIDDEN
from ui.visitor import new_identity, visitor_of

POLL_S = 3.0


class _Page:
    """The event handlers of the operator page, over one client."""

    def __init__(self, client: ApiClient) -> None:
        self.client = client

    async def opened(self, identity: Any, request: gr.Request) -> tuple[Any, ...]:
        """identity, then what `look` gives."""
        identity = new_identity(identity)
        return identity, *await self.look(visitor_of(identity, request))

    async def tick(self, identity: Any, request: gr.Request) -> tuple[Any, ...]:
        """What `look` gives, asked for every few seconds."""
        return await self.look(visitor_of(identity, request))

    async def look(self, who: Visitor) -> tuple[Any, ...]:
        """masthead, live tile, learner tile, charts, versions, rounds, trouble, key panel."""
        calls = (self.client.adapters(who), self.client.learner(who), self.client.rounds(who), self.client.stats(who))
        adapters, learner, rounds, stats = await asyncio.gather(*calls, return_exceptions=True)
        failed = [found for found in (adapters, learner, rounds, stats) if isinstance(found, BaseException)]
        problems = [failure for failure in failed if isinstance(failure, Problem)]
        for failure in failed:
            if failure not in problems:
                raise failure
        trouble = f'<p class="problem" role="alert">{cards.trouble(problems[0])}</p>' if problems else ""
        asks_key = any(isinstance(p, Problem) and p.status in (401, 403) for p in problems)
        if isinstance(adapters, BaseException):
            return (*(gr.skip(),) * 6, trouble, gr.update(visible=asks_key))
        counts = stats if isinstance(stats, dict) else {}
        history = rounds if isinstance(rounds, list) else []
        return (
            cards.masthead("operator", adapters.get("live")),
            figures.overview(adapters, counts),
            figures.learner(learner) if isinstance(learner, dict) else "",
            figures.charts(history),
            figures.versions(adapters),
            figures.rounds(history),
            trouble,
            gr.update(visible=asks_key),
        )

    async def act(self, identity: Any, request: gr.Request, event: gr.EventData) -> tuple[Any, ...]:
        """pending, confirmation, question, said: run, pause and resume at once; promote and roll back after asking."""
        act, version = event._data.get("act"), str(event._data.get("version") or "")
        if act in ("run", "pause", "resume"):
            return None, gr.update(visible=False), gr.skip(), cards.status(await self.steer(visitor_of(identity, request), act))
        if act not in ("promote", "rollback") or not version:
            return None, gr.update(visible=False), gr.skip(), gr.skip()
        verb = "Make" if act == "promote" else "Go back to"
        rest = " live? New messages go to it at once; running replies finish where they are." if act == "promote" else (
            "? New messages go to it at once, and the learner builds on it from now on.")
        return (act, version), gr.update(visible=True), f"<p>{verb} <strong>{version_name(version)}</strong>{rest}</p>", ""

    async def steer(self, who: Visitor, action: str) -> str:
        """Tell the learner; what came of it, in words."""
        try:
            await self.client.steer_learner(who, action)
        except Problem as problem:
            return cards.trouble(problem)
        return {"run": "A round starts as soon as the learner is free.", "pause": "The learner is paused.",
                "resume": "The learner goes on."}[action]

    async def confirmed(self, pending: Any, identity: Any, request: gr.Request) -> tuple[Any, ...]:
        """pending, confirmation, said."""
        if not pending:
            return None, gr.update(visible=False), gr.skip()
        act, version = pending
        who = visitor_of(identity, request)
        try:
            if act == "rollback" and (before := (await self.client.adapters(who)).get("previous")) != version:
                raise Problem(f"The version before the live one is {version_name(before) if before else 'none'} by now: look again.")
            answer = await (self.client.promote(who, version) if act == "promote" else self.client.rollback(who))
        except Problem as problem:
            return None, gr.update(visible=False), cards.status(cards.trouble(problem))
        return None, gr.update(visible=False), cards.status(f"Done: {version_name(answer.get('live') or version)} is live.")

    def keep_key(self, key: str, identity: Any) -> tuple[Any, ...]:
        """identity, key box."""
        return new_identity(identity) | {"key": (key or "").strip()}, ""


def _part(elem_id: str, value: str = "", acting: bool = False) -> gr.HTML:
    return gr.HTML(value, elem_id=elem_id, js_on_load=ACTING if acting else None, apply_default_css=False)


def build_operator(api_url: str, client: ApiClient | None = None) -> gr.Blocks:
    """The operator page, talking to the API at `api_url`. Mount it with `ui.mount`, which brings its styles."""
    on = _Page(client or ApiClient(api_url))
    with gr.Blocks(title="Plaudit: operator", analytics_enabled=False, fill_width=True) as page:
        identity = gr.BrowserState(None, storage_key="plaudit.visitor", secret="plaudit.visitor")
        pending = gr.State(None)
        masthead = _part("top", cards.masthead("operator"))
        with gr.Column(elem_id="desk"):
            gr.HTML('<h1 class="title">Operator</h1>', js_on_load=None, apply_default_css=False)
            trouble = _part("trouble")
            with gr.Column(visible=False, elem_id="key-panel", elem_classes="sheet") as key_panel:
                key = gr.Textbox(
                    label="Operator's key", type="password", elem_id="key",
                    info="This page needs an operator's key. It is kept in this browser only.",
                )
                keep = gr.Button("Use this key", variant="primary", elem_id="use-key")
            with gr.Row(elem_id="tiles", equal_height=True):
                live = _part("live", acting=True)
                learner = _part("learner", acting=True)
            said = _part("said", cards.status(""))
            with gr.Column(visible=False, elem_id="confirm", elem_classes="sheet") as confirm:
                question = _part("question")
                with gr.Row():
                    yes = gr.Button("Yes, do it", variant="primary", elem_id="confirm-yes")
                    no = gr.Button("Cancel", elem_id="confirm-no")
            charts = _part("charts")
            gr.HTML("<h2>Versions</h2>", js_on_load=None, apply_default_css=False)
            versions = _part("versions", acting=True)
            gr.HTML("<h2>Rounds</h2>", js_on_load=None, apply_default_css=False)
            rounds = _part("rounds")
        timer = gr.Timer(POLL_S)

        seen = [masthead, live, learner, charts, versions, rounds, trouble, key_panel]
        page.load(on.opened, [identity], [identity, *seen], **HIDDEN)
        timer.tick(on.tick, [identity], seen, **HIDDEN)
        for part in (live, learner, versions):
            part.act(on.act, [identity], [pending, confirm, question, said], **HIDDEN).then(on.tick, [identity], seen, **HIDDEN)
        yes.click(on.confirmed, [pending, identity], [pending, confirm, said], **HIDDEN).then(on.tick, [identity], seen, **HIDDEN)
        no.click(lambda: (None, gr.update(visible=False)), None, [pending, confirm], **HIDDEN)
        for trigger in (keep.click, key.submit):
            trigger(on.keep_key, [key, identity], [identity, key], **HIDDEN).then(on.opened, [identity], [identity, *seen], **HIDDEN)
    page.queue(default_concurrency_limit=None, api_open=False)
    return page
