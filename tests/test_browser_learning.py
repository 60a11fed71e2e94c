"""The whole loop in a real browser: `plaudit serve` on the bundled model, picks made in the page, a new version live.

Nothing is faked: the server, its learner child, the reward model, PPO, the gate and the swap are the ones people get. A
round is made small, to be done in minutes on two shared cores; and as a handful of updates cannot prove much, the gate asks
for less proof here. That a full round makes the assistant better is what `benchmarks/learning.py` shows.

`PLAUDIT_SCREENSHOTS=1` also writes the pictures in docs/img/.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.test_browser import IMAGES, Visit, chromium, expect, until  # noqa: F401  (chromium is a fixture)

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[1]
ROUND_VOTES = 16
ENOUGH_S = 1200.0
QUICK = (
    "ppo.updates=4", "ppo.max_seconds=400", "gate.prompts=12", "gate.min_win_rate=0.1",
    "gate.max_broken_rise=0.5",
)
THINGS = (
    "the Moon", "bees", "the Sun", "rain", "cats", "dogs", "bread", "tea", "the ocean", "trees", "sleep", "music", "snow",
    "coffee", "birds", "honey", "football", "rainbows", "chess", "elephants", "glass", "salt", "rivers", "horses", "milk", "fire",
)
NETWORK = {"offline": False, "latency": 0, "uploadThroughput": -1}
SHOTS = os.environ.get("PLAUDIT_SCREENSHOTS") == "1"  # write docs/img/ while at it


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a freshly started `plaudit serve` with an empty data directory."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = " ".join(f"--set {setting}" for setting in QUICK)
    command = [
        sys.executable, "-m", "plaudit", "serve", "--port", str(port), "--data-dir", str(tmp_path / "data"),
        "--round-votes", str(ROUND_VOTES), "--threads", "1", "--seed", "7", "--max-tokens", "96", "--learner-nice", "0",
        "--learner-args", settings,
    ]
    log = tmp_path / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "OMP_WAIT_POLICY": "passive"})
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until(ready, 120)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
            raise AssertionError("the server did not stop within a minute of SIGTERM") from None
    assert "Traceback" not in log.read_text()


def friendliest(page: Any) -> int:
    """The index of the reply with the most exclamation marks, the shorter one of two: this test's taste."""
    texts = [body.inner_text().strip() for body in page.locator("#exchange .card .prose-box").all()]
    return max(range(len(texts)), key=lambda i: (texts[i].count("!"), -len(texts[i])))


def shot(page: Any, name: str) -> None:
    if SHOTS:
        IMAGES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=IMAGES / f"{name}.png")


def pictures_of_a_first_exchange(visit: Visit) -> int:
    """chat-streaming, chat-picked and chat-phone, on their own pages; how many picks were made for them."""
    desk = visit.context.new_page()
    phone = visit.context.new_page()
    phone.set_viewport_size({"width": 390, "height": 844})
    for page in (desk, phone):
        page.goto(visit.url)
        page.wait_for_selector(".masthead .live")
        slow = visit.context.new_cdp_session(page)  # a slow line, so that the picture shows replies half written
        slow.send("Network.enable")
        slow.send("Network.emulateNetworkConditions", NETWORK | {"downloadThroughput": 300})
        page.get_by_role("button", name="What are bees?", exact=True).click()
        if page is desk:
            page.wait_for_function("() => [...document.querySelectorAll('.card.writing .prose-box')].some(n => n.innerText.length > 30)")
            shot(page, "chat-streaming")
            assert page.locator(".card.writing").count(), "the replies were whole before the picture was taken"
        slow.send("Network.emulateNetworkConditions", NETWORK | {"downloadThroughput": -1})
        page.wait_for_selector("[data-phase=choosing]")
        page.keyboard.press(str(friendliest(page) + 1))
        page.wait_for_selector(".card.chosen")
        expect(page.locator("#status")).to_contain_text("Your pick is saved.", timeout=120_000)
        page.mouse.move(5, 400)
        page.wait_for_timeout(400)
        shot(page, "chat-picked" if page is desk else "chat-phone")
        page.close()
    return 2


def test_picks_made_in_the_page_bring_a_new_version_live_with_nothing_restarted(chromium: Any, served: str) -> None:  # noqa: F811
    visit = Visit(chromium, served)
    page = visit.open()
    page.set_default_timeout(120_000)
    expect(page.locator(".masthead .live")).to_have_text("the original model")
    page.click("#replies input")
    page.get_by_role("option", name="4 replies").click()
    news = page.locator("#status .news")
    picks = pictures_of_a_first_exchange(visit) if SHOTS else 0
    started = time.monotonic()

    while not news.count():
        assert time.monotonic() - started < ENOUGH_S, f"no new version after {picks} picks: {page.inner_text('#status')}"
        line = page.inner_text("#status")
        if picks and ("learning from" in line or "about to start" in line):  # keep out of the round's way
            time.sleep(1)
            continue
        page.click("#sidebar .toggle-button")  # a new conversation each time: short prompts, independent picks
        page.click("#fresh")
        page.click("#sidebar .toggle-button")
        page.wait_for_selector(".welcome")
        visit.send(f"Tell me about {THINGS[picks % len(THINGS)]}")
        best = friendliest(page)
        if picks % 2:
            page.keyboard.press(str(best + 1))
        else:
            page.locator("#exchange .card").nth(best).click()
        page.wait_for_selector(f'.card.chosen [data-index="{best}"]')
        expect(page.locator("#status")).to_contain_text("Your pick is saved.", timeout=120_000)
        picks += 1

    assert picks >= ROUND_VOTES
    said = page.inner_text("#status")
    assert re.search(r"A new version, v00000\d, went live at \d\d:\d\d", said), said
    version = re.search(r"v\d{6}", said)[0]  # type: ignore[index]
    shot(page, "chat-live")
    expect(page.locator(".masthead .live")).to_have_text(version)

    # the same page, never reloaded, talks to it: 4 replies of which some are the new version's
    visit.send("Tell me about gardens")
    page.keyboard.press(str(friendliest(page) + 1))
    page.wait_for_selector(".card.chosen .version")
    assert version in page.inner_text("#exchange .cards")

    operator = visit.context.new_page()
    operator.goto(f"{served}/operator")
    expect(operator.locator("#live .big")).to_have_text(version, timeout=60_000)
    expect(operator.locator("#versions tbody tr", has_text=version)).to_contain_text("passed")
    expect(operator.locator("#rounds tbody tr", has_text=version)).to_contain_text("%")
    if SHOTS:
        operator.wait_for_timeout(1000)
        operator.set_viewport_size({"width": 1280, "height": int(operator.evaluate("document.documentElement.scrollHeight"))})
        shot(operator, "operator")
    assert visit.foreign == [] and visit.errors == []
    # the context stays open: a server must be able to stop while people look at its pages
