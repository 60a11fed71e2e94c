"""Taking in versions, swapping under load, refusing the corrupt, promotion, rollback, and what people's votes decide."""

from __future__ import annotations

import asyncio
import base64
import collections
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import native
from engine.lora import Adapter, LoraLinear
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from server.app import create_app
from server.deployment import assign
from server.errors import StartupError
from server.settings import STARTER
from server.verification import Unfit, probe_gap
from store.adapters import AdapterRegistry
from store.errors import DiskFull
from store.rounds import RoundFiles
from store.store import Store
from tests.serving import HELLO, Served, ask, publish_random, served, settings_for


def versions_of(running: Served, comparison_id: str) -> list[str]:
    found = running.runtime.store.comparison(comparison_id)
    assert found is not None
    return [c.version for c in found.completions]


def vote_for(client: httpx.Client, running: Served, made: dict[str, Any], version: str) -> None:
    """Prefer the replies of `version` over the others."""
    comparison_id = made["plaudit"]["comparison_id"]
    names = versions_of(running, comparison_id)
    best = [i for i, name in enumerate(names) if name == version]
    rest = [i for i, name in enumerate(names) if name != version]
    body = {"ranking": [best, rest]} if best and rest else {"verdict": "tie"}
    assert client.put(f"/v1/comparisons/{comparison_id}/vote", json=body).status_code == 201


# --- assignment and the probe: pure


def test_slots_are_half_and_half_in_random_order_for_the_given_share() -> None:
    """20000 draws: each frequency below is within 5 standard deviations (odds of a false alarm under 1 in a million)."""
    slots = [assign(2, "b", "a", 0.5, seed) for seed in range(20000)]
    mixed = [s for s in slots if s.mixed]
    assert abs(len(mixed) / 20000 - 0.5) < 5 * (0.25 / 20000) ** 0.5
    assert all(sorted(s.versions) == ["a", "b"] for s in mixed)
    first = sum(s.versions[0] == "a" for s in mixed) / len(mixed)
    assert abs(first - 0.5) < 5 * (0.25 / len(mixed)) ** 0.5
    assert all(s.versions == ("b", "b") for s in slots if not s.mixed)
    odd = collections.Counter(v for seed in range(20000) for v in assign(3, "b", "a", 1.0, seed).versions)
    assert abs(odd["a"] / 60000 - 0.5) < 5 * (0.25 / 20000) ** 0.5 / 3


def test_one_reply_and_no_other_version_are_never_mixed() -> None:
    assert assign(1, "b", "a", 1.0, 0).versions == ("b",)
    assert assign(4, "b", None, 1.0, 0).versions == ("b",) * 4
    assert assign(4, "b", "b", 1.0, 0).mixed is False
    assert assign(4, "b", "a", 0.0, 0).mixed is False


@pytest.mark.parametrize(("values", "fits"), [
    ([-1.0, -2.0], True), ([-1.0009, -2.0], True), ([-1.002, -2.0], False), ([float("nan"), -2.0], False), ([], False),
])
def test_the_probe_allows_a_thousandth_of_a_nat(values: list[float], fits: bool) -> None:
    published = {"top_ids": [7, 9][: len(values)], "top_logprobs": values}
    here = {"top_ids": [7, 9], "top_logprobs": [-1.0, -2.0]}
    if fits:
        assert probe_gap(published, here, 1e-3) <= 1e-3
    else:
        with pytest.raises(Unfit):
            probe_gap(published, here, 1e-3)


@pytest.mark.parametrize("published", [
    {}, {"top_ids": [7]}, {"top_ids": [7], "top_logprobs": [None]}, {"top_ids": [7], "top_logprobs": ["x"]}, {"top_ids": 7, "top_logprobs": -1.0},
    {"top_ids": [[7]], "top_logprobs": [-1.0]}, {"top_ids": [float("inf")], "top_logprobs": [-1.0]},
])
def test_a_probe_that_cannot_be_read_is_unfit(published: dict[str, Any]) -> None:
    with pytest.raises(Unfit, match="no probe"):
        probe_gap(published, {"top_ids": [7, 9], "top_logprobs": [-1.0, -2.0]}, 1e-3)


