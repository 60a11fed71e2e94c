"""Simulated people: they chat with a running server over its HTTP API and vote by a known taste.

The same thing demonstrates, benchmarks and tests the loop. Talks HTTP only, like any client; knows nothing of how the
server learns.
"""

from __future__ import annotations

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx
import stamina

from learner.prompts import Conversation
from learner.tastes import Taste, UnknownTaste, favourite, taste_named, win_rate

Prompt = str | Conversation  # one thing to say, or a conversation that ends with it
RETRIES = 12
MAX_N = 8  # choices that one call may ask for (the HTTP contract)


class SimulateError(Exception):
    """The server cannot be used, or the prompts cannot; the message says what to do."""


class Busy(Exception):
    """429 or 503: worth another try."""


@dataclass(frozen=True)
class Report:
    """What happened, ready for JSON."""

    taste: str
    votes: int
    ties: int  # of those, votes that found no difference
    noise: float
    voters: int
    random_voters: int  # of those, so many pick at random
    seed: int
    seconds: float
    versions: dict[str, int]  # replies shown, by the version that wrote them
    mean_taste: dict[str, float]  # of those replies


class Client:
    """One connection to a server's API. Waits and tries again when it is busy. Raises SimulateError."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=300, trust_env=False)  # past any proxy: the key is nobody else's
        self.answered = False  # a server that has answered before is waited for; one that never has may not be there

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def call(self, method: str, path: str, body: Any = None, voter: str | None = None) -> Any:
        """One JSON call. A vote repeated after a lost answer replaces itself; a chat is sampled again."""
        headers = {"Plaudit-Voter": voter} if voter else {}
        answer: httpx.Response | None = None
        try:
            for attempt in stamina.retry_context(on=self.worth_another_try, attempts=RETRIES, timeout=120, wait_initial=0.2, wait_max=5):
                with attempt:
                    answer = self.http.request(method, path, json=body, headers=headers)
                    self.answered = True
                    if answer.status_code in (429, 503):
                        asked = answer.headers.get("Retry-After", "")
                        time.sleep(min(int(asked), 10) if asked.isdigit() else 0)
                        raise Busy
        except Busy:
            raise SimulateError("the server stayed busy") from None
        except httpx.InvalidURL as error:
            raise SimulateError(f"this is no address of a server: {error}") from None
        except httpx.TransportError as error:
            raise SimulateError(f"no answer from {self.http.base_url} ({type(error).__name__}). Is `plaudit serve` running there?") from None
        assert answer is not None
        try:
            found = answer.json()
            if answer.is_success:
                return found
            message = found["error"]["message"]
        except (ValueError, KeyError, TypeError):
            raise SimulateError(f"{self.http.base_url} answers, with status {answer.status_code}, but not as a Plaudit server does. Is the address right?") from None
        raise SimulateError(f"{method} {path}: {answer.status_code} {message}")

    def worth_another_try(self, error: Exception) -> bool:
        """Whether to wait and call again after `error`."""
        return isinstance(error, Busy) or (self.answered and isinstance(error, httpx.TransportError))

    def sample(self, prompt: Prompt, n: int, seed: int, *, model: str = "plaudit", voter: str | None = None, max_tokens: int | None = None) -> Any:
        """One comparison: the chat completion as the server answers it."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        body = {"model": model, "messages": messages, "n": n, "seed": seed}
        return self.call("POST", "/v1/chat/completions", body | ({"max_tokens": max_tokens} if max_tokens else {}), voter)

    def texts(self, prompt: Prompt, n: int, seed: int, **options: Any) -> list[str]:
        """The texts of `n` replies, in order, in as many calls as the server's limit of choices asks for."""
        calls = [self.sample(prompt, min(MAX_N, n - i), seed + 500_009 * i, **options) for i in range(0, n, MAX_N)]
        return [choice["message"]["content"] for call in calls for choice in call["choices"]]


