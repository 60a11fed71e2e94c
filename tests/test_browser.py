"""The pages in a real browser: first against a tiny API, then against a real server that really learns."""

from __future__ import annotations

import gc
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from gradio.state_holder import SessionState

from tests.test_ui import ATTACKS
from tests.ui_fake import TEXTS, Fake

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; `make venv` installs it")
expect = playwright_api.expect
pytestmark = pytest.mark.browser

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
IMAGES = Path(__file__).parents[1] / "docs" / "img"
PATIENCE_MS = 20_000
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium); the pages are tested in a real browser only")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """One browser profile on one site, and what went wrong in it."""

    def __init__(self, chromium: Any, url: str, **options: Any) -> None:
        self.url, self.foreign, self.errors = url, [], []
        self.context = chromium.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("request", self._request)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", self._dialog)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(request.url)

    def _dialog(self, dialog: Any) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, path: str = "/") -> Any:
        self.page.goto(self.url + path)
        self.page.wait_for_selector("#box textarea" if path == "/" else ".tile")
        # the voter id is made when the page's first event comes back
        self.page.wait_for_function("() => document.querySelector('.masthead .live')")
        return self.page

    def send(self, text: str) -> None:
        self.page.fill("#box textarea", text)
        self.page.keyboard.press("Enter")
        expect(self.page.locator("#exchange .bubble")).to_contain_text(text)
        self.page.wait_for_selector("[data-phase=choosing] .choices button")


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[Fake, str]]:
    import ui

    fake = Fake()
    config = uvicorn.Config(fake.app(), port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    sock = config.bind_socket()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    config.app = ui.mount(config.app, url)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    until(lambda: server.started)
    yield fake, url
    server.should_exit = True
    thread.join()
    sock.close()


@pytest.fixture
def fake(site: tuple[Fake, str]) -> Fake:
    fake, _ = site
    fake.__init__()  # type: ignore[misc]
    return fake


@pytest.fixture
def visit(chromium: Any, site: tuple[Fake, str], fake: Fake) -> Iterator[Visit]:
    visit = Visit(chromium, site[1])
    yield visit
    visit.context.close()
    assert visit.foreign == [], "the page asked another host"
    assert visit.errors == []


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for `true()`; fails when it never is."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def status_says(page: Any, text: str) -> None:
    expect(page.locator("#status")).to_contain_text(text)


def test_a_newcomer_clicks_an_example_and_picks_a_reply_with_a_click(visit: Visit, fake: Fake) -> None:
    fake.pause_s = 0.05
    page = visit.open()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Pick the one you like")
    page.get_by_role("button", name="Tell me about the moon").click()
    page.wait_for_selector('[data-phase="streaming"] .card .prose-box p')
    assert page.locator("button.pick").count() == 0, "a reply that is still being written cannot be picked"
    page.wait_for_selector("button.pick")
    assert page.locator(".card").count() == 2
    assert "v000001" not in page.inner_text("#exchange"), "which version wrote a reply is told after the vote only"
    page.locator(".card").nth(1).click()
    page.wait_for_selector(".card.chosen")
    assert fake.votes == [{"comparison": "cmp-1", "favourite": 1}]
    expect(page.locator(".card .version")).to_have_text([re.compile("v000001"), re.compile("the original model")])
    status_says(page, "Your pick is saved. 5 more until the next update.")


def test_keys_pick_tie_none_and_edit(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    visit.send("Hello")
    page.keyboard.press("2")
    page.wait_for_selector('.card.chosen [data-index="1"]')
    page.keyboard.press("1")
    page.wait_for_selector('.card.chosen [data-index="0"]')
    page.keyboard.press("t")
    page.wait_for_selector('[data-act="tie"][aria-pressed="true"]')
    page.keyboard.press("n")
    page.wait_for_selector('[data-act="none"][aria-pressed="true"]')
    page.keyboard.press("2")
    page.wait_for_selector('.card.chosen [data-index="1"]')
    page.keyboard.press("e")
    page.fill("#draft textarea", "A better reply")
    page.click("#save-edit")
    expect(page.locator(".card.chosen .prose-box")).to_have_text("A better reply")
    status_says(page, "Your better reply is saved.")
    assert [{k: v for k, v in vote.items() if k != "comparison"} for vote in fake.votes] == [
        {"favourite": 1}, {"favourite": 0}, {"verdict": "tie"}, {"verdict": "none"}, {"favourite": 1},
        {"favourite": 1, "edit": "A better reply"}]
    page.keyboard.press("u")
    page.wait_for_selector("[data-phase=choosing]")
    assert fake.withdrawn == ["cmp-1"]


def test_letters_typed_into_the_box_are_not_votes(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    visit.send("Hello")
    page.keyboard.press("/")
    page.keyboard.type("1234 tenure")
    expect(page.locator("#box textarea")).to_have_value("1234 tenure")
    page.keyboard.press("Escape")
    page.keyboard.press("3")  # there is no third reply
    time.sleep(0.5)
    assert fake.votes == []


def test_enter_while_replies_are_written_sends_nothing_and_leaves_one_writing(visit: Visit, fake: Fake) -> None:
    fake.pause_s = 0.2
    page = visit.open()
    page.get_by_role("button", name="What are bees?").click()
    page.wait_for_selector(".card .prose-box p:not(.dots)")
    page.fill("#box textarea", "and what")
    page.focus("#box textarea")
    page.keyboard.press("Enter")
    fake.pause_s = 0
    page.wait_for_selector("[data-phase=choosing] .choices button")
    page.keyboard.type(" is nice to them")  # a T is a tie and an N is none, where nobody is writing
    expect(page.locator("#box textarea")).to_have_value("and what is nice to them")
    time.sleep(0.5)
    assert fake.votes == [] and len(fake.asked) == 1


def test_a_better_reply_that_is_not_saved_is_not_lost_by_going_on(visit: Visit, fake: Fake) -> None:
    fake.conversations = [{"conversation_id": "conv-7", "title": "What are bees?", "updated": time.time()}]
    page = visit.open()
    visit.send("Hello")
    page.keyboard.press("2")
    page.wait_for_selector('.card.chosen [data-index="1"]')
    page.keyboard.press("e")
    expect(page.locator("#draft textarea")).to_be_focused()  # the page brings one there, a moment after the panel has come
    page.fill("#draft textarea", "My own words")
    ways = (lambda: page.click("#send"), *(lambda it=it: page.evaluate(f"document.querySelector('{it}').click()") for it in ("#fresh", "#history .open")))
    for way in ways:  # no focus is asked for: the editor may still be taking it
        page.eval_on_selector("#box textarea", "box => { box.value = 'And now?'; box.dispatchEvent(new Event('input', { bubbles: true })) }")
        way()
        expect(page.get_by_text("Please save it first").last).to_be_visible()
        expect(page.locator("#draft textarea")).to_have_value("My own words")
        expect(page.locator("#exchange .bubble")).to_contain_text("Hello")
        page.get_by_label("close").or_(page.locator(".toast-close")).last.click()
        expect(page.get_by_text("Please save it first")).to_have_count(0)
        until(lambda: page.evaluate("sessionStorage.getItem('plaudit.box')") == "And now?")  # what was held back is kept as what was never sent
    assert len(fake.asked) == 1
    page.click("#save-edit")
    until(lambda: fake.votes[-1].get("edit") == "My own words")
    expect(page.locator("#editor")).to_be_hidden()
    page.click("#send")
    until(lambda: len(fake.asked) == 2)
    assert fake.asked[1]["messages"][1]["content"] == "My own words"


def test_what_is_in_the_box_outlives_a_reload_and_a_look_at_the_operators_page(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    page.fill("#box textarea", "Half a thought")
    page.reload()
    expect(page.locator("#box textarea")).to_have_value("Half a thought")
    visit.open("/operator/")
    visit.open()
    expect(page.locator("#box textarea")).to_have_value("Half a thought")
    page.focus("#box textarea")
    page.keyboard.type(" more")
    page.keyboard.press("Enter")
    expect(page.locator("#exchange .bubble")).to_contain_text("Half a thought more")
    page.wait_for_selector("[data-phase=choosing] .choices button")
    page.reload()
    page.wait_for_selector("[data-phase=choosing] .choices button")
    time.sleep(0.5)
    assert page.input_value("#box textarea") == "" and len(fake.asked) == 1


def test_a_reload_shows_the_conversation_again_until_another_is_begun(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    visit.send("Hello")
    visit.open("/operator/")
    visit.open()
    page.wait_for_selector('[data-conversation="conv-1"][data-phase=choosing]')
    page.locator(".card").nth(1).click()
    page.wait_for_selector(".card.chosen")
    assert fake.votes == [{"comparison": "cmp-7", "favourite": 1}]
    page.click("#sidebar .toggle-button")
    page.click("#fresh")
    page.wait_for_selector("section.welcome")
    page.reload()
    page.wait_for_function("() => document.querySelector('.masthead .live')")
    time.sleep(1)
    assert page.locator("section.welcome").is_visible() and page.locator("#exchange .card").count() == 0


def test_a_long_text_is_not_cut_in_the_box(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    page.fill("#box textarea", "word " * 8000 + "end")
    page.keyboard.press("Enter")
    until(lambda: fake.asked)
    assert fake.asked[0]["messages"][0]["content"].endswith("word end")


def test_a_key_that_is_needed_all_at_once_can_be_given(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    fake.key = "plaudit-now"
    page.wait_for_selector("#key input")
    page.fill("#key input", "plaudit-now")
    page.click("#use-key")
    expect(page.locator("#key-panel")).to_be_hidden()


def test_single_keys_can_be_switched_off_for_good(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    page.evaluate("document.querySelector('#single-keys').click()")
    visit.send("Hello")
    page.keyboard.press("2")
    time.sleep(0.5)
    assert fake.votes == [] and not page.locator(".hint .keys").is_visible()
    page.reload()
    expect(page.locator("#single-keys")).to_have_attribute("aria-pressed", "false")
    page.evaluate("document.querySelector('#single-keys').click()")
    visit.send("Hello again")
    page.keyboard.press("2")
    page.wait_for_selector('.card.chosen [data-index="1"]')


def test_of_keys_in_quick_succession_the_last_counts(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    visit.send("Hello")
    fake.vote_s = 0.3
    page.keyboard.press("1")
    page.keyboard.press("2")
    page.wait_for_selector('.card.chosen [data-index="1"]')
    time.sleep(1.0)  # Gradio may hand over the first after the second
    assert fake.votes[-1]["favourite"] == 1 and page.locator('.card.chosen [data-index="1"]').count() == 2


def test_a_page_outlives_the_servers_memory_of_it(visit: Visit, fake: Fake) -> None:
    """A server that was started anew, and a phone that was locked for an hour: Gradio has no state of the page any more."""
    page = visit.open()
    fake.conversations = [{"conversation_id": "conv-9", "title": "Bees", "updated": time.time()}]
    visit.send("Hello")
    page.click("#sidebar .toggle-button")
    page.click("#history [data-act=open]")
    page.wait_for_selector('[data-conversation="conv-9"]')

    def forget() -> None:
        for session in [found for found in gc.get_objects() if type(found) is SessionState]:
            session.state_data.clear()

    forget()
    page.locator(".card").nth(1).click()
    page.wait_for_selector('.card.chosen [data-index="1"]')
    assert fake.votes == [{"comparison": "cmp-7", "favourite": 1}]
    forget()
    visit.send("And why?")
    assert [m["content"] for m in fake.asked[-1]["messages"]][:1] == ["What are bees?"]
    expect(page.locator(".thread")).to_contain_text("What are bees?")


def test_the_pick_and_its_edit_carry_the_conversation_on(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    visit.send("First")
    page.keyboard.press("2")
    page.wait_for_selector(".card.chosen")
    visit.send("Second")
    page.keyboard.press("1")
    page.wait_for_selector(".card.chosen")
    page.keyboard.press("e")
    page.fill("#draft textarea", "Mine")
    page.click("#save-edit")
    expect(page.locator(".card.chosen .prose-box")).to_have_text("Mine")
    visit.send("Third")
    assert fake.asked[2]["messages"] == [
        {"role": "user", "content": "First"}, {"role": "assistant", "content": TEXTS[1]},
        {"role": "user", "content": "Second"}, {"role": "assistant", "content": "Mine"},
        {"role": "user", "content": "Third"}]
    on = {"choice": "active", "conversation_id": "conv-1"}
    assert [body.get("metadata") for body in fake.asked] == [{"choice": "active"}, on, on]
    assert page.locator("#thread .answered").count() == 2


def test_four_replies_can_be_asked_for(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    page.click("#replies input")
    page.get_by_role("option", name="4 replies").click()
    visit.send("Hello")
    page.keyboard.press("4")
    page.wait_for_selector(".card.chosen")
    assert (fake.asked[0]["n"], fake.votes[0]["favourite"]) == (4, 3)


def test_stop_ends_the_request_itself_and_it_can_be_tried_again(visit: Visit, fake: Fake) -> None:
    fake.pause_s = 1.0
    page = visit.open()
    page.get_by_role("button", name="What are bees?").click()
    page.wait_for_selector(".card .prose-box p:not(.dots)")
    page.click("#stop")
    page.wait_for_selector("[data-phase=stopped]")
    until(lambda: fake.cut_off == 1, 5)
    assert page.locator("button.pick").count() == 0
    fake.pause_s = 0
    page.keyboard.press("r")
    page.wait_for_selector("button.pick")
    assert [body["messages"] for body in fake.asked] == [[{"role": "user", "content": "What are bees?"}]] * 2


def test_closing_the_page_ends_the_request(chromium: Any, site: tuple[Fake, str], fake: Fake) -> None:
    fake.pause_s = 1.0
    visit = Visit(chromium, site[1])
    visit.open().get_by_role("button", name="What are bees?").click()
    visit.page.wait_for_selector(".card .prose-box p:not(.dots)")
    assert fake.cut_off == 0
    visit.context.close()
    until(lambda: fake.cut_off == 1, 10)
    assert len(fake.asked) == 1


def test_a_message_that_could_not_be_answered_is_kept_in_the_box(visit: Visit, fake: Fake) -> None:
    fake.break_after = 4
    page = visit.open()
    page.fill("#box textarea", "Precious words")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The model ran out of memory.")
    expect(page.locator("#box textarea")).to_have_value("Precious words")
    assert "Traceback" not in page.inner_text("body")


def test_what_a_model_writes_cannot_act_in_the_page(visit: Visit, fake: Fake) -> None:
    fake.texts = ("\n\n".join(ATTACKS), "\n\n".join(reversed(ATTACKS)), "${document.title = 'owned'}", "{{7*7}}")
    page = visit.open()
    page.click("#replies input")
    page.get_by_role("option", name="4 replies").click()
    visit.send("<img src=x onerror=alert(1)> ${alert(1)}")
    assert page.title() == "Plaudit"
    assert page.locator("#exchange :is(script, img, iframe, style, form, meta, base, link, object)").count() == 0
    assert page.locator("#exchange a:not([href^='http'])").count() == 0
    assert "{{7*7}}" in page.inner_text("#exchange")
    assert "${document.title = 'owned'}" in page.inner_text("#exchange")
    # and visit's teardown: no dialog, no request to another host


def test_a_visitor_is_the_same_after_a_reload_and_another_in_another_browser(
    visit: Visit, chromium: Any, site: tuple[Fake, str], fake: Fake
) -> None:
    def voter_of(page: Any) -> str:
        fake.headers.clear()
        page.reload()
        until(lambda: any("plaudit-voter" in h for h in fake.headers))
        time.sleep(1)
        (voter,) = {h["plaudit-voter"] for h in fake.headers}
        return voter

    page = visit.open()
    page.wait_for_function("() => localStorage.getItem('plaudit.visitor')")
    time.sleep(0.5)
    first = voter_of(page)
    assert len(first) >= 20 and voter_of(page) == first
    page.goto("about:blank")
    other = Visit(chromium, site[1])
    other.open()
    time.sleep(0.5)
    assert voter_of(other.page) != first
    other.context.close()


def test_a_server_with_keys_asks_for_one_and_remembers_it(visit: Visit, fake: Fake) -> None:
    fake.key = "plaudit-secret"
    page = visit.page
    page.goto(visit.url)
    expect(page.get_by_label("Key")).to_be_visible()
    status_says(page, "This server needs a key.")
    page.get_by_label("Key").fill("plaudit-secret")
    page.click("#use-key")
    expect(page.get_by_label("Key")).to_be_hidden()
    visit.open()
    visit.send("Hello")
    assert fake.headers[-1]["authorization"] == "Bearer plaudit-secret"


def test_the_page_says_that_it_learns_and_that_a_new_version_is_live(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    fake.status |= {"learner_state": "training_reward", "votes": 16, "progress": 0.4}
    status_says(page, "The assistant is learning from 16 picks: training the reward model … 40%")
    fake.status |= {"learner_state": "idle", "live": "v000002", "live_since": time.time(), "votes_until_next_round": 16}
    status_says(page, "A new version, v000002, went live at")
    expect(page.locator(".masthead .live")).to_have_text("v000002")


def test_past_conversations_open_and_can_be_erased(visit: Visit, fake: Fake) -> None:
    fake.conversations = [{"conversation_id": "conv-7", "title": "What are bees?", "updated": time.time()}]
    page = visit.open()
    page.click("#sidebar .toggle-button")
    page.click("#history .open")
    expect(page.locator("#exchange .card")).to_have_count(2)
    expect(page.locator("#exchange .bubble")).to_contain_text("What are bees?")
    visit.page.remove_listener("dialog", visit._dialog)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Erase: What are bees?").click()
    until(lambda: fake.erased == ["conv-7"])
    expect(page.locator(".past li")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(chromium: Any, site: tuple[Fake, str], fake: Fake, scheme: str) -> None:
    fake.texts = ("word " * 60 + "x" * 200, "| a | b |\n|---|---|\n" + "| long cell text | more |\n" * 3)
    visit = Visit(chromium, site[1], viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = visit.open()
    visit.send("Hello")
    wide = "() => document.documentElement.scrollWidth"
    assert page.evaluate(wide) <= 390
    fake.conversations = [{"conversation_id": "conv-7", "title": "What are bees?", "updated": time.time()}]
    page.reload()
    page.click("#sidebar .toggle-button")
    page.click("#history .open")
    expect(page.locator("#exchange .bubble")).to_contain_text("What are bees?")
    page.wait_for_function("() => !document.elementFromPoint(195, 780).closest('#sidebar')")  # the list is out of the way
    page.click("#sidebar .toggle-button")
    page.click("#fresh")
    page.wait_for_function("() => !document.elementFromPoint(195, 780).closest('#sidebar')")
    visit.send("Hello")
    tops = [card.bounding_box()["y"] for card in page.locator(".card").all()]
    assert tops[1] > tops[0] + 50, "cards are below each other"
    background = page.evaluate("() => getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    assert page.evaluate("() => document.querySelector('#send').getBoundingClientRect().bottom <= innerHeight")
    fake.adapters = {"live": "v000001", "previous": "base", "data": [{"version": "v000001", "status": "live"}, {"version": "v000002", "status": "candidate", "parent": "v000001"}]}
    visit.open("/operator/")
    promote = page.get_by_role("button", name="Promote v000002")
    promote.wait_for()
    assert page.evaluate(wide) <= 390
    assert page.evaluate("() => [...document.querySelectorAll('.table')].every(t => t.scrollWidth <= t.clientWidth)"), "a row is a card, nothing scrolls sideways"
    assert promote.bounding_box()["x"] + promote.bounding_box()["width"] <= 390
    visit.context.close()
    assert visit.errors == [] and visit.foreign == []


def test_everything_that_can_be_pressed_has_a_name(visit: Visit, fake: Fake) -> None:
    page = visit.open()
    visit.send("Hello")
    nameless = """() => [...document.querySelectorAll('button, a[href], input, textarea')]
        .filter(n => n.offsetParent && getComputedStyle(n).visibility === 'visible' && !(n.innerText || '').trim() && !n.getAttribute('aria-label')
                     && !n.title && !(n.labels && n.labels.length))
        .map(n => n.outerHTML.slice(0, 200))"""
    assert page.evaluate(nameless) == []
    page.get_by_role("button", name="Pick this: reply 2").click()
    expect(page.get_by_role("button", name="Picked: reply 2")).to_have_attribute("aria-pressed", "true")


def test_the_operator_promotes_only_after_confirming(visit: Visit, fake: Fake) -> None:
    fake.adapters = {"live": "v000001", "previous": "base", "data": [
        {"version": "v000001", "status": "live"}, {"version": "v000002", "status": "candidate"}]}
    page = visit.open("/operator")
    page.get_by_role("button", name="Promote v000002").click()
    page.get_by_text("Make v000002 live?").wait_for()
    page.click("#confirm-no")
    expect(page.locator("#confirm-yes")).to_be_hidden()
    assert fake.steered == []
    page.get_by_role("button", name="Promote v000002").click()
    page.click("#confirm-yes")
    expect(page.locator("#live .big")).to_have_text("v000002")
    page.get_by_role("button", name="Pause").click()
    until(lambda: fake.steered == ["promote v000002", "pause"])