def test_a_published_token_missing_here_counts_as_a_gap() -> None:
    with pytest.raises(Unfit):
        probe_gap({"top_ids": [5], "top_logprobs": [-0.5]}, {"top_ids": [7, 9], "top_logprobs": [-1.0, -2.0]}, 1e-3)


def test_by_8_bits_what_is_hardly_ever_said_may_be_further_off() -> None:
    published, here = {"top_ids": [7, 9], "top_logprobs": [-0.1, -9.0]}, {"top_ids": [7, 9], "top_logprobs": [-0.2, -7.0]}
    assert probe_gap(published, here, 0.5, 0.01) == pytest.approx(0.1)
    with pytest.raises(Unfit):
        probe_gap(published, here, 0.05, 0.01)
    with pytest.raises(Unfit):
        probe_gap(published, here, 0.5)
    assert probe_gap({"top_ids": [7], "top_logprobs": [-6.0]}, {"top_ids": [7], "top_logprobs": [-6.1]}, 0.5, 0.01) == pytest.approx(0.1)  # the likeliest there is
    with pytest.raises(Unfit):
        probe_gap({"top_ids": [7], "top_logprobs": [float("nan")]}, here, 0.5, 0.01)


@pytest.mark.skipif(native.library() is None, reason="8 bits need the C of decoding")
def test_a_server_of_8_bits_takes_in_what_was_published_by_32(tmp_path: Path) -> None:
    version = publish_random(AdapterRegistry(tmp_path / "adapters"), STARTER, seed=1)
    with served(settings_for(tmp_path, STARTER, int8=True)) as running, running.client() as c:
        assert running.runtime.deployment.live == version and 1e-3 < c.get(f"/v1/adapters/{version}").json()["probe_gap_nats"] < 0.5


# --- swapping


def test_versions_swap_while_clients_stream_and_nothing_fails_or_mixes(tiny_llama: Path, tmp_path: Path) -> None:
    """Every streamed reply is complete, names one version, and each of its tokens has the probability that this version
    alone gives it (a plain forward pass; tokens of another version would be off by nats)."""
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama, max_tokens=48)) as running:
        replies: list[tuple[str, str, str]] = []  # model, comparison id, text
        failures: list[object] = []
        done = threading.Event()

        def client(number: int) -> None:
            seed = number * 100_000
            with running.client(f"v{number}") as c:
                while not done.is_set():
                    seed += 1
                    body = {"messages": HELLO, "n": 1, "max_tokens": 40, "seed": seed, "stream": True}
                    with c.stream("POST", "/v1/chat/completions", json=body) as answer:
                        lines = [line for line in answer.iter_lines() if line]
                    if answer.status_code != 200 or lines[-1] != "data: [DONE]":
                        failures.append((answer.status_code, lines[-1:]))
                        continue
                    chunks = [json.loads(line[6:]) for line in lines[:-1]]
                    text = "".join(ch["choices"][0]["delta"].get("content", "") for ch in chunks)
                    [name] = {ch["model"] for ch in chunks}
                    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
                    replies.append((name, chunks[0]["plaudit"]["comparison_id"], text))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        published = []
        for seed in (1, 2, 3):
            before = len(replies)
            running.until(lambda n=before: len(replies) > n + 5)
            published.append(publish_random(registry, tiny_llama, seed=seed, parent=running.runtime.deployment.live))
            running.until(lambda v=published[-1]: running.runtime.deployment.live == v)
        total = len(replies)
        running.until(lambda: len(replies) > total + 10)
        done.set()
        for thread in threads:
            thread.join()
        assert failures == []
        names = {reply[0] for reply in replies}
        assert names == {"plaudit@base", *(f"plaudit@{v}" for v in published)}
        gaps = running.runtime.deployment.gaps
        assert set(gaps) == set(published) and max(gaps.values()) <= 1e-3
    model, prompt = CausalModel.load(tiny_llama), ChatTokenizer.load(tiny_llama).render(HELLO)
    for version in published:
        model.lora.load(version, registry.path(version))
    others_off = []
    with Store.open(tmp_path, read_only=True) as store, torch.inference_mode():
        for name, comparison_id, text in replies:
            kept = store.comparison(comparison_id)
            assert kept is not None
            [reply] = kept.completions
            assert reply.text == text and f"plaudit@{reply.version}" == name
            ids = torch.tensor([[*prompt, *reply.token_ids]])
            said = torch.tensor(reply.logprobs)
            for version in (None, *published):
                alone = model.logprobs(ids, adapter=version)[0, len(prompt) - 1 :]
                if (version or "base") == reply.version:
                    assert torch.allclose(said, alone, atol=2e-3), (name, (said - alone).abs().max())
                else:
                    others_off.append(float((said - alone).abs().max()))
    assert min(others_off) > 0.1  # so a mixed reply would have been seen


