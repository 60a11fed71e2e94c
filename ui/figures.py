"""The operator page's HTML: what is live, the learner, versions, rounds, and small charts drawn as SVG.

Pure functions from the API's JSON to HTML. A field that is missing or odd shows as a dash, never as an error.
"""

from __future__ import annotations

from typing import Any

from ui.render import plain
from ui.sentences import STATES, clock, count, fraction, number, version_name

JSON = dict[str, Any]
DASH = '<span class="dash" title="not reported">–</span>'
STATUSES = {"live": "good", "candidate": "new", "retired": "", "rejected": "bad"}
ROUND_STATES = {
    "pass": "passed", "not_ready": "not ready", "finetuning": "learning from edits", "training_reward": "training the reward model", "ppo": "practising",
    "gating": "being checked",
}
STATS = (
    ("conversations", "conversations"), ("comparisons", "comparisons"), ("votes", "votes"),
    ("demonstrations", "edited replies"), ("rounds", "rounds"), ("adapters", "versions"),
)


def find(row: Any, *paths: str) -> Any:
    """The first of `paths` (`reward.accuracy`) that leads somewhere in nested objects, or None."""
    for path in paths:
        found = row
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if found is not None:
            return found
    return None


def percent(value: Any) -> str:
    """`0.734` as `73%`."""
    found = number(value)
    return DASH if found is None else f"{100 * found:.0f}%"


def decimal(value: Any, digits: int = 2) -> str:
    """A number to so many digits."""
    found = number(value)
    return DASH if found is None else f"{found:.{digits}f}"


def pair(value: Any) -> tuple[float, float] | None:
    """An interval from `[low, high]` or `{"low", "high"}`."""
    if isinstance(value, dict):
        value = [find(value, "low", "lower"), find(value, "high", "upper")]
    if isinstance(value, (list, tuple)) and len(value) == 2:
        low, high = number(value[0]), number(value[1])
        if low is not None and high is not None:
            return low, high
    return None


def accuracy_of(row: JSON) -> tuple[Any, Any]:
    """Held-out accuracy of the reward model, and its interval: `{"value", "low", "high"}` or a bare number."""
    found = find(row, "reward.accuracy")
    return (find(found, "value"), found) if isinstance(found, dict) else (found, find(row, "reward.accuracy_interval"))


def kl_of(row: JSON) -> Any:
    """KL from the reference in nats a reply: as the gate measured it, else as PPO did."""
    return find(row, "gate.kl", "ppo.kl")


def win_rate_of(row: JSON) -> Any:
    """Win rate against the version that was live, as the gate's held-out judges expect it."""
    return find(row, "gate.win_rate")


def checks_of(gate: Any) -> list[JSON]:
    """The checks of a gate's verdict."""
    checks = find(gate, "checks")
    return [check for check in checks if isinstance(check, dict)] if isinstance(checks, list) else []


def failing(gate: Any) -> list[str]:
    """The names of the checks that failed, in words."""
    bad = [c for c in checks_of(gate) if c.get("passed") is False]
    return [str(c.get("name") or "a check").replace("_", " ") for c in bad]


def verdict(gate: Any) -> str:
    """The gate's verdict, what failed, and how much of its change a version has that was shrunk to pass."""
    said = find(gate, "verdict") if isinstance(gate, dict) else gate
    if not isinstance(said, str):
        return DASH
    said_of_it, share = failing(gate), find(gate, "share")
    if isinstance(share, int | float) and share < 1:
        said_of_it.append(f"with {share:.0%} of its change")
    good = said.lower() in ("pass", "passed")
    detail = f'<small>{plain(", ".join(said_of_it))}</small>' if said_of_it else ""
    return f'<span class="badge {"good" if good else "bad"}">{"passed" if good else plain(said)}</span>{detail}'


