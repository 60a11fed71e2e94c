"""More candidates than are shown: scored as the learner scores, chosen, streamed, recorded, and kept out of the statistics."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.engine import Engine, SamplingParams
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import LearnerConfig, RewardConfig
from learner.reward import RewardModel
from server.candidates import POLICY, Candidates
from server.choice import choose
from server.heads import Reading, Unusable, newest_heads
from store.adapters import AdapterRegistry
from store.records import Comparison
from store.rounds import RoundFiles
from tests.serving import HELLO, Served, ask, publish_random, served, settings_for

ACTIVE = {"choice": "active"}


def seed_for(by_chance: bool, skip: int = 0) -> int:
    """A request's seed whose draw leaves the comparison to chance, or not, at a share of one half."""
    return [s for s in range(1000) if (random.Random(f"share/{s}").random() < 0.5) == by_chance][skip]


def save_round(root: Path, model: CausalModel, **fields: Any) -> RewardModel:
    """A finished round with a reward model of three random members, as the learner leaves it."""
    reward, draw = RewardModel.create(model, RewardConfig(), 3), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for member in reward.members:
            for value in member.parameters():
                value.copy_(torch.randn(value.shape, generator=draw))
    files = RoundFiles(root)
    n = files.begin()
    reward.save(files.directory(n) / "reward")
    files.finish(n, {"state": "failed", "base_digest": model.digest, "config": LearnerConfig().to_dict(), "last_seq": 0, **fields})
    return reward


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


@pytest.fixture(scope="module")
def reward(model: CausalModel, data_dir: Path) -> RewardModel:
    return save_round(data_dir / "rounds", model)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def running(tiny_llama: Path, data_dir: Path, reward: RewardModel) -> Iterator[Served]:
    publish_random(AdapterRegistry(data_dir / "adapters"), tiny_llama)
    settings = settings_for(data_dir, tiny_llama, candidates=6, random_share=0.5, mix_share=1.0)
    with served(settings) as server:
        server.until(lambda: server.runtime.deployment.live == "v000001")
        yield server


def stored(running: Served, answer: dict[str, Any]) -> Comparison:
    found = running.runtime.store.comparison(answer["plaudit"]["comparison_id"])
    assert found is not None
    return found


def texts(answer: dict[str, Any]) -> list[str]:
    return [c["message"]["content"] for c in answer["choices"]]


def test_the_servers_features_and_scores_are_the_learners(model: CausalModel, reward: RewardModel, data_dir: Path) -> None:
    heads = newest_heads(RoundFiles(data_dir / "rounds"), model.digest)
    assert heads is not None and heads.round == 1
    draw = random.Random(0)
    prompt = [draw.randrange(5, 300) for _ in range(11)]
    replies = [[draw.randrange(5, 300) for _ in range(n)] for n in (7, 1, 4, 9)]
    expected = reward.score([prompt] * 4, replies)
    for stretch in (1, 3, 100):
        reading, read = Reading(model, prompt, replies, 512), 0
        assert reading.left == 11 + 7 + 1 + 4 + 9
        while reading.left:
            read += reading.advance(stretch)
        assert read == 32
        torch.testing.assert_close(heads.scores(reading.features), expected, atol=1e-3, rtol=1e-4)


def test_a_long_prompt_loses_its_oldest_tokens_as_in_the_learner(model: CausalModel, reward: RewardModel) -> None:
    short = RewardModel(model, RewardConfig(max_tokens=12), reward.members)
    prompt, replies = list(range(10, 40)), [[50, 51, 52], [60, 61, 62]]
    reading = Reading(model, prompt, replies, 12)
    while reading.left:
        reading.advance(5)
    ours = reading.features @ reward.members[0].head.weight[0] + reward.members[0].head.bias
    torch.testing.assert_close(ours.detach(), short.score([prompt] * 2, replies)[:, 0], atol=1e-3, rtol=1e-4)


def test_what_is_shown_is_the_choice_among_all_candidates(running: Served, model: CausalModel, reward: RewardModel, data_dir: Path) -> None:
    seed = seed_for(by_chance=False)
    with running.client() as c:
        answer = ask(c, 2, seed=seed, metadata=ACTIVE)
    found = stored(running, answer)
    note = found.settings["choice"]
    assert (note["drawn"], note["policy"], note["round"]) == ("active", POLICY, 1) and len(set(note["seeds"])) == 6
    # all six again, by the live version, outside the server
    fresh, tokenizer = CausalModel.load(model.source), ChatTokenizer.load(model.source)
    fresh.lora.load("v000001", AdapterRegistry(data_dir / "adapters").path("v000001"))
    prompt = tokenizer.render(HELLO)
    six = Engine(fresh, tokenizer).generate([prompt] * 6, [SamplingParams(max_tokens=8, seed=s) for s in note["seeds"]], "v000001")
    expected = choose(reward.score([prompt] * 6, [s.token_ids for s in six]), 2, POLICY, seed)
    assert tuple(note["shown"]) == expected
    assert [completion.text for completion in found.completions] == texts(answer) == [six[i].text for i in expected]
    assert [completion.seed for completion in found.completions] == [note["seeds"][i] for i in expected]
    assert answer["usage"]["completion_tokens"] == sum(len(six[i].token_ids) for i in expected)