def test_old_versions_are_unloaded_and_come_back_when_asked_for_by_name(tiny_llama: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama)) as running, running.client() as c:
        for seed in (1, 2, 3):
            gone_live(running, registry, tiny_llama, seed)
        engine = running.runtime.bridge._engine
        running.until(lambda: set(engine.versions()) == {"base", "v000002", "v000003"})
        assert ask(c, 1, model="plaudit@v000001")["model"] == "plaudit@v000001"
        assert "v000001" in engine.versions()
        running.runtime.deployment.idle_unload_s = 0.0
        running.until(lambda: "v000001" not in engine.versions())
        assert [m["id"] for m in c.get("/v1/models").json()["data"]] == [
            "plaudit", "plaudit@base", "plaudit@v000001", "plaudit@v000002", "plaudit@v000003"]


def test_a_version_that_is_answering_is_not_unloaded(tiny_llama: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama, max_tokens=400)) as running, running.client() as c:
        for seed in (1, 2, 3):
            gone_live(running, registry, tiny_llama, seed)
        engine = running.runtime.bridge._engine
        running.until(lambda: "v000001" not in engine.versions())
        running.slow()
        body = {"model": "plaudit@v000001", "messages": HELLO, "n": 1, "max_tokens": 300, "stream": True, "temperature": 2}
        with c.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.runtime.deployment.idle_unload_s = 0.0
            asyncio.run_coroutine_threadsafe(running.runtime.deployment._unload_idle(), running.runtime.bridge._loop).result(10)
            assert "v000001" in engine.versions()
            assert list(filter(None, lines))[-1] == "data: [DONE]"
        running.until(lambda: "v000001" not in engine.versions())
        assert ask(c, 1, model="plaudit@v000001")["model"] == "plaudit@v000001"


