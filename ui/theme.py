"""How every page of ours is put on the server: local fonts, our style sheet, our keys, nothing from other hosts."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

HERE = Path(__file__).parent
FONTS = (gr.themes.Font("sans-serif"),)  # the style sheet names the system's own fonts; nothing is downloaded
ICON = (
    "<link rel='icon' href=\"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24'>"
    "<rect x='1' y='3' width='10' height='18' rx='3' fill='%23c9c5ba'/><rect x='13' y='3' width='10' height='18' rx='3' "
    "fill='%230b6b62'/></svg>\">"
)
MONO = (gr.themes.Font("monospace"),)


def theme() -> gr.themes.Base:
    """Gradio's plainest theme with the system's fonts."""
    return gr.themes.Base(
        primary_hue="teal", neutral_hue="stone", radius_size="lg", font=FONTS, font_mono=MONO
    )


def head() -> str:
    """What goes into the page's `<head>`: style and keys. Gradio's own `css=` would rewrite the selectors, badly."""
    style, keys = (HERE / "style.css").read_text(), (HERE / "keys.js").read_text()
    return f'<meta name="color-scheme" content="light dark">{ICON}<style>{style}</style><script>{keys}</script>'


ACTING = (HERE / "acting.js").read_text()
"""js_on_load of every gr.HTML with buttons in it."""

HIDDEN: dict = {"show_progress": "hidden", "api_visibility": "private"}
"""For every event: no spinner over the page, and nothing in Gradio's own public API."""