def overview(adapters: JSON, stats: JSON) -> str:
    """What is live, since when, and what is behind it."""
    live = adapters.get("live") or find(stats, "deployment.live")
    rows = versions_of(adapters)
    row = next((r for r in rows if r.get("version") == live), {})
    since = clock(find(adapters, "live_since") or find(stats, "deployment.live_since") or row.get("created"))
    previous = find(adapters, "previous") or find(stats, "deployment.previous")
    candidate = find(adapters, "candidate") or find(stats, "deployment.candidate")
    more = [f"Before it: {version_name(previous)}" if previous else "", f"Candidate: {version_name(candidate)}" if candidate else ""]
    known = [(words, number(find(stats, f"counts.{name}", name))) for name, words in STATS]
    counts = "".join(f"<div><dt>{words}</dt><dd>{int(n):,}</dd></div>" for words, n in known if n is not None)
    back = (
        f'<button type="button" class="choice" data-act="rollback" data-version="{plain(previous)}">Roll back to {version_name(previous)}</button>'
        if previous else ""
    )
    return (
        f'<section class="tile" aria-labelledby="live-h"><h2 id="live-h">Live now</h2><p class="big">{version_name(live) if live else DASH}</p>'
        f'<p class="note">{" · ".join(filter(None, [f"since {since}" if since else "", *more]))}</p>{back}'
        f'<dl class="counts">{counts}</dl></section>'
    )


def learner(state: JSON) -> str:
    """What the learner is doing, with buttons, if there is one."""
    name = "off" if state.get("off") else state.get("state")
    words = STATES.get(name, plain(name or "Unknown")) if isinstance(name, str) else "Unknown"
    done = fraction(state.get("progress"))
    working = name in ("finetuning", "training_reward", "ppo", "gating")
    bar = ""
    if working:
        now = "" if done is None else f' value="{done:.3f}"'
        bar = f'<progress max="1"{now} aria-label="Progress"></progress><span class="note">{percent(done) if done is not None else ""}</span>'
    left, pending = number(state.get("votes_until_next_round")), number(state.get("votes_pending"))
    facts = [
        f"round {int(n)}" if (n := number(state.get("round"))) is not None and working else "",
        f"{count(int(pending), 'new vote')}" if pending is not None else "",
        f"{int(left)} more until the next round" if left and not working else "",
        "paused: no round follows this one" if working and state.get("paused") else "",
    ]
    reason = "".join(f'<p class="note">{plain(text)}</p>' for text in (state.get("reason"), _verdict_words(state)) if text)
    pause = ("resume", "Resume") if state.get("paused") else ("pause", "Pause")
    buttons = "" if name == "off" else (
        '<div class="choices"><button type="button" class="choice" data-act="run">Run a round now</button>'
        f'<button type="button" class="choice" data-act="{pause[0]}">{pause[1]}</button></div>'
    )
    return (
        f'<section class="tile" aria-labelledby="learner-h"><h2 id="learner-h">Learner</h2><p class="big {plain(name or "")}">{words}</p>'
        f'<div class="bar">{bar}</div><p class="note">{" · ".join(filter(None, facts))}</p>{reason}{buttons}</section>'
    )


def _verdict_words(state: JSON) -> str:
    last = state.get("last_verdict")
    if isinstance(last, dict):
        last = find(last, "text", "words", "verdict")
    return f"Last round: {ROUND_STATES.get(last, last)}" if isinstance(last, str) and last else ""


def versions_of(adapters: JSON) -> list[JSON]:
    """The version rows, newest first, `base` last."""
    rows = [r for r in adapters.get("data") or [] if isinstance(r, dict)]
    if rows and not any(r.get("version") == "base" for r in rows):  # the model itself can be live as well
        rows.append({"version": "base", "status": "live" if adapters.get("live") == "base" else "retired"})
    return sorted(rows, key=lambda r: str(r.get("version") or "") if r.get("version") != "base" else "", reverse=True)