def test_a_version_that_would_be_spoken_otherwise_than_it_was_published_is_refused(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are right, and the probe's own pass finds them so; the passes that write replies lay adapters out otherwise, and do it wrongly."""
    version = publish_random(AdapterRegistry(tmp_path / "adapters"), tiny_llama, seed=1)
    stack = Adapter.stack

    def twice(self: Adapter, linear: LoraLinear) -> tuple[torch.Tensor, torch.Tensor] | None:
        found = stack(self, linear)
        return None if found is None else (found[0], 2 * found[1])

    monkeypatch.setattr(Adapter, "stack", twice)
    with served(settings_for(tmp_path, tiny_llama)) as running, running.client() as c:
        assert "nats" in c.get("/v1/adapters").json()["refused"][version] and ask(c, 1)["model"] == "plaudit@base"
        assert running.runtime.bridge._engine.versions() == ["base"]


def test_what_is_corrupt_foreign_or_rejected_is_refused_with_its_reason(tiny_llama: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    flipped = publish_random(registry, tiny_llama, seed=1)
    weights = registry.path(flipped) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    foreign = publish_random(registry, tiny_llama, seed=2, base_digest="0" * 64)
    gated = publish_random(registry, tiny_llama, seed=3, verdict="rejected")
    lying = publish_random(registry, tiny_llama, seed=4, probe={"prompt_ids": [5, 6], "top_ids": [7], "top_logprobs": [-9.0]})
    no_manifest = publish_random(registry, tiny_llama, seed=5)
    missing = registry.path(no_manifest) / "manifest.json"
    as_published = missing.read_bytes()
    missing.unlink()
    registry.path("v000006").write_text("a file, not a version's directory")
    odd_probe = publish_random(registry, tiny_llama, seed=6, probe={"prompt_ids": [10**9], "top_ids": [7], "top_logprobs": [-9.0]})
    with served(settings_for(tmp_path, tiny_llama)) as running, running.client() as c:
        assert running.runtime.deployment.live == "base"
        assert ask(c, 1)["model"] == "plaudit@base"
        listed = c.get("/v1/adapters").json()
        reasons, status = listed["refused"], {row["version"]: row["status"] for row in listed["data"]}
        assert "adapter_model.safetensors" in reasons[flipped] and "another base" in reasons[foreign]
        assert "gate" in reasons[gated] and "nats" in reasons[lying]
        assert "manifest.json" in reasons[no_manifest] and "probe" in reasons[odd_probe] and "Not a directory" in reasons["v000006"]
        assert status == dict.fromkeys([flipped, foreign, gated, lying, odd_probe], "rejected")
        assert running.runtime.bridge._engine.versions() == ["base"]
        for version in (flipped, foreign, gated, lying, odd_probe):
            assert c.post(f"/v1/adapters/{version}/promote").status_code == 409
            assert c.post("/v1/chat/completions", json={"messages": HELLO, "model": f"plaudit@{version}"}).status_code == 404
        assert c.post("/v1/adapters/v000099/promote").status_code == 404
        data[-1] ^= 1
        weights.write_bytes(bytes(data))  # restored, as the refusal advised
        assert c.post(f"/v1/adapters/{flipped}/promote").json()["live"] == flipped
        assert ask(c, 1)["model"] == f"plaudit@{flipped}"
        row = c.get(f"/v1/adapters/{flipped}").json()
        assert (row["status"], row["reason"]) == ("live", None)
        refused = c.post(f"/v1/adapters/{no_manifest}/promote")
        assert refused.status_code == 409 and "manifest.json is missing" in refused.text
        missing.write_bytes(as_published)
        assert c.post(f"/v1/adapters/{no_manifest}/promote").json()["live"] == no_manifest
        assert no_manifest not in c.get("/v1/adapters").json()["refused"]
        assert c.post(f"/v1/adapters/{'..%2f' * 3}/promote").status_code == 404


def test_a_rejected_version_whose_manifest_is_put_right_stays_rejected(tiny_llama: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    version = publish_random(registry, tiny_llama, seed=1, verdict="rejected")
    manifest = registry.path(version) / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:40])
    with served(settings_for(tmp_path, tiny_llama)) as running, running.client() as c:
        manifest.write_bytes(whole)
        for _ in range(2):
            answer = c.post(f"/v1/adapters/{version}/promote")
            assert answer.status_code == 409 and "its gate failed" in answer.text
        assert c.get(f"/v1/adapters/{version}").json()["status"] == "rejected"


def test_promotion_and_rollback_hold_when_they_answer_and_after_a_restart(tiny_llama: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    settings = settings_for(tmp_path, tiny_llama, promotion="manual")
    one, two = publish_random(registry, tiny_llama, seed=1), publish_random(registry, tiny_llama, seed=2)
    with served(settings) as running, running.client() as c:
        assert ask(c, 1)["model"] == "plaudit@base"
        assert {row["status"] for row in c.get("/v1/adapters").json()["data"]} == {"candidate"}
        assert c.post("/v1/adapters/rollback").status_code == 409
        for version in (one, two):
            assert c.post(f"/v1/adapters/{version}/promote").json()["live"] == version
            assert ask(c, 1)["model"] == f"plaudit@{version}"
        assert c.post(f"/v1/adapters/{two}/promote").status_code == 409
        assert c.post("/v1/adapters/rollback").json() == {**c.post("/v1/adapters/base/promote").json(), "live": one,
                                                           "previous": None, "live_since": pytest.approx(1e9, abs=1e10)}
        assert ask(c, 1)["model"] == "plaudit@base"
        c.post(f"/v1/adapters/{two}/promote")
    with served(settings) as running, running.client() as c:
        assert ask(c, 1)["model"] == f"plaudit@{two}"
        listed = c.get("/v1/adapters").json()
        assert (listed["live"], listed["previous"]) == (two, "base")
        assert {row["version"]: row["status"] for row in listed["data"]} == {one: "retired", two: "live"}
        detail = c.get(f"/v1/adapters/{two}").json()
        assert detail["lineage"] == [two, "base"] and detail["probe_gap_nats"] <= 1e-3
        assert [e["action"] for e in running.runtime.store.audit_log()][:3] == ["promote", "promote", "rollback"]
        assert running.runtime.store.verify_audit()


def test_a_live_version_found_damaged_at_start_gives_way_to_the_one_before(tiny_llama: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    settings = settings_for(tmp_path, tiny_llama)
    one = publish_random(registry, tiny_llama, seed=1)
    with served(settings) as running:
        assert running.runtime.deployment.live == one
        two = gone_live(running, registry, tiny_llama, 2)
    (registry.path(two) / "adapter_config.json").write_text("{}")
    with served(settings) as running, running.client() as c:
        assert ask(c, 1)["model"] == f"plaudit@{one}"
        assert "adapter_config.json" in c.get("/v1/adapters").json()["refused"][two]


# --- votes decide


def test_in_auto_mode_votes_against_the_new_version_roll_it_back(tiny_llama: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama, mix_share=1.0)) as running, running.client() as c:
        version = publish_random(registry, tiny_llama)
        running.until(lambda: running.runtime.deployment.live == version)
        made = ask(c, 2)
        assert sorted(versions_of(running, made["plaudit"]["comparison_id"])) == ["base", version]
        votes = 0
        while votes < 30:
            vote_for(c, running, made, "base")
            votes += 1
            if running.runtime.deployment.live == "base":
                break
            made = ask(c, 2)
        assert 5 <= votes <= 15  # 20:1 odds take a handful of votes, not one and not dozens
        row = c.get(f"/v1/adapters/{version}").json()
        assert row["status"] == "retired" and row["win_rate"] == 0.0 and row["win_votes"] == votes
        assert running.runtime.store.audit_log()[-1]["action"] == "automatic rollback"
        assert c.get("/v1/stats").json()["abtest"] is None


def test_an_operators_choice_is_not_undone_by_votes(tiny_llama: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    version = publish_random(registry, tiny_llama)
    with served(settings_for(tmp_path, tiny_llama, mix_share=1.0, promotion="manual")) as running, running.client() as c:
        c.post(f"/v1/adapters/{version}/promote")
        votes = 0
        while running.runtime.deployment.other is not None:
            assert (votes := votes + 1) <= 15
            vote_for(c, running, ask(c, 2), "base")
        assert votes >= 5 and running.runtime.deployment.live == version
        assert c.get("/v1/stats").json()["abtest"]["decision"] == "rollback"
        assert set(versions_of(running, ask(c, 2)["plaudit"]["comparison_id"])) == {version}  # the question is closed: nothing more is mixed


def test_a_version_that_comes_back_is_judged_by_the_votes_since(tiny_llama: Path, tmp_path: Path) -> None:
    version = publish_random(AdapterRegistry(tmp_path / "adapters"), tiny_llama)
    with served(settings_for(tmp_path, tiny_llama, mix_share=1.0, promotion="manual")) as running, running.client() as c:
        def votes() -> int:
            return c.get("/v1/stats").json()["abtest"]["votes"]

        c.post(f"/v1/adapters/{version}/promote")
        for _ in range(2):
            vote_for(c, running, ask(c, 2), "base")
        assert votes() == 2
        c.post("/v1/adapters/base/promote")
        assert c.post(f"/v1/adapters/{version}/promote").json()["live"] == version
        assert votes() == 0
        vote_for(c, running, ask(c, 2), "base")
        assert votes() == 1


def test_a_vote_that_decides_is_kept_where_the_decision_cannot_be_and_the_next_decides_again(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama, mix_share=1.0)) as running, running.client() as c:
        version = gone_live(running, registry, tiny_llama, 1)
        with monkeypatch.context() as full:
            full.setattr(running.runtime.store, "deploy", lambda *args, **kwargs: (_ for _ in ()).throw(DiskFull("no space")))
            for _ in range(15):
                vote_for(c, running, ask(c, 2), "base")  # each is answered 201
            assert running.runtime.deployment.live == version
        vote_for(c, running, ask(c, 2), "base")
        assert running.runtime.deployment.live == "base"


def test_a_version_is_taken_in_and_goes_live_in_one_step_or_is_tried_again(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server killed, or a disk that was full, between the two left a passed version a candidate for good."""
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama)) as running:
        real, tried = running.runtime.store._insert_deployment, []

        def fails_once(*args: Any, **kwargs: Any) -> None:
            tried.append(args)
            if len(tried) == 1:
                raise DiskFull("no space")
            real(*args, **kwargs)

        monkeypatch.setattr(running.runtime.store, "_insert_deployment", fails_once)
        version = publish_random(registry, tiny_llama)
        running.until(lambda: running.runtime.deployment.live == version)
        assert len(tried) == 2


def test_another_model_than_the_live_versions_is_refused_and_changes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    registry = AdapterRegistry(tmp_path / "data" / "adapters")
    with served(settings_for(tmp_path / "data", tiny_llama)) as running:
        version = gone_live(running, registry, tiny_llama, 1)
    with pytest.raises(StartupError, match=f"{version}, which is live in .* was made for another model"):
        create_app(settings_for(tmp_path / "data", other))
    with served(settings_for(tmp_path / "data", tiny_llama)) as running, running.client() as c:
        assert running.runtime.deployment.live == version
        c.post("/v1/adapters/base/promote")
    with served(settings_for(tmp_path / "data", other)) as running:  # the way there is: give it up knowingly
        assert running.runtime.deployment.live == "base"


@pytest.mark.parametrize(("loved", "live"), [(True, "v000001"), (False, "base")])
def test_in_canary_mode_votes_promote_or_drop_the_candidate(tiny_llama: Path, tmp_path: Path, loved: bool, live: str) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    version = publish_random(registry, tiny_llama)
    with served(settings_for(tmp_path, tiny_llama, mix_share=1.0, promotion="canary")) as running, running.client() as c:
        assert (running.runtime.deployment.live, running.runtime.deployment.candidate) == ("base", version)
        assert ask(c, 1)["model"] == "plaudit@base"
        for _ in range(15):
            vote_for(c, running, ask(c, 2), version if loved else "base")
            if running.runtime.deployment.candidate is None:
                break
        assert (running.runtime.deployment.live, running.runtime.deployment.candidate) == (live, None)


@pytest.mark.parametrize("loved", [True, False])
def test_in_canary_mode_a_newer_version_waits_until_votes_have_decided(tiny_llama: Path, tmp_path: Path, loved: bool) -> None:
    """Rounds come every few votes, a decision takes dozens: nothing would ever be decided."""
    registry, settings = AdapterRegistry(tmp_path / "adapters"), settings_for(tmp_path, tiny_llama, mix_share=1.0, promotion="canary")
    _, *others = (publish_random(registry, tiny_llama, seed=seed) for seed in range(3))
    with served(settings) as running:
        deployment = running.runtime.deployment
        assert (deployment.candidate, deployment.waiting) == (others[-1], None)  # of those that came while it was down the newest
    newer = [publish_random(registry, tiny_llama, seed=seed) for seed in (3, 4)]
    with served(settings) as running, running.client() as c:
        deployment = running.runtime.deployment
        assert (deployment.candidate, deployment.waiting) == (others[-1], newer[-1])
    with served(settings) as running, running.client() as c:  # also after another start
        deployment = running.runtime.deployment
        assert (deployment.candidate, deployment.waiting) == (others[-1], newer[-1])
        for _ in range(15):
            vote_for(c, running, ask(c, 2), others[-1] if loved else "base")
            if deployment.candidate != others[-1]:
                break
        running.until(lambda: deployment.candidate == newer[-1])
        assert deployment.live == (others[-1] if loved else "base")


def test_a_version_that_could_not_be_made_the_candidate_waits_on(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama, promotion="canary")) as running:
        deployment, refused = running.runtime.deployment, list[str]()
        deploy = deployment._deploy

        async def full(*args: Any, **kwargs: Any) -> None:
            if not refused:
                refused.append(args[-1])
                raise DiskFull("the disk is full")
            await deploy(*args, **kwargs)

        monkeypatch.setattr(deployment, "_deploy", full)
        version = publish_random(registry, tiny_llama)
        running.until(lambda: deployment.candidate == version)
        assert refused == ["canary"] and deployment.waiting is None


def gone_live(running: Served, registry: AdapterRegistry, model: Path, seed: int) -> str:
    """A version published and live."""
    version = publish_random(registry, model, seed=seed, live=running.runtime.deployment.live)
    running.until(lambda: running.runtime.deployment.live == version)
    return version


def test_two_looks_at_one_new_version_take_it_in_once(tiny_llama: Path, tmp_path: Path) -> None:
    """An upload looks for new versions while the poll does: else the version would be live and its own predecessor."""
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama)) as running:
        deployment, loop, first = running.runtime.deployment, running.runtime.bridge._loop, gone_live(running, registry, tiny_llama, 1)
        second = publish_random(registry, tiny_llama, seed=2, parent=first)

        async def both() -> None:
            await asyncio.gather(deployment.take_in(), deployment.take_in())

        asyncio.run_coroutine_threadsafe(both(), loop).result(30)
        assert (deployment.live, deployment.previous) == (second, first)


def test_what_votes_decided_is_not_done_to_another_version(tiny_llama: Path, tmp_path: Path) -> None:
    """They turned the live version down; while it waited for the lock, a newer one went live."""
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama)) as running:
        deployment, loop, first = running.runtime.deployment, running.runtime.bridge._loop, gone_live(running, registry, tiny_llama, 1)
        judged = deployment.pair()
        second = gone_live(running, registry, tiny_llama, 2)
        for late in (deployment.rollback("votes", judged=judged), deployment.promote(first, "votes", judged=judged)):
            asyncio.run_coroutine_threadsafe(late, loop).result(30)
            assert (deployment.live, deployment.previous) == (second, first)
        asyncio.run_coroutine_threadsafe(deployment.rollback("votes", judged=deployment.pair()), loop).result(30)
        assert deployment.live == first


def test_what_was_learned_from_a_version_that_an_operator_replaced_meanwhile_waits_for_them(tiny_llama: Path, tmp_path: Path) -> None:
    """A round begins, the operator goes back from the version it learns from, the round ends."""
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama)) as running, running.client() as c:
        first = gone_live(running, registry, tiny_llama, 1)
        assert c.post("/v1/adapters/rollback").status_code == 200
        second = publish_random(registry, tiny_llama, seed=2, parent=first)
        running.until(lambda: len(c.get("/v1/adapters").json()["data"]) == 2)
        statuses = {row["version"]: row["status"] for row in c.get("/v1/adapters").json()["data"]}
        assert (running.runtime.deployment.live, statuses[second]) == ("base", "candidate")
        restarted = publish_random(registry, tiny_llama, seed=4, parent=first, live="base")  # made from its reference, with base live all along
        running.until(lambda: running.runtime.deployment.live == restarted)
        assert c.post("/v1/adapters/base/promote").status_code == 200
        assert gone_live(running, registry, tiny_llama, 3) == running.runtime.deployment.live  # its parent is base, which is live


def test_what_was_learned_from_a_version_that_votes_turned_down_meanwhile_waits_for_an_operator(tiny_llama: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    with served(settings_for(tmp_path, tiny_llama)) as running:
        deployment, first = running.runtime.deployment, gone_live(running, registry, tiny_llama, 1)
        asyncio.run_coroutine_threadsafe(deployment.rollback("auto", judged=deployment.pair()), running.runtime.bridge._loop).result(30)
        second = publish_random(registry, tiny_llama, seed=2, parent=first)
        running.until(lambda: second in deployment.servable())
        assert deployment.live == "base" and not deployment.by_operator
        assert gone_live(running, registry, tiny_llama, 3) == deployment.live


def test_an_operators_choice_stays_theirs_through_a_later_canary_and_a_restart(tiny_llama: Path, tmp_path: Path) -> None:
    registry, settings = AdapterRegistry(tmp_path / "adapters"), settings_for(tmp_path, tiny_llama, promotion="canary")
    first = publish_random(registry, tiny_llama, seed=1)
    with served(settings) as running, running.client() as c:
        c.post(f"/v1/adapters/{first}/promote")
        second = publish_random(registry, tiny_llama, seed=2)
        running.until(lambda: running.runtime.deployment.candidate == second)
        assert running.runtime.deployment.by_operator
    with served(settings) as running:
        assert running.runtime.deployment.live == first and running.runtime.deployment.by_operator


# --- uploads and rounds


def upload_body(directory: Path) -> dict[str, Any]:
    return {"adapter_config": json.loads((directory / "adapter_config.json").read_text()),
            "adapter_model": base64.b64encode((directory / "adapter_model.safetensors").read_bytes()).decode()}


def test_an_uploaded_adapter_is_checked_and_becomes_a_candidate(tiny_llama: Path, tmp_path: Path) -> None:
    elsewhere = AdapterRegistry(tmp_path / "elsewhere")
    good = upload_body(elsewhere.path(publish_random(elsewhere, tiny_llama)))
    with served(settings_for(tmp_path / "data", tiny_llama)) as running, running.client() as c:
        made = c.post("/v1/adapters", json={**good, "comment": "by hand"})
        assert made.status_code == 201 and made.json()["status"] == "candidate" and made.json()["kind"] == "upload"
        version = made.json()["version"]
        assert ("upload", version) in [(entry["action"], json.loads(entry["detail"]).get("version")) for entry in running.runtime.store.audit_log()]
        assert running.runtime.deployment.live == "base"
        assert c.post(f"/v1/adapters/{version}/promote").status_code == 200
        assert ask(c, 1)["model"] == f"plaudit@{version}"
        tensors = load_file(elsewhere.path("v000001") / "adapter_model.safetensors")
        key = sorted(tensors)[0]
        bad = tmp_path / "bad.safetensors"

        def with_tensors(changed: dict[str, Any]) -> dict[str, Any]:
            save_file(changed, bad)
            return {**good, "adapter_model": base64.b64encode(bad.read_bytes()).decode()}

        for body in (
            {**good, "adapter_model": "!!!"}, {**good, "adapter_model": "AAAA"}, {**good, "adapter_config": {}},
            {**good, "adapter_config": {**good["adapter_config"], "r": "many"}}, {"adapter_model": "AAAA"},
            {**good, "adapter_config": {**good["adapter_config"], "r": 10**400}},
            with_tensors({**tensors, key: tensors[key] * float("nan")}), with_tensors({**tensors, key: tensors[key][:1].clone()}),
            with_tensors({k: v for k, v in tensors.items() if k != key}),
        ):
            answer = c.post("/v1/adapters", json=body)
            assert answer.status_code == 400, answer.text
            assert "\n" not in answer.json()["error"]["message"] and str(tmp_path) not in answer.text
        assert len(running.runtime.registry.versions()) == 1
        assert len(running.runtime.bridge._engine.versions()) == 2
        (tmp_path / "data" / ".upload-x").mkdir()  # of an upload during which the server was killed
    with served(settings_for(tmp_path / "data", tiny_llama)):
        assert not list((tmp_path / "data").glob(".upload-*"))


def test_a_version_without_a_gate_waits_for_an_operator_and_a_gated_finetuned_one_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    with served(settings_for(tmp_path, tiny_llama)) as running, running.client() as c:
        ungated = publish_random(running.runtime.registry, tiny_llama, seed=1, kind="sft", gate=None)
        running.until(lambda: running.runtime.deployment.gaps.get(ungated) is not None)
        running.until(lambda: any(row["version"] == ungated for row in c.get("/v1/adapters").json()["data"]))
        listed = c.get("/v1/adapters").json()
        assert listed["live"] == "base" and [row["status"] for row in listed["data"] if row["version"] == ungated] == ["candidate"]
        gated = publish_random(running.runtime.registry, tiny_llama, seed=2, kind="sft")
        running.until(lambda: c.get("/v1/adapters").json()["live"] == gated)
        assert c.post(f"/v1/adapters/{ungated}/promote").json()["live"] == ungated


def test_finished_rounds_are_taken_in(tiny_llama: Path, tmp_path: Path) -> None:
    files = RoundFiles(tmp_path / "rounds")
    with served(settings_for(tmp_path, tiny_llama)) as running, running.client() as c:
        n = files.begin()
        (files.directory(n) / "round.json").write_text("{")  # unreadable: skipped, the next one is not held up
        running.until(lambda: n in running.runtime.deployment._known_rounds)
        n = files.begin()
        files.heartbeat(state="ppo", round=n, progress=0.25)
        row = c.get("/v1/rounds").json()["data"][0]
        assert row["state"] == "ppo" and row.keys() >= {"round", "started", "ended", "votes", "reward", "ppo", "gate", "version"}
        status = c.get("/v1/status").json()
        assert (status["learner_state"], status["progress"]) == ("ppo", 0.25)
        files.finish(n, {"state": "published", "gate": {"verdict": "accepted", "checks": []}, "votes": 3, "last_seq": 3, "version": "v000001"})
        files.heartbeat(state="idle")
        running.until(lambda: running.runtime.store.round(n) is not None)
        assert c.get(f"/v1/rounds/{n}").json()["gate"]["verdict"] == "accepted"
        assert c.get("/v1/learner").json()["last_verdict"] == "accepted"
