"""What a model or a person wrote, as HTML that cannot do anything.

Markdown is rendered with raw HTML off, images replaced by their description and only http(s) links, each followed by the
host it really leads to. Owns no layout. Everything the pages show of other people's text goes through here.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

LINK = re.compile(r"https?://[^\s/?#]", re.IGNORECASE)
# Characters that reorder or hide text, and controls other than tab and newline
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def plain(text: object) -> str:
    """`text` escaped for HTML, as text or inside a quoted attribute."""
    return html.escape(INVISIBLE.sub("", str(text)), quote=True)


@lru_cache(maxsize=512)
def markdown(text: str) -> str:
    """Markdown as safe HTML: no tags, images, scripts, styles or remote content can come out of it."""
    return _MARKDOWN.render(INVISIBLE.sub("", text))


def _allowed(url: str) -> bool:
    return bool(LINK.match(url))


def _netloc(url: str) -> str:
    """What names the host in `url`, a user before an @ included; all of it where it is none that a standard knows, such as one in square brackets."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return url


class _Renderer(RendererHTML):
    """HTML for markdown-it's tokens; images and links are ours."""

    def image(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
        """The description of an image in place of it: showing it would tell its host who reads this."""
        described = self.renderInlineAsText(tokens[index].children, options, env)
        return f'<span class="no-image">[image: {plain(described or "no description")}]</span>'

    def link_open(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
        """A link that tells its target nothing about where the reader came from."""
        href = plain(tokens[index].attrGet("href") or "")
        return f'<a href="{href}" rel="noopener noreferrer nofollow" target="_blank">'

    def link_close(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
        """The end of a link and, where its text does not say so, the host it leads to."""
        opening = next(i for i in range(index - 1, -1, -1) if tokens[i].type == "link_open")
        host = _netloc(str(tokens[opening].attrGet("href") or "")).rpartition("@")[2]  # a user may be named like another host
        shown = "".join(token.content for token in tokens[opening + 1 : index])
        return "</a>" if shown.startswith(("http://", "https://")) and _netloc(shown) == host else (
            f'</a> <span class="link-host">({plain(host)})</span>'
        )


def _markdown() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}, renderer_cls=_Renderer)
    parser.enable(["table", "strikethrough"]).disable(["html_block", "html_inline"])
    parser.validateLink = _allowed  # type: ignore[method-assign]
    # Ours start at h3, below the headings of the page
    parser.core.ruler.push("lower_headings", _lower_headings)
    return parser


def _lower_headings(state: object) -> None:
    for token in state.tokens:  # type: ignore[attr-defined]
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"


_MARKDOWN = _markdown()
