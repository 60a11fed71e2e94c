"""One round on a tiny model: what it publishes, what it records, what it refuses, and that it can be run again."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.engine import probe
from engine.model import CausalModel
from engine.source import Sampling
from engine.tokenizer import ChatTokenizer
from learner import gate
from learner import round as round_module
from learner.config import GateConfig, LearnerConfig, PPOConfig, RewardConfig
from learner.data import examples_from_votes
from learner.ppo import PPOError
from learner.practice import choose_prompts, held_out_side
from learner.prompts import PromptsError
from learner.round import Learner, RoundStopped, close_unfinished, replay_round, train_reward
from store.adapters import AdapterRegistry
from store.errors import CorruptAdapter, DiskFull
from store.records import Completion, NewComparison
from store.rounds import RoundFiles
from store.store import Store

LOOSE = GateConfig(
    prompts=4, replies_per_prompt=2, max_new_tokens=8, min_win_rate=-1.0, max_kl=1e9, max_length_ratio=1e9,
    max_broken_rise=2.0, min_distinct2_ratio=-1.0, max_refusal_rise=2.0, max_probe_loss_rise=1e9,
)  # fmt: skip
QUICK = LearnerConfig(
    round_votes=4, practice_prompts=6, heartbeat_s=0.2, poll_s=0.1,
    reward=RewardConfig(members=2, folds=3, epochs=1, lora_r=4, lora_alpha=8, ridge=0.01, pass_examples=8, worth=0.0),
    ppo=PPOConfig(updates=2, prompts_per_update=2, replies_per_prompt=2, max_new_tokens=8, lora_r=4, lora_alpha=8, kl_ceiling=1e6, epochs=1,
                  max_seconds=600.0),
    gate=LOOSE,
)  # fmt: skip


def vote_on(store: Store, tokenizer: ChatTokenizer, count: int, *, first: int = 0, clear: bool = True, seed: int = 0) -> None:
    """`count` comparisons of two replies, with a vote each. `clear`: the winner repeats one word; else a coin decides."""
    for n in range(first, first + count):
        rng = random.Random(f"{seed}/{n}")
        draw = lambda k: tuple(rng.randrange(5, 400) for _ in range(k))  # noqa: E731, B023
        best = rng.randrange(2)
        replies = [(*draw(4), 1), (*draw(4), 1)]
        if clear:
            replies[best] = (*draw(2), *[7] * 6, 1)
        comparison = store.record_comparison(NewComparison(
            id=f"cmp-{n}", conversation_id=f"conv-{n}", voter="ann",
            messages=({"role": "user", "content": f"Question number {n}?"},), settings={"temperature": 1.0},
            completions=tuple(
                Completion(i, tokenizer.decode(list(ids)), ids, (-1.0,) * len(ids), "base", "stop", n) for i, ids in enumerate(replies)
            ),
        ))  # fmt: skip
        store.record_vote(comparison.id, "ann", groups=[[best], [1 - best]], kind="favourite")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


def learner_on(data_dir: Path, model: CausalModel, tokenizer: ChatTokenizer, config: LearnerConfig = QUICK) -> Learner:
    return Learner(model, tokenizer, config, RoundFiles(data_dir / "rounds"), AdapterRegistry(data_dir / "adapters"))


def run(learner: Learner, voted: list[Any], live: str = "base", seen: list | None = None) -> dict[str, Any]:
    report = lambda *what: seen.append(what) if seen is not None else None  # noqa: E731
    return learner.run_round(learner.files.begin(), voted, live, run_requested=0, report=report)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, model: CausalModel, tokenizer: ChatTokenizer) -> tuple[Path, dict, list]:
    """A data directory in which one round has published a version, its record, and the progress it reported."""
    data_dir = tmp_path_factory.mktemp("round")
    seen: list = []
    with Store.open(data_dir) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(data_dir, model, tokenizer), store.voted_comparisons(), seen=seen)
    return data_dir, record, seen


def test_a_round_publishes_a_version_with_its_lineage(published: tuple, model: CausalModel) -> None:
    data_dir, record, _ = published
    assert record["state"] == "published", record["reason"]
    manifest = AdapterRegistry(data_dir / "adapters").verify(record["version"])
    assert (manifest.version, manifest.parent, manifest.round, manifest.kind) == ("v000001", "base", 1, "ppo")
    assert manifest.data_digest == record["data_digest"] and manifest.seed == record["seed"] == 1
    assert manifest.base_digest == model.digest and manifest.gate["verdict"] == record["gate"]["verdict"] != "rejected"


def test_the_published_probe_is_what_the_adapter_says(published: tuple, tiny_llama: Path) -> None:
    data_dir, record, _ = published
    manifest = AdapterRegistry(data_dir / "adapters").manifest(record["version"])
    fresh = CausalModel.load(tiny_llama)
    fresh.lora.load("again", data_dir / "adapters" / record["version"])
    again = probe(fresh, "again", manifest.probe["prompt_ids"])
    assert again["top_ids"] == manifest.probe["top_ids"]
    assert again["top_logprobs"] == pytest.approx(manifest.probe["top_logprobs"], abs=1e-5)
    base = probe(fresh, None, manifest.probe["prompt_ids"])
    assert base["top_logprobs"] != pytest.approx(manifest.probe["top_logprobs"], abs=1e-5)  # it did change something


def test_the_record_has_the_contracts_shape_and_all_it_takes_to_replay(published: tuple) -> None:
    data_dir, record, _ = published
    on_disk = json.loads((data_dir / "rounds" / "000001" / "round.json").read_text())
    assert on_disk == json.loads(json.dumps(record))
    assert {"round", "state", "started", "ended", "votes", "reward", "ppo", "gate", "version"} <= set(on_disk)
    assert on_disk["votes"] == len(on_disk["vote_ids"]) == 24 and on_disk["last_seq"] == 24
    assert LearnerConfig.from_dict(on_disk["config"]) == QUICK.served(Sampling()) != QUICK  # sampling spelled out: a model's file may change
    reward = on_disk["reward"]
    assert reward["verdict"] in ("works", "only_length") and reward["accuracy"]["low"] > 0.5
    assert {"ece", "brier", "length_only", "agreement", "split", "interval", "words"} <= set(reward)
    assert "only one voter" in reward["split"]
    assert {"reward_s", "ppo_s", "gate_s"} <= set(on_disk["timings"])


def test_the_record_lists_voters_by_digest(published: tuple) -> None:
    _, record, _ = published
    (voter,) = record["reward"]["voters"]["listed"]
    assert (voter["votes"], voter["weight"], voter["share"], voter["reliability"]) == (24, 1.0, 1.0, None)
    assert "ann" not in str(record["reward"])
    assert (record["reward"]["edits"], record["reward"]["none_good"]) == (0, 0)


def test_a_withdrawn_vote_takes_its_edit_and_its_refusal_along(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 3)
        store.record_vote("cmp-0", "ann", groups=[], kind="none", edit="a better reply")
        store.record_vote("cmp-1", "ann", groups=[], kind="none")
        edited, refused = (e for e in examples_from_votes(store.voted_comparisons(), tokenizer) if e.refused)
        assert edited.edit_beats == (0, 1) and edited.completions_ids[2] == (*tokenizer.encode("a better reply"), tokenizer.eos_ids[0])
        assert refused.edit_beats == () and refused.refused == (0, 1)
        for n in (0, 1):
            store.withdraw_vote(f"cmp-{n}", "ann")
        (left,) = examples_from_votes(store.voted_comparisons(), tokenizer)
        assert left.comparison_id == "cmp-2" and not left.refused and not left.edit_beats
        assert list(store.export("demonstration")) == [] and len(list(store.export("ranking"))) == 1


def test_every_kind_of_vote_reaches_the_reward_model(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    """Favourites of three voters, ties, refusals and edits; what is tested stays what people were shown."""
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 48)
        voted = []
        for n, item in enumerate(store.voted_comparisons()):
            change = {0: {"groups": ((0, 1),), "kind": "tie"}, 1: {"groups": (), "kind": "none"}, 2: {"edit": f"word {n}"}}.get(n % 8, {})
            voted.append(replace(item, vote=replace(item.vote, voter=f"v{n % 3}", **change)))
    examples = examples_from_votes(voted, tokenizer)
    reward, _, report, may_train = train_reward(model, examples, QUICK, 0, lambda *_: None)
    assert may_train and reward is not None
    assert (report["votes_used"], report["strict"], report["ties"], report["none_good"], report["edits"]) == (48, 36, 6, 6, 6)
    assert report["pairs"] == report["comparisons"] == 36  # the six pairs with an edit are learned from, not tested on
    assert report["voters"]["count"] == 3 and sum(row["votes"] for row in report["voters"]["listed"]) == 48
    assert all(member.level.item() != 0.0 for member in reward.members)
    reward.delete()


def test_votes_on_chosen_replies_are_learned_from_but_not_tested_on(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 32)
        examples = examples_from_votes(store.voted_comparisons(), tokenizer)
    half = [replace(e, chosen=n % 2 == 0) for n, e in enumerate(examples)]
    heads_only = replace(QUICK, reward=replace(QUICK.reward, epochs=0))
    _, judges, report, _ = train_reward(model, half, heads_only, 0, lambda *_: None)
    assert (report["votes_used"], report["strict"], report["chosen"], report["comparisons"], report["pairs"]) == (32, 32, 16, 16, 16)
    assert report["learning_curve"][-1]["accuracy"] == pytest.approx(report["accuracy"]["value"], abs=1e-3)  # of the same votes
    fitted_to_all = train_reward(model, examples, heads_only, 0, lambda *_: None)[1]
    assert judges is not None and fitted_to_all is not None
    assert all(torch.equal(a.head.weight, b.head.weight) for a, b in zip(judges.members, fitted_to_all.members, strict=True))


def test_the_curves_and_the_reward_model_lie_beside_the_record(published: tuple) -> None:
    directory = published[0] / "rounds" / "000001"
    assert list((directory / "tb").glob("events*"))
    assert (directory / "reward" / "member1" / "adapter_model.safetensors").is_file()


def test_progress_goes_through_the_three_stages_and_never_back(published: tuple) -> None:
    _, _, seen = published
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["training_reward", "ppo", "gating"]
    fractions = [fraction for _, fraction, _ in seen]
    assert fractions == sorted(fractions) and fractions[0] >= 0 and fractions[-1] <= 1


def test_a_disk_that_is_full_for_a_moment_costs_no_round(
    tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, seen = learner_on(tmp_path, model, tokenizer), list[Any]()

    def full(*_: Any, **__: Any) -> None:
        raise DiskFull("no room")

    monkeypatch.setattr(learner.files, "progress", full)
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        assert run(learner, store.voted_comparisons(), seen=seen)["state"] == "published" and len(seen) > 10


def test_no_words_of_people_are_in_the_record(published: tuple) -> None:
    data_dir, _, _ = published
    for file in ("round.json", "progress.json"):
        assert "Question number" not in (data_dir / "rounds" / "000001" / file).read_text()


def test_a_round_run_again_from_its_record_is_the_same_bit_for_bit(published: tuple, tiny_llama: Path) -> None:
    data_dir, _, _ = published
    outcome = replay_round(data_dir, tiny_llama, 1)
    assert outcome["same"] and outcome["adapter_sha256"] == outcome["published_sha256"]
    assert AdapterRegistry(data_dir / "adapters").versions() == ["v000001"]  # nothing was published
    files = RoundFiles(data_dir / "rounds")
    other = files.begin()
    files.finish(other, files.read(1) | {"seed": 99})
    assert not replay_round(data_dir, tiny_llama, other)["same"]


def test_a_round_that_failed_can_be_run_again_and_a_damaged_record_cannot(
    tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer, tiny_llama: Path
) -> None:
    wild = replace(QUICK, ppo=replace(QUICK.ppo, max_new_tokens=100_000))  # no prompt leaves room for it
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(tmp_path, model, tokenizer, wild), store.voted_comparisons())
    assert record["state"] == "failed" and "no prompt leaves room" in record["reason"]
    assert replay_round(tmp_path, tiny_llama, 1)["same"]
    (tmp_path / "rounds" / "000001" / "round.json").write_text("")
    with pytest.raises(RoundStopped, match="its record is damaged"):
        replay_round(tmp_path, tiny_llama, 1)


def test_the_next_round_starts_from_the_live_version(published: tuple, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    data_dir, record, _ = published
    with Store.open(data_dir, read_only=True) as store:
        second = run(learner_on(data_dir, model, tokenizer), store.voted_comparisons(), live=record["version"])
    assert second["parent"] == "v000001" and second["reference"] == "base"
    assert second["state"] == "published", second["reason"]
    assert second["ppo"]["history"][0]["kl"] != pytest.approx(0.0, abs=1e-6)  # it begins where the live version is
    assert record["ppo"]["history"][0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert model.lora.names() == []  # a round leaves nothing in the model


def test_what_an_earlier_round_read_is_not_read_again_and_a_replay_finds_the_same_bits(
    tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []
    probe = gate.probe_answers
    monkeypatch.setattr(gate, "probe_answers", lambda m, t, probes, adapter: (asked.append(adapter), probe(m, t, probes, adapter))[1])
    learner = learner_on(tmp_path, model, tokenizer)
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        votes = store.voted_comparisons()
        first = run(learner, votes[:16])
        assert len(learner.features) == 16 and asked == ["policy", None]
        second = run(learner, votes, live=first["version"] or "base")
    assert len(learner.features) == 24 and asked[2:] == ["policy"]
    assert second["version"] and second["gate"]["reference_probe"] == first["gate"]["reference_probe"]
    assert replay_round(tmp_path, tiny_llama, 2)["same"]  # by a learner that has read nothing yet


def test_a_round_that_left_a_far_live_version_for_the_reference_says_so(published: tuple, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    data_dir, record, _ = published
    anew = replace(QUICK, ppo=replace(QUICK.ppo, updates=1, lr=QUICK.ppo.lr / 4, kl_target=0.5 * record["ppo"]["kl"], kl_ceiling=1.0))
    with Store.open(data_dir, read_only=True) as store:
        second = run(learner_on(data_dir, model, tokenizer, anew), store.voted_comparisons(), live=record["version"])
    assert second["state"] == "published" and second["parent"] == record["version"] and second["ppo"]["history"][0]["kl"] == 0.0
    assert AdapterRegistry(data_dir / "adapters").manifest(second["version"]).parent == "base"  # what it was made from
    assert second["ppo"]["note"].startswith("began at the reference: the live version is") and record["ppo"]["note"] is None


def test_votes_that_show_no_taste_start_no_ppo(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 16, clear=False)
        record = run(learner_on(tmp_path, model, tokenizer), store.voted_comparisons())
    assert record["state"] == "not_ready" and record["reason"].startswith("not yet: about")
    assert record["ppo"] is None and record["version"] is None
    assert AdapterRegistry(tmp_path / "adapters").versions() == []


def test_a_round_without_votes_says_so(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    record = run(learner_on(tmp_path, model, tokenizer), [])
    assert record["state"] == "not_ready" and "8 more votes" in record["reason"]


def test_a_version_that_fails_its_gate_is_kept_as_rejected(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    strict = replace(QUICK, gate=replace(LOOSE, max_kl=-1.0))
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(tmp_path, model, tokenizer, strict), store.voted_comparisons())
    assert record["state"] == "rejected" and record["version"] == "v000001"
    assert [tried["share"] for tried in record["gate"]["attempts"]] == [1.0, 0.7, 0.49]
    assert AdapterRegistry(tmp_path / "adapters").verify("v000001").gate["verdict"] == "rejected"


def test_a_version_that_goes_too_far_is_shrunk_until_it_passes(tmp_path: Path, published: tuple, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    strict = replace(QUICK, gate=replace(LOOSE, max_kl=0.6 * published[1]["gate"]["kl"]))  # the same round as the fixture's but for this
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(tmp_path, model, tokenizer, strict), store.voted_comparisons())
    assert record["state"] == "published" and record["gate"]["share"] == 0.7
    assert record["gate"]["attempts"] == [{"share": 1.0, "failed": ["kl"]}, {"share": 0.7, "failed": []}]
    full, part = (load_file(AdapterRegistry(where / "adapters").path("v000001") / "adapter_model.safetensors") for where in (published[0], tmp_path))
    for name, weight in part.items():
        assert torch.allclose(weight, (0.7 if ".lora_B." in name else 1.0) * full[name], atol=1e-6)


@pytest.mark.parametrize("anew", [False, True])
def test_a_later_version_is_shrunk_towards_where_its_round_began(
    tmp_path: Path, published: tuple, model: CausalModel, tokenizer: ChatTokenizer, anew: bool
) -> None:
    data_dir, first, _ = published
    ppo = QUICK.ppo
    if anew:  # the live version is too far from the reference: the round begins there
        ppo = replace(ppo, updates=1, lr=ppo.lr / 4, kl_target=0.5 * first["ppo"]["kl"], kl_ceiling=1.0)

    def weights(attempts: int) -> dict[str, torch.Tensor]:
        where = tmp_path / str(attempts)
        shutil.copytree(data_dir, where)
        never = replace(QUICK, ppo=ppo, gate=replace(LOOSE, max_kl=-1.0, attempts=attempts))
        with Store.open(where, read_only=True) as store:
            second = run(learner_on(where, model, tokenizer, never), store.voted_comparisons(), live=first["version"])
        assert second["state"] == "rejected" and bool(second["ppo"]["note"]) is anew
        return load_file(AdapterRegistry(where / "adapters").path(second["version"]) / "adapter_model.safetensors")

    live = load_file(AdapterRegistry(data_dir / "adapters").path(first["version"]) / "adapter_model.safetensors")
    full, part = weights(attempts=1), weights(attempts=2)
    for name, weight in part.items():
        expected = full[name] * (0.7 if ".lora_B." in name else 1.0) if anew else live[name].lerp(full[name], 0.7)
        assert torch.allclose(weight, expected, atol=1e-6)
    assert any(not torch.equal(full[name], part[name]) for name in part)


def test_a_version_that_loses_is_asked_once(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    strict = replace(QUICK, gate=replace(LOOSE, min_win_rate=2.0, max_kl=-1.0))
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(tmp_path, model, tokenizer, strict), store.voted_comparisons())
    assert record["state"] == "rejected" and record["gate"]["attempts"] == [{"share": 1.0, "failed": ["win_rate", "kl"]}]


def test_each_part_of_a_round_is_given_what_is_its_own(
    tmp_path: Path, published: tuple, model: CausalModel, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a live version that is not the reference: prompts to practise and to be judged on, members to please and to judge by."""
    data_dir, first, _ = published
    given: dict[str, dict[str, Any]] = {}
    train, asked = round_module.train_ppo, round_module.run_gate

    def ppo(*args: Any, **kwargs: Any) -> Any:
        given["ppo"] = {**kwargs, "reward": [m.name for m in args[2].members], "judges": [m.name for m in kwargs["judges"].members]}
        given["weights"] = {name: p.detach().clone() for name, p in model.lora.parameters(kwargs["start"]).items()}
        return train(*args, **kwargs)

    def gate(*args: Any, **kwargs: Any) -> Any:
        given["gate"] = {**kwargs, "judges": [m.name for m in args[2].members]}
        return asked(*args, **kwargs)

    monkeypatch.setattr(round_module, "train_ppo", ppo)
    monkeypatch.setattr(round_module, "run_gate", gate)
    shutil.copytree(data_dir, tmp_path / "data")
    with Store.open(tmp_path / "data", read_only=True) as store:
        voted = store.voted_comparisons()
        learner = learner_on(tmp_path / "data", model, tokenizer)
        record = run(learner, voted, live=first["version"])
    prompts = choose_prompts(voted, tokenizer, QUICK, record["seed"])
    assert record["state"] == "published", record["reason"]
    assert record["reference"] == "base" and given["ppo"]["reference"] is given["gate"]["reference"] is None
    assert given["ppo"]["start"] == given["gate"]["live"] == round_module.START and given["gate"]["candidate"] == round_module.POLICY
    learner.model.lora.load("again", learner.registry.path(first["version"]))
    assert all(torch.equal(p, given["weights"][name]) for name, p in model.lora.parameters("again").items()) and given["weights"]
    model.lora.delete("again")
    assert given["ppo"]["prompts"] == prompts.practice and given["gate"]["prompts"] == prompts.held_out
    assert given["ppo"]["judges"] == given["gate"]["judges"] and all(name.startswith("judge") for name in given["gate"]["judges"])
    assert not any(name.startswith("judge") for name in given["ppo"]["reward"])
    assert given["ppo"]["config"].kl_target == record["ppo"]["kl_target"] == pytest.approx(QUICK.ppo.kl_target * (24 / 64) ** 0.5)


