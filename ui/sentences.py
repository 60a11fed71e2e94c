"""What the server reports, in plain words: the learner's state, times, versions.

Pure functions from JSON to text. Missing, unknown or oddly typed fields never raise; they are left out.
"""

from __future__ import annotations

import math
import time
from datetime import datetime
from typing import Any

from ui.render import plain

WORKING = {
    "finetuning": "learning from the replies people wrote",
    "training_reward": "training the reward model",
    "ppo": "practising better replies",
    "gating": "checking that the new version is really better",
}
STATES = {
    "idle": "Waiting for votes",
    "finetuning": "Learning from edits",
    "training_reward": "Training the reward model",
    "ppo": "Practising (PPO)",
    "gating": "Checking the new version",
    "paused": "Paused",
    "degraded": "In trouble",
    "off": "Not running",
}


def number(value: Any) -> float | None:
    """`value` as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def count(n: int, noun: str) -> str:
    """`1 vote`, `2 votes`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def fraction(progress: Any) -> float | None:
    """How far the learner is, 0 to 1, from a number or an object that holds one."""
    if isinstance(progress, dict):
        for name in ("fraction", "progress", "done"):
            if (found := number(progress.get(name))) is not None:
                return min(1.0, max(0.0, found))
        step, steps = number(progress.get("step")), number(progress.get("steps"))
        return min(1.0, max(0.0, step / steps)) if step is not None and steps else None
    found = number(progress)
    return None if found is None else min(1.0, max(0.0, found))


def moment(value: Any) -> datetime | None:
    """A time in local time, from Unix seconds or ISO 8601."""
    try:
        if (seconds := number(value)) is not None:
            return datetime.fromtimestamp(seconds).astimezone()
        return datetime.fromisoformat(value.replace("Z", "+00:00")).astimezone() if isinstance(value, str) else None
    except (ValueError, OverflowError, OSError):
        return None


def clock(value: Any, now_s: float | None = None) -> str:
    """`14:03` today, `3 May 14:03` on another day, as a `<time>` element that the page turns to the reader's own clock."""
    when = moment(value)
    if when is None:
        return ""
    today = datetime.fromtimestamp(time.time() if now_s is None else now_s).astimezone().date()
    text = when.strftime("%H:%M") if when.date() == today else f"{when.day} {when.strftime('%b %H:%M')}"
    return f'<time datetime="{when.isoformat()}">{text}</time>'


def version_name(version: Any) -> str:
    """A version for people: `v000002`, or what `base` means."""
    name = plain(version or "")
    return "the original model" if name == "base" else name


def learning(status: dict[str, Any]) -> str:
    """What the assistant is doing with the votes: one sentence of HTML, perhaps empty."""
    state = status.get("learner_state") or status.get("state")
    if state in WORKING:
        votes = number(status.get("votes"))
        from_picks = f" from {count(int(votes), 'pick')}" if votes else ""
        done = fraction(status.get("progress"))
        # read out once, not at every percent
        percent = f' <span aria-hidden="true">… {round(done * 100)}%</span>' if done is not None else " …"
        return f"The assistant is learning{from_picks}: {WORKING[state]}{percent}"
    if state == "paused":
        return "Learning is paused. Your picks are kept for when it goes on."
    if state == "degraded":
        return "Learning has run into trouble and will try again. Chatting works as usual, and your picks are kept."
    if state == "off":
        return "Learning is switched off on this server. Your picks are kept."
    left = number(status.get("votes_until_next_round"))
    if left is None:
        return ""
    return f"{int(left)} more until the next update." if left > 0 else "The next update is about to start."


def status_line(
    status: dict[str, Any], *, saved: str = "", live_when_opened: Any = None, now_s: float | None = None
) -> str:
    """The line under the box. `saved` is what happened to the last vote, as a sentence."""
    live = status.get("live")
    parts = []
    if live and live_when_opened and live != live_when_opened:
        at = clock(status.get("live_since"), now_s)
        news = "A new version" if live != "base" else "The assistant is back at"
        name = f"{news}, {plain(live)}, went live" if live != "base" else f"{news} the original model"
        parts.append(f'<strong class="news">{name}{" at " + at if at else ""}.</strong>')
    if saved:
        parts.append(plain(saved))
    doing = learning(status)
    if doing:
        if doing[0].isdigit() and not saved:
            doing = doing.replace(" more until", " more pick" + ("" if doing.startswith("1 ") else "s") + " until", 1)
        parts.append(doing)
    return " ".join(parts)