def simulate(
    url: str, prompts: Sequence[Prompt], taste: str, *, votes: int = 60, noise: float = 0.1, voters: int = 4, random_voters: float = 0.0,
    n: int = 4, seed: int = 0, key: str | None = None, progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Cast `votes` votes of one taste, the voters taking turns on prompts drawn without replacement until all were used.

    random_voters: the share of the voters who have no taste and pick any reply, each as likely; the same ones throughout, so
    that they can be found out. Everything drawn here (prompts, noise, sampling seeds) follows `seed`. Raises SimulateError.
    """
    liking = known(taste)
    blind = round(random_voters * voters)
    if random_voters > 0 and not blind:
        raise SimulateError(f"{random_voters:.0%} of {voters} voters is nobody: give more voters")
    draw, began = random.Random(seed), time.monotonic()
    shown: Counter[str] = Counter()
    total: defaultdict[str, float] = defaultdict(float)
    ties = 0
    deck: list[Prompt] = []
    with Client(url, key) as client:
        for done in range(1, votes + 1):
            deck = deck or draw.sample(list(prompts), len(prompts))
            who = done % voters
            voter = f"simulated-{seed}-{who}"
            answer = client.sample(deck.pop(), n, draw.getrandbits(31), voter=voter)
            texts = [choice["message"]["content"] for choice in answer["choices"]]
            pick = draw.randrange(n) if who < blind else favourite(liking, texts, noise, draw)
            ties += pick is None
            vote = {"verdict": "tie"} if pick is None else {"favourite": pick}
            revealed = client.call("PUT", f"/v1/comparisons/{answer['plaudit']['comparison_id']}/vote", vote, voter)
            for choice, text in zip(revealed["choices"], texts, strict=True):
                shown[choice["version"]] += 1
                total[choice["version"]] += liking(text)
            if progress is not None:
                progress(done, votes)
    means = {version: total[version] / count for version, count in shown.items()}
    return Report(taste, votes, ties, noise, voters, blind, seed, time.monotonic() - began, dict(shown), means)


@dataclass(frozen=True)
class Standing:
    """How well a version knows a taste, on prompts nobody voted on."""

    win_rate: float  # of `version` against base (or `against`), ties half
    best_of: float  # what the taste's best of 8 base replies gets against the same: the most that reranking could reach
    ours: list[str]
    theirs: list[str]

    @property
    def share(self) -> float:
        """Win rate over the best-of-8's."""
        return self.win_rate / self.best_of


def standing(
    client: Client, taste: str, prompts: Sequence[Prompt], version: str, *, against: str = "plaudit@base",
    samples: int = 2, best_of: int = 8, seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> Standing:
    """Sample `version` and `against` on every prompt and let the taste judge. Both win rates are against the same replies.

    They are names like `plaudit@v000002`: of several replies by `plaudit`, some are those of the version before the live one.
    Raises SimulateError.
    """
    liking = known(taste)
    if bare := [name for name in (version, against) if "@" not in name]:
        raise SimulateError(f"name the version, such as {bare[0]}@base: of several replies by {bare[0]} some are another version's")
    ours: list[str] = []
    theirs: list[str] = []
    best: list[str] = []
    for i, prompt in enumerate(prompts):
        mine = client.texts(prompt, samples, seed * 1_000_003 + 3 * i, model=version)
        base = client.texts(prompt, samples, seed * 1_000_003 + 3 * i + 1, model=against)
        others = client.texts(prompt, best_of, seed * 1_000_003 + 3 * i + 2, model="plaudit@base")
        ours += mine
        theirs += base
        best += [max(others, key=liking)] * samples
        if progress is not None:
            progress(i + 1, len(prompts))
    return Standing(win_rate(liking, ours, theirs), win_rate(liking, best, theirs), ours, theirs)


def known(taste: str) -> Taste:
    """The taste's function. Raises SimulateError."""
    try:
        return taste_named(taste)
    except UnknownTaste as error:
        raise SimulateError(str(error)) from None