def versions(adapters: JSON) -> str:
    """The table of versions."""
    live, rows = adapters.get("live"), versions_of(adapters)
    if not rows:
        return '<p class="note">No versions yet: the first comes out of the first round that passes its gate.</p>'
    body = []
    for row in rows:
        name, status = plain(row.get("version") or ""), str(row.get("status") or "")
        button = ""
        if row.get("version") != live and status != "rejected" and name:
            button = f'<button type="button" class="quiet" data-act="promote" data-version="{name}" aria-label="Promote {name}">Promote</button>'
        won = row.get("win_rate")
        people = find(won, "value", "rate") if isinstance(won, dict) else won
        judged, against = number(row.get("win_votes")), row.get("against")
        over = f'<small>{count(int(judged), "vote")}{" against " + plain(against) if against else ""}</small>' if judged else ""
        why = f'<small class="problem">{plain(row["reason"])}</small>' if row.get("reason") else ""
        body.append([
            f"<code>{name or DASH}</code>", f'<span class="badge {STATUSES.get(status, "")}">{plain(status) or DASH}</span>',
            plain(row.get("parent") or "") or DASH, plain(row.get("round") if row.get("round") is not None else "") or DASH,
            f"{percent(people)}{over}", f"{verdict(row.get('gate'))}{why}", clock(row.get("created")) or DASH, button,
        ])  # fmt: skip
    return _table(
        "Versions", ("Version", "Status", "Made from", ">Round", ">People's win rate", "Gate", "Made", ""), body
    )


def rounds(rows: list[JSON]) -> str:
    """The table of rounds, newest first."""
    if not rows:
        return '<p class="note">No rounds yet.</p>'
    body = []
    for row in sorted(rows, key=lambda r: number(r.get("round")) or 0, reverse=True):
        value, interval = accuracy_of(row)
        found = pair(interval)
        spread = f'<small>{100 * found[0]:.0f}–{100 * found[1]:.0f}%</small>' if found else ""
        words = find(row, "ppo.note") if row.get("version") else find(row, "reason", "reward.words")
        state = plain(ROUND_STATES.get(str(row.get("state")), row.get("state") or ""))
        why = f"<small>{plain(words)}</small>" if isinstance(words, str) else ""
        votes = number(row.get("votes"))
        body.append([
            plain(row.get("round", "")), f"{state or DASH}{why}", str(int(votes)) if votes is not None else DASH, f"{percent(value)}{spread}",
            decimal(kl_of(row)), percent(win_rate_of(row)), verdict(row.get("gate")),
            plain(row.get("version") or "") or DASH, clock(row.get("ended") or row.get("started")) or DASH,
        ])  # fmt: skip
    return _table(
        "Rounds",
        ("Round", "State", ">Votes", ">Held-out accuracy", ">KL (nats)", ">Win rate", "Gate", "Version", "Ended"),
        body,
    )


def _table(caption: str, columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """rows: the cells' HTML, the first names its row. A column's ">" means numbers. Where a phone shows a row as a card, each cell carries its heading."""
    names, kinds = [c.lstrip(">") for c in columns], [" class=n" if c[:1] == ">" else "" for c in columns]
    heads = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(names, kinds, strict=True))
    body = []
    for first, *cells in rows:
        rest = "".join(
            f'<td{kind} data-name="{name}">{cell}</td>' for name, kind, cell in zip(names[1:], kinds[1:], cells, strict=True)
        )
        body.append(f'<tr><th scope="row" data-name="{names[0]}">{first}</th>{rest}</tr>')
    return (
        f'<div class="table" role="region" tabindex="0" aria-label="{caption}"><table><thead><tr>{heads}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody></table></div>'
    )


def charts(rows: list[JSON]) -> str:
    """Held-out accuracy, KL and win rate, a point for each round."""
    rows = sorted(rows, key=lambda r: number(r.get("round")) or 0)[-40:]
    if not rows:
        return ""
    per_round = [
        ("Reward model: held-out accuracy", lambda r: accuracy_of(r)[0], lambda r: pair(accuracy_of(r)[1]), True, 0.5, "chance"),
        ("Win rate expected against live", win_rate_of, lambda r: pair(find(r, "gate.win_rate_interval")), True, 0.5, "even"),
        ("KL from the reference (nats)", kl_of, lambda r: None, False, None, ""),
    ]
    drawn = []
    for title, value_of, interval_of, share, line, mark in per_round:
        points = [(number(r.get("round")) or 0, number(value_of(r)), interval_of(r)) for r in rows]
        drawn.append(chart(title, points, "Round", share=share, line=line, mark=mark))
    tested = next((r for r in reversed(rows) if find(r, "reward.learning_curve") or find(r, "reward.reliability")), {})
    drawn += [
        chart("Accuracy against votes, last round", curve_of(tested, "learning_curve", "votes", "accuracy"), "Votes", line=0.5, mark="chance"),
        chart("Right, against how sure it was", curve_of(tested, "reliability", "confidence", "right"), "Confidence", line="diagonal"),
    ]
    return f'<div class="charts">{"".join(drawn)}</div>'