def test_a_round_learns_from_no_more_votes_than_it_may(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    few = replace(QUICK, min_votes=100, reward=replace(QUICK.reward, max_examples=9))
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(tmp_path, model, tokenizer, few), store.voted_comparisons())
    assert (record["state"], record["votes"], record["reward"]["votes_used"]) == ("not_ready", 24, 9)


def test_an_exploding_policy_is_dropped_and_never_published(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    wild = replace(QUICK, ppo=replace(QUICK.ppo, lr=1e30))
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(tmp_path, model, tokenizer, wild), store.voted_comparisons())
    assert record["state"] == "failed" and record["reason"]
    assert AdapterRegistry(tmp_path / "adapters").versions() == [] and model.lora.names() == []


def test_a_failing_part_ends_in_a_record_with_its_reason(
    tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise PPOError("value_loss is not a finite number")

    monkeypatch.setattr(round_module, "train_ppo", fail)
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(tmp_path, model, tokenizer), store.voted_comparisons())
    assert (record["state"], record["reason"]) == ("failed", "value_loss is not a finite number")
    assert RoundFiles(tmp_path / "rounds").read(1)["reason"] == record["reason"]


def test_the_replies_people_wrote_are_what_ppo_ptx_mixes_in_but_to_prompts_of_the_gate(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def look(*args: Any, **kwargs: Any) -> None:
        given.update(kwargs)
        raise PPOError("seen enough")

    monkeypatch.setattr(round_module, "train_ppo", look)
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        for n, item in enumerate(store.voted_comparisons()):
            store.record_vote(item.comparison.id, "ann", groups=item.vote.groups, kind="favourite", edit=f"Written by a person, {n}.")
        voted = store.voted_comparisons()
    long = next(item for item in voted if held_out_side(str(item.comparison.conversation_id), QUICK.held_out_prompts, QUICK.seed))
    at = voted.index(long)
    voted[at] = replace(long, comparison=replace(long.comparison, messages=({"role": "user", "content": "Question? " * 400},)))  # too long to be asked
    run(learner_on(tmp_path, model, tokenizer), voted)
    held = set(choose_prompts(voted, tokenizer, QUICK, QUICK.seed + 1).held_out) | {tuple(tokenizer.render(list(voted[at].comparison.messages)))}
    of = {tuple(tokenizer.render(list(item.comparison.messages))): item.vote.edit for item in voted}
    assert held & of.keys() and not held >= of.keys()
    wanted = {prompt: (*tokenizer.encode(edit), tokenizer.end_id) for prompt, edit in of.items() if prompt not in held}
    assert dict(given["demonstrations"]) == wanted


def test_an_error_that_nobody_expected_is_told_without_its_words(
    tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Such as sqlite3's "Could not decode to UTF-8 column 'content' with text '...'"."""
    words = "x" + "yzzy"  # the log shows lines of code

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(round_module, "train_ppo", fail)
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(tmp_path, model, tokenizer), store.voted_comparisons())
    told = capfd.readouterr().err
    assert record["state"] == "failed" and record["reason"].startswith("RuntimeError at test_round.py:") and "in fail" in told
    assert words not in told + json.dumps(record)


def test_a_corrupt_live_version_fails_the_round_by_name(tmp_path: Path, published: tuple, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    source = AdapterRegistry(published[0] / "adapters").path("v000001")
    registry.publish(lambda d: [(d / f).write_bytes((source / f).read_bytes()) for f in ("adapter_config.json", "adapter_model.safetensors")], {})
    with (registry.path("v000001") / "adapter_model.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff")
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(tmp_path, model, tokenizer), store.voted_comparisons(), live="v000001")
    assert record["state"] == "failed" and "v000001: adapter_model.safetensors" in record["reason"]


def test_the_reference_is_the_finetuned_ancestor_where_there_is_one(tmp_path: Path, published: tuple, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    source = AdapterRegistry(published[0] / "adapters").path("v000001")
    files = ("adapter_config.json", "adapter_model.safetensors")
    for fields in ({"kind": "sft"}, {"kind": "ppo", "parent": "v000001"}, {"kind": "ppo"}):
        registry.publish(lambda d: [(d / f).write_bytes((source / f).read_bytes()) for f in files], fields)
    learner = learner_on(tmp_path, model, tokenizer)
    assert learner.reference_of("v000002", "auto") == "v000001"
    assert learner.reference_of("v000001", "auto") == "v000001"
    assert learner.reference_of("v000003", "auto") == "base"
    assert learner.reference_of("v000002", "base") == "base"


def test_an_ancestor_that_was_moved_away_does_not_end_the_learning(tmp_path: Path, published: tuple, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    registry = AdapterRegistry(tmp_path / "adapters")
    source = AdapterRegistry(published[0] / "adapters").path("v000001")
    files = ("adapter_config.json", "adapter_model.safetensors")
    lineage = ({"kind": "sft"}, {"parent": "v000001", "reference": "v000001"}, {"parent": "v000002", "reference": "v000001"})
    for fields in lineage:
        registry.publish(lambda d: [(d / f).write_bytes((source / f).read_bytes()) for f in files], fields)
    shutil.rmtree(registry.path("v000002"))
    learner = learner_on(tmp_path, model, tokenizer)
    assert learner.reference_of("v000003", "auto") == "v000001"
    with pytest.raises(CorruptAdapter):
        learner.reference_of("v000002", "auto")


def test_what_is_long_is_neither_practised_nor_asked(published: tuple, tokenizer: ChatTokenizer) -> None:
    with Store.open(published[0], read_only=True) as store:
        voted = store.voted_comparisons()
    longest = max(len(tokenizer.render(list(item.comparison.messages))) for item in voted)
    for most in (longest, longest - 1):
        prompts = choose_prompts(voted, tokenizer, replace(QUICK, prompt_tokens=most), 3)
        assert max(map(len, (*prompts.practice, *prompts.held_out))) <= most
    with pytest.raises(PromptsError, match="0 prompts of at most 1 tokens"):
        choose_prompts(voted, tokenizer, replace(QUICK, prompt_tokens=1), 3)


def test_practice_and_gate_prompts_are_different_and_come_from_people_first(published: tuple, tokenizer: ChatTokenizer) -> None:
    with Store.open(published[0], read_only=True) as store:
        voted = store.voted_comparisons()
    prompts = choose_prompts(voted, tokenizer, QUICK, 3)
    own = {tuple(tokenizer.render(list(item.comparison.messages))) for item in voted}
    assert not set(prompts.practice) & set(prompts.held_out)
    assert own <= set(prompts.practice) | set(prompts.held_out)
    assert 1 <= len(own & set(prompts.held_out)) <= 10  # a fifth of 24 or so
    assert choose_prompts(voted, tokenizer, QUICK, 3) == prompts != choose_prompts(voted, tokenizer, QUICK, 4)
    few = choose_prompts(voted[:2], tokenizer, QUICK, 3)
    assert len(few.practice) == QUICK.practice_prompts and len(few.held_out) == LOOSE.prompts


def test_what_one_round_practised_no_later_one_is_judged_on(published: tuple, tokenizer: ChatTokenizer) -> None:
    with Store.open(published[0], read_only=True) as store:
        voted = store.voted_comparisons()
    rounds = [choose_prompts(voted[: 12 + n], tokenizer, QUICK, n) for n in range(12)]
    practised = {ids for prompts in rounds for ids in prompts.practice}
    assert not practised & {ids for prompts in rounds for ids in prompts.held_out}
    assert choose_prompts(voted, tokenizer, replace(QUICK, seed=1), 0) != choose_prompts(voted, tokenizer, QUICK, 0)


def test_a_prompt_that_was_practised_once_is_not_judged_on_when_an_older_conversation_gets_its_vote(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    """Many conversations begin with the same words, and votes come in any order."""
    held = [held_out_side(f"conv-{n}", QUICK.held_out_prompts, QUICK.seed) for n in range(40)]
    older, newer = held.index(True), held.index(False)
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 12)
        for n in (older, newer):
            store.record_comparison(NewComparison(
                id=f"same-{n}", conversation_id=f"conv-{n}", voter="ann", messages=({"role": "user", "content": "Good morning to you"},), settings={"temperature": 1.0},
                completions=(Completion(0, "So.", (), (), "base", "stop", 0), Completion(1, "No.", (), (), "base", "stop", 0)),
            ))  # fmt: skip
        ids, sides = tuple(tokenizer.render([{"role": "user", "content": "Good morning to you"}])), []
        for n in (newer, older):
            store.record_vote(f"same-{n}", "ann", groups=[[0], [1]], kind="favourite")
            sides.append(choose_prompts(store.voted_comparisons(), tokenizer, QUICK, 0))
        assert all(ids in side.practice and ids not in side.held_out for side in sides)
        store.withdraw_vote(f"same-{newer}", "ann")
        assert ids in choose_prompts(store.voted_comparisons(), tokenizer, QUICK, 0).held_out  # asked by the other alone


def test_the_turns_of_a_conversation_are_on_one_side(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    reply = Completion(0, "So.", (9, 1), (-1.0, -1.0), "base", "stop", 0)
    with Store.open(tmp_path) as store:
        for n in range(30):
            said: tuple = ({"role": "user", "content": f"Question number {n}?"},)
            for turn in range(3):
                comparison = store.record_comparison(NewComparison(
                    id=f"cmp-{n}-{turn}", conversation_id=f"conv-{n}", voter="ann", messages=said, settings={"temperature": 1.0},
                    completions=(reply, replace(reply, index=1, text="No.")),
                ))  # fmt: skip
                store.record_vote(comparison.id, "ann", groups=[[0], [1]], kind="favourite")
                said = (*said, {"role": "assistant", "content": "So."}, {"role": "user", "content": f"And then, {turn}?"})
        voted = store.voted_comparisons()
    prompts = choose_prompts(voted, tokenizer, QUICK, 0)
    of = {tuple(tokenizer.render(list(item.comparison.messages))): item.comparison.conversation_id for item in voted}
    practised, judged = ({of[ids] for ids in side if ids in of} for side in (prompts.practice, prompts.held_out))
    assert practised and judged and not practised & judged and len(practised | judged) == 30


def test_a_prompt_of_the_pool_keeps_its_side_whether_people_ask_it_or_not(published: tuple, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with Store.open(published[0], read_only=True) as store:
        voted = store.voted_comparisons()
    pool = tmp_path / "pool.txt"
    pool.write_text("".join(f"Question number {n}?\n" for n in range(24)) + "".join(f"Say something about {i}.\n" for i in range(40)))
    config = replace(QUICK, pool=str(pool), practice_prompts=100, gate=replace(LOOSE, prompts=100))
    asked, others = choose_prompts(voted, tokenizer, config, 0), choose_prompts(voted[:1], tokenizer, config, 0)
    assert {*asked.practice} == {*others.practice} and {*asked.held_out} == {*others.held_out}
    assert len(asked.practice) > 20 and len(asked.held_out) > 20


def test_what_the_chat_template_refuses_of_a_pool_is_left_out(published: tuple, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    class Strict:
        end_id, encode = tokenizer.end_id, tokenizer.encode

        def render(self, messages: list[dict], *, generation_prompt: bool = True) -> list[int]:
            if messages[0]["role"] == "system":
                raise ValueError("the model's chat template refuses this conversation")
            return tokenizer.render(messages, generation_prompt=generation_prompt)

    pool = tmp_path / "pool.jsonl"
    systems = [{"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"And {i}?"}]} for i in range(5)]
    pool.write_text("\n".join(json.dumps(row) for row in [*systems, *({"prompt": f"About {i}?"} for i in range(60))]))
    prompts = choose_prompts([], Strict(), replace(QUICK, pool=str(pool), practice_prompts=100, gate=replace(LOOSE, prompts=100)), 0)
    assert len(prompts.practice) + len(prompts.held_out) == 60


def test_a_short_pool_is_shared_by_practice_and_gate(published: tuple, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with Store.open(published[0], read_only=True) as store:
        voted = store.voted_comparisons()
    pool = tmp_path / "pool.txt"
    pool.write_text("".join(f"Say something about {i}.\n" for i in range(100)))
    config = LearnerConfig(pool=str(pool))
    prompts = choose_prompts(voted[:2], tokenizer, config, 3)
    assert len(prompts.practice) > 30 and len(prompts.held_out) > 30
    pool.write_text("Hello!\n")
    with pytest.raises(PromptsError, match="too few to practise on some"):
        choose_prompts(voted[:1], tokenizer, config, 3)


def test_an_operators_pool_is_practised_however_many_prompts_people_have(published: tuple, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with Store.open(published[0], read_only=True) as store:
        voted = store.voted_comparisons()
    (tmp_path / "pool.txt").write_text("".join(f"Say something about {i}.\n" for i in range(100)))
    own = {tuple(tokenizer.render(list(item.comparison.messages))) for item in voted}
    practised = set(choose_prompts(voted, tokenizer, replace(QUICK, pool=str(tmp_path / "pool.txt")), 3).practice)
    assert len(practised - own) == len(practised & own) > QUICK.practice_prompts
    assert set(choose_prompts(voted, tokenizer, QUICK, 3).practice) < own  # the bundled ones only make up the numbers


def test_an_operators_pool_takes_the_place_of_the_bundled_prompts(published: tuple, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with Store.open(published[0], read_only=True) as store:
        voted = store.voted_comparisons()
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(400)))
    config = replace(QUICK, pool=str(tmp_path / "pool.jsonl"))
    prompts = choose_prompts(voted[:2], tokenizer, config, 3)
    mine = {tuple(tokenizer.render([{"role": "user", "content": f"Question {i}?"}])) for i in range(400)}
    own = {tuple(tokenizer.render(list(item.comparison.messages))) for item in voted[:2]}
    assert set(prompts.practice) | set(prompts.held_out) <= mine | own
    with pytest.raises(PromptsError, match="no file"):
        choose_prompts(voted, tokenizer, replace(QUICK, pool=str(tmp_path / "none.txt")), 3)


def test_a_round_cut_short_is_abandoned_and_one_that_had_published_is_not(tmp_path: Path, published: tuple) -> None:
    files, registry = RoundFiles(tmp_path / "rounds"), AdapterRegistry(tmp_path / "adapters")
    assert files.begin() == 1
    assert close_unfinished(files, registry) == [(1, "abandoned")]
    assert files.read(1)["state"] == "abandoned" and not files.read(1).get("last_seq")
    n = files.begin()  # killed after the rename of the version, before the record
    (files.directory(n) / "draft.json").write_text(json.dumps({"round": n, "state": "failed", "last_seq": 7, "version": None}))
    source = AdapterRegistry(published[0] / "adapters").path("v000001")
    names = ("adapter_config.json", "adapter_model.safetensors")
    registry.publish(lambda d: [(d / f).write_bytes((source / f).read_bytes()) for f in names], {"round": n, "gate": {"verdict": "passed", "checks": []}})
    assert close_unfinished(files, registry) == [(2, "published")]
    assert files.read(2)["version"] == "v000001" and files.read(2)["last_seq"] == 7
    assert close_unfinished(files, registry) == []


def test_a_policy_with_a_nan_is_never_published(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = round_module.train_ppo

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        with torch.no_grad():
            next(iter(model.lora.parameters("policy").values())).view(-1)[0] = float("nan")
        return result

    monkeypatch.setattr(round_module, "train_ppo", poisoned)
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = run(learner_on(tmp_path, model, tokenizer), store.voted_comparisons())
    assert record["state"] == "failed" and "not finite" in record["reason"]
    assert AdapterRegistry(tmp_path / "adapters").versions() == []