def test_a_streamed_choice_is_the_whole_one(running: Served) -> None:
    seed = seed_for(by_chance=False, skip=1)
    with running.client() as c:
        whole = ask(c, 3, seed=seed, metadata=ACTIVE)
        body = {"messages": HELLO, "n": 3, "max_tokens": 8, "seed": seed, "metadata": ACTIVE, "stream": True}
        said, reasons = [""] * 3, []
        with c.stream("POST", "/v1/chat/completions", json=body) as answer:
            events = [line[6:] for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        [choice] = json.loads(event)["choices"]
        said[choice["index"]] += choice["delta"].get("content", "")
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert said == texts(whole) and len(reasons) == 3
    running.until(lambda: running.runtime.running_chats == 0)
    assert not +running.runtime.deployment._leases


def test_the_share_left_to_chance_is_what_a_plain_client_gets(running: Served) -> None:
    seed = seed_for(by_chance=True)
    with running.client() as c:
        plain, asked = ask(c, 2, seed=seed), ask(c, 2, seed=seed, metadata=ACTIVE)
        greedy = ask(c, 2, seed=seed_for(by_chance=False), metadata=ACTIVE, temperature=0)
    assert texts(plain) == texts(asked)
    assert stored(running, asked).settings["choice"] == {"drawn": "random", "because": "share"}
    assert "choice" not in stored(running, plain).settings and "choice" not in stored(running, greedy).settings


def test_a_busy_server_samples_no_more_than_it_shows(running: Served) -> None:
    with running.client() as c:
        running.runtime.bridge.stats.running = 27  # with six more, one too many for 32 slots; the engine counts anew later
        answer = ask(c, 2, seed=seed_for(by_chance=False), metadata=ACTIVE)
    assert stored(running, answer).settings["choice"] == {"drawn": "random", "because": "busy"}


def test_votes_on_chosen_replies_do_not_test_versions(running: Served) -> None:
    board = running.runtime.deployment.scoreboard
    with running.client() as c:
        for by_chance in (False, True):
            before = len(board._votes)
            answer = ask(c, 2, seed=seed_for(by_chance, skip=2), metadata=ACTIVE)
            versions = {completion.version for completion in stored(running, answer).completions}
            assert versions == ({"base", "v000001"} if by_chance else {"v000001"})
            assert c.put(f"/v1/comparisons/{answer['plaudit']['comparison_id']}/vote", json={"favourite": 1}).status_code == 201
            assert len(board._votes) - before == by_chance


def test_scores_that_are_not_finite_leave_it_to_chance(running: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = running.runtime.candidates._heads
    assert heads is not None
    monkeypatch.setattr(running.runtime.candidates, "_heads", type(heads)(heads.weight * torch.nan, heads.bias, 512, 1))
    with running.client() as c:
        answer = ask(c, 2, seed=seed_for(by_chance=False), metadata=ACTIVE)
    note = stored(running, answer).settings["choice"]
    assert (note["drawn"], note["because"], note["shown"]) == ("random", "failed", [0, 1])


def test_a_reward_model_that_cannot_score_here_is_not_used(tmp_path: Path, model: CausalModel) -> None:
    files = RoundFiles(tmp_path)
    assert newest_heads(files, model.digest) is None
    save_round(tmp_path, model, base_digest="another")
    with pytest.raises(Unusable, match="another base"):
        newest_heads(files, model.digest)
    save_round(tmp_path, model)
    assert newest_heads(files, model.digest) is not None
    cut_short = files.begin()  # by an earlier Plaudit, whose record says nothing of it
    shutil.copytree(files.directory(2) / "reward", files.directory(cut_short) / "reward")
    files.finish(cut_short, {"state": "abandoned"})
    assert (found := newest_heads(files, model.digest)) is not None and found.round == 2
    about = files.directory(2) / "reward" / "reward.json"
    about.write_text(about.read_text().replace("false", "true"))
    with pytest.raises(Unusable, match="adapters"):
        newest_heads(files, model.digest)
    (files.directory(2) / "reward" / "heads.safetensors").write_bytes(b"damaged")
    about.write_text(about.read_text().replace("true", "false"))
    with pytest.raises(Unusable, match="cannot be read"):
        newest_heads(files, model.digest)


def test_a_stretch_takes_half_a_decode_step_while_others_are_answered() -> None:
    asked: list[int] = []

    def advance(count: int) -> int:
        asked.append(count)
        return count

    bridge = SimpleNamespace(step_s=0.02)
    candidates = Candidates(None, None, None, bridge, None)  # type: ignore[arg-type]
    for busy, token_s in ((True, 0.001), (True, 1.0), (True, 1e-9), (False, 1.0)):
        candidates._token_s = token_s
        candidates._advance(SimpleNamespace(advance=advance), SimpleNamespace(has_work=lambda b=busy: b))  # type: ignore[arg-type]
    assert asked == [10, 1, 256, 256]  # at least one token, at most 256; and those when nobody waits
    assert candidates._token_s < 0.1  # measured anew