Point = tuple[float, float | None, tuple[float, float] | None]  # x, value, interval


def curve_of(row: JSON, name: str, x: str, y: str) -> list[Point]:
    """The points of one curve in a round's reward report."""
    found = find(row, f"reward.{name}")
    points = [(number(p.get(x)), number(p.get(y))) for p in found if isinstance(p, dict)] if isinstance(found, list) else []
    return [(a, b, None) for a, b in points if a is not None]


def chart(title: str, points: list[Point], names: str, *, share: bool = True, line: float | str | None = None, mark: str = "") -> str:
    """One SVG chart of points in the order of x, which `names` names. A share runs from 0% to 100%. `line` is drawn dashed
    and named `mark`: at a height, or "diagonal", where x and y are equal."""
    known = [(x, v, i) for x, v, i in points if v is not None]
    if not known:
        return f'<figure class="chart"><figcaption>{plain(title)}</figcaption><p class="note">Nothing measured yet.</p></figure>'
    width, height, left, top, right, bottom = 320, 150, 36, 12, 12, 22
    low, high = (0.0, 1.0) if share else (0.0, max(1e-9, 1.15 * max(v for _, v, _ in known)))
    first, last = (0.5, 1.0) if line == "diagonal" else (min(x for x, _, _ in known), max(x for x, _, _ in known))

    def across(x: float) -> float:
        return left + (width - left - right) * ((min(last, max(first, x)) - first) / (last - first) if last > first else 0.5)

    def up(v: float) -> float:
        return top + (height - top - bottom) * (1 - (min(high, max(low, v)) - low) / (high - low))

    def label(v: float) -> str:
        return f"{v * 100:.0f}%" if share else f"{v:.3g}"

    def place(x: float) -> str:
        return f"{x * 100:.0f}%" if line == "diagonal" else f"{x:.0f}"

    parts = [
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{up(v):.1f}" y2="{up(v):.1f}"/>'
        f'<text class="tick" x="{left - 6}" y="{up(v) + 3.5:.1f}" text-anchor="end">{label(v)}</text>'
        for v in (low, (low + high) / 2, high)
    ]
    if line == "diagonal":
        parts.append(f'<line class="level" x1="{across(first):.1f}" x2="{across(last):.1f}" y1="{up(first):.1f}" y2="{up(last):.1f}"/>')
    elif isinstance(line, float):
        aside = 11 if known[-1][1] > line else -4  # the newest point lies at the mark's end, on the other side of the line
        parts.append(
            f'<line class="level" x1="{left}" x2="{width - right}" y1="{up(line):.1f}" y2="{up(line):.1f}"/>'
            f'<text class="tick" x="{width - right}" y="{up(line) + aside:.1f}" text-anchor="end">{mark}</text>'
        )
    for x, _, interval in known:
        if interval:
            parts.append(f'<line class="spread" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{up(interval[0]):.1f}" y2="{up(interval[1]):.1f}"/>')
    path = " ".join(f"{'L' if i else 'M'}{across(x):.1f} {up(v):.1f}" for i, (x, v, _) in enumerate(known))
    parts.append(f'<path class="line" d="{path}"/>')
    parts += [
        f'<circle cx="{across(x):.1f}" cy="{up(v):.1f}" r="3.5"><title>{names} {place(x)}: {label(v)}</title></circle>' for x, v, _ in known
    ]
    for end in dict.fromkeys((first, last)):
        anchor = "end" if first < end == last else "middle"  # a wide last number would leave the picture
        parts.append(f'<text class="tick" x="{across(end):.1f}" y="{height - 6}" text-anchor="{anchor}">{place(end)}</text>')
    newest = known[-1]
    return (
        f'<figure class="chart"><figcaption>{plain(title)}<b>{label(newest[1])}</b></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{plain(title)}: {label(newest[1])} at {names.lower()} {place(newest[0])}">'
        f'{"".join(parts)}</svg></figure>'
    )
