"""The chat page: type, watch the replies stream side by side, pick one, go on.

Its parts, and which event is answered by which of `ui.handlers`.
"""

from __future__ import annotations

import gradio as gr

from ui import cards
from ui.client import ApiClient
from ui.exchange import Chat
from ui.handlers import MAX_REPLIES, ChatHandlers
from ui.theme import ACTING, HIDDEN

POLL_S = 2.0
# The conversation that this tab showed before it was loaded anew (keys.js keeps its id)
BEFORE = "(before, ...rest) => [sessionStorage.getItem('plaudit.open') || '', ...rest]"
# A message goes with the conversation that the page shows; what it came with is left as it is
SHOWN = "(text, n, shown, ...rest) => [text, n, document.querySelector('section.exchange')?.dataset.conversation || '', ...rest]"


def build_chat(api_url: str, client: ApiClient | None = None) -> gr.Blocks:
    """The chat page, talking to the API at `api_url`. Mount it with `ui.mount`, which brings its styles and keys."""
    on = ChatHandlers(client or ApiClient(api_url))
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
