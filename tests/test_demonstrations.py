"""A round of instruction finetuning on people's edits, and the proof that the next PPO round measures KL against what it made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import round as round_module
from learner.config import LearnerConfig, SFTRoundConfig
from learner.data import prompt_key
from learner.demonstrations import demonstrations, learn
from learner.practice import choose_prompts, held_out_side
from learner.round import Learner, close_unfinished, replay_round
from learner.versions import shrink
from learner.worker import finetuning_due, progress_so_far
from store.adapters import AdapterRegistry
from store.records import Completion, NewComparison
from store.rounds import RoundFiles
from store.store import Store
from tests.test_round import LOOSE, QUICK, vote_on

CONFIG = replace(
    QUICK, gate=LOOSE,
    sft=SFTRoundConfig(min_demonstrations=6, passes=4, lora_r=4, lora_alpha=8, lr=5e-3, tokens_per_batch=128, max_seconds=600.0, max_kl=1e9),
)  # fmt: skip


def edit_on(store: Store, count: int, *, first: int = 0) -> None:
    """`count` comparisons with an earlier turn of the assistant's, each answered by a person's own reply."""
    for n in range(first, first + count):
        comparison = store.record_comparison(NewComparison(
            id=f"edit-{n}", conversation_id=f"edited-{n}", voter="ann",
            messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": f"Edit number {n}?"}),
            settings={}, completions=(Completion(0, "No.", (), (), "base", "stop", n), Completion(1, "Yes.", (), (), "base", "stop", n)),
        ))  # fmt: skip
        store.record_vote(comparison.id, "ann", groups=[], kind="none", edit=f"People like bees number {n % 3}.")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


def learner_on(data_dir: Path, model: CausalModel, tokenizer: ChatTokenizer, config: LearnerConfig = CONFIG) -> Learner:
    return Learner(model, tokenizer, config, RoundFiles(data_dir / "rounds"), AdapterRegistry(data_dir / "adapters"))


def finetuning_round(learner: Learner, voted: list[Any], live: str = "base", seen: list | None = None) -> dict[str, Any]:
    report = lambda *what: seen.append(what) if seen is not None else None  # noqa: E731
    return learner.run_round(learner.files.begin(), voted, live, run_requested=3, report=report, learn=learn)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory, model: CausalModel, tokenizer: ChatTokenizer) -> tuple[Path, dict, list]:
    """A data directory with 24 votes and 12 edits in which a round has published a finetuned version."""
    data_dir, seen = tmp_path_factory.mktemp("sft-round"), []
    with Store.open(data_dir) as store:
        vote_on(store, tokenizer, 24)
        edit_on(store, 12)
        record = finetuning_round(learner_on(data_dir, model, tokenizer), store.voted_comparisons(), seen=seen)
    return data_dir, record, seen


def test_edits_that_are_all_in_a_conversation_kept_for_judging_wait_for_others(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    held = next(name for name in (f"chat-{n}" for n in range(100)) if held_out_side(name, CONFIG.held_out_prompts, CONFIG.seed))
    with Store.open(tmp_path) as store:
        for n in range(8):
            store.record_comparison(NewComparison(
                id=f"edit-{n}", conversation_id=held, voter="ann", messages=({"role": "user", "content": f"Edit number {n}?"},), settings={},
                completions=(Completion(0, "No.", (), (), "base", "stop", n), Completion(1, "Yes.", (), (), "base", "stop", n)),
            ))  # fmt: skip
            store.record_vote(f"edit-{n}", "ann", groups=[], kind="none", edit=f"People like bees number {n}.")
        record = finetuning_round(learner_on(tmp_path, model, tokenizer), store.voted_comparisons())
    assert record["state"] == "not_ready" and "kept for judging" in record["reason"] and "template" not in record["reason"]


def test_a_prompt_that_a_plain_vote_practises_is_learned_from_and_a_long_one_kept_for_judging_is_not(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    """Sides go by every standing vote's conversation, and also where a prompt is too long for the gate to ask."""
    sides = {side: next(name for name in (f"chat-{n}" for n in range(100)) if held_out_side(name, CONFIG.held_out_prompts, CONFIG.seed) is side) for side in (True, False)}
    short, long = ({"role": "user", "content": "Edit number 1?"},), ({"role": "user", "content": "Edit number 2? " * 40},)
    config = replace(CONFIG, prompt_tokens=64)
    with Store.open(tmp_path) as store:
        for n, (conversation, said) in enumerate([(sides[True], short), (sides[False], short), (sides[True], long), *((f"other-{k}", ({"role": "user", "content": f"Bees {k}?"},)) for k in range(6))]):
            replies = (Completion(0, "No.", (), (), "base", "stop", n), Completion(1, "Yes.", (), (), "base", "stop", n))
            store.record_comparison(NewComparison(id=f"c-{n}", conversation_id=conversation, voter="ann", messages=said, settings={}, completions=replies))
            store.record_vote(f"c-{n}", "ann", groups=[[0], [1]], kind="favourite", edit=None if n == 1 else f"People like bees number {n}.")
        voted = store.voted_comparisons()
        prompts = choose_prompts(voted, tokenizer, config, 3)
        record = finetuning_round(learner_on(tmp_path, model, tokenizer, config), voted)
    assert prompt_key(long) in prompts.judging and prompt_key(short) not in prompts.judging
    edited = [v for v in voted if v.vote.edit]
    kept = sum(prompt_key(v.comparison.messages) in prompts.judging for v in edited)
    assert kept >= 1 and (record["sft"]["chats"], record["sft"]["held_out"]) == (len(edited) - kept, kept)
    assert prompt_key(short) in choose_prompts([v for v in voted if v.vote.edit], tokenizer, config, 3).judging  # which is why it must see all


def test_only_the_persons_reply_carries_loss(finetuned: tuple, tokenizer: ChatTokenizer) -> None:
    with Store.open(finetuned[0], read_only=True) as store:
        found = demonstrations(store.voted_comparisons(), tokenizer, 512)
    assert len(found) == 12
    example = found[4].example
    learned = [i for i, on in zip(example.ids, example.loss, strict=True) if on]
    assert tokenizer.hf.decode(learned) == "People like bees number 1.<|end|>"
    assert "Hello" in tokenizer.hf.decode(list(example.ids))  # the model's own earlier words are read, not learned


def test_the_round_publishes_a_version_of_kind_sft_with_its_lineage(finetuned: tuple, model: CausalModel) -> None:
    data_dir, record, seen = finetuned
    assert record["state"] == "published", record["reason"]
    manifest = AdapterRegistry(data_dir / "adapters").verify(record["version"])
    assert (manifest.kind, manifest.parent, manifest.round) == ("sft", "base", 1)
    assert manifest.base_digest == model.digest and manifest.data_digest == record["data_digest"]
    assert record["sft"]["loss_after"] < record["sft"]["loss_before"]
    assert 1 <= record["sft"]["held_out"] <= 5 and record["sft"]["held_out"] + record["sft"]["chats"] == 12  # a fifth or so is for measuring only
    assert record["votes"] == len(record["vote_ids"]) == 12 and len(record["beside"]) == 24
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["finetuning", "gating"]
    assert "bees number" not in (data_dir / "rounds" / "000001" / "round.json").read_text()


def test_its_gate_has_every_check_but_the_win_rate(finetuned: tuple) -> None:
    names = [check["name"] for check in finetuned[1]["gate"]["checks"]]
    assert names == ["finite", "kl", "length", "broken", "repetition", "distinct2", "refusals", "probe_loss", "probe_accuracy"]
    assert finetuned[1]["gate"]["win_rate"] is None and finetuned[1]["gate"]["kl"] > 0.1


def test_votes_and_an_operators_wish_are_left_for_the_ppo_round_after_it(finetuned: tuple) -> None:
    assert progress_so_far(RoundFiles(finetuned[0] / "rounds")) == (0, 36, 0)  # votes used, demonstrations used, requests met


def test_a_finetuned_version_that_fails_the_gate_is_kept_as_rejected(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    strict = replace(CONFIG, sft=replace(CONFIG.sft, max_kl=-1e9))
    with Store.open(tmp_path) as store:
        edit_on(store, 12)
        record = finetuning_round(learner_on(tmp_path, model, tokenizer, strict), store.voted_comparisons())
    assert record["state"] == "rejected" and record["gate"]["failed"] == ["kl"]
    assert [tried["share"] for tried in record["gate"]["attempts"]] == [1.0, 0.6, 0.36, 0.216, 0.13]
    assert AdapterRegistry(tmp_path / "adapters").verify("v000001").gate["verdict"] == "rejected"


def test_a_version_that_fails_is_shrunk_until_it_passes(tmp_path: Path, finetuned: tuple, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    whole = finetuned[1]["gate"]["kl"]
    strict = replace(CONFIG, sft=replace(CONFIG.sft, max_kl=0.6 * whole))  # the same round as the fixture's but for this
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        edit_on(store, 12)
        record = finetuning_round(learner_on(tmp_path, model, tokenizer, strict), store.voted_comparisons())
    assert record["state"] == "published", record["gate"]["failed"]
    assert record["gate"]["attempts"][0] == {"share": 1.0, "failed": ["kl"]} and record["gate"]["share"] < 1
    full = load_file(AdapterRegistry(finetuned[0] / "adapters").path("v000001") / "adapter_model.safetensors")
    part = load_file(AdapterRegistry(tmp_path / "adapters").path("v000001") / "adapter_model.safetensors")
    for name, weight in part.items():
        share = 0.6 ** (len(record["gate"]["attempts"]) - 1) if ".lora_B." in name else 1.0
        assert torch.allclose(weight, share * full[name], atol=1e-6)
    assert finetuned[1]["sft"]["loss_after"] < record["sft"]["loss_after"] < record["sft"]["loss_before"]


def test_shrinking_from_a_version_goes_back_towards_it(model: CausalModel) -> None:
    for seed, name in enumerate(("from", "to")):
        model.lora.create(name, r=2, seed=seed)
    trained = {key: p.detach().clone() + 1 for key, p in model.lora.parameters("to").items()}
    shrink(model.lora, "to", "from", trained, 0.25)
    for key, p in model.lora.parameters("to").items():
        assert torch.allclose(p, 0.75 * model.lora.parameters("from")[key] + 0.25 * trained[key])
    model.lora.delete("from")
    model.lora.delete("to")


def test_finetuning_that_lowers_no_held_out_loss_publishes_nothing(tmp_path: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    idle = replace(CONFIG, sft=replace(CONFIG.sft, lr=1e-12))
    with Store.open(tmp_path) as store:
        edit_on(store, 12)
        record = finetuning_round(learner_on(tmp_path, model, tokenizer, idle), store.voted_comparisons())
    assert record["state"] == "failed" and "did not fall" in record["reason"]
    assert AdapterRegistry(tmp_path / "adapters").versions() == [] and model.lora.names() == []
    assert progress_so_far(RoundFiles(tmp_path / "rounds"))[1] == 12  # not tried again until new ones have come


def test_the_round_run_again_from_its_record_is_the_same_bit_for_bit(finetuned: tuple, tiny_llama: Path) -> None:
    outcome = replay_round(finetuned[0], tiny_llama, 1)
    assert outcome["same"] and outcome["adapter_sha256"] == outcome["published_sha256"]


def test_cut_short_after_publishing_its_record_is_finished(tmp_path: Path, finetuned: tuple) -> None:
    files, registry = RoundFiles(tmp_path / "rounds"), AdapterRegistry(tmp_path / "adapters")
    n = files.begin()
    draft = json.loads((finetuned[0] / "rounds" / "000001" / "draft.json").read_text())
    (files.directory(n) / "draft.json").write_text(json.dumps(draft))
    source = AdapterRegistry(finetuned[0] / "adapters").path("v000001")
    names = ("adapter_config.json", "adapter_model.safetensors")
    registry.publish(lambda d: [(d / f).write_bytes((source / f).read_bytes()) for f in names], {"round": n, "kind": "sft", "gate": draft["gate"]})
    assert close_unfinished(files, registry) == [(1, "published")]
    assert files.read(1)["kind"] == "sft" and progress_so_far(files) == (0, 36, 0)


def test_the_kl_reference_of_the_next_ppo_round_is_the_frozen_finetuned_adapter(
    finetuned: tuple, model: CausalModel, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PPO round is real; on its way in and out the reference it was handed is held against the published file."""
    data_dir, made, _ = finetuned
    published = load_file(AdapterRegistry(data_dir / "adapters").path(made["version"]) / "adapter_model.safetensors")
    handed: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        for _ in range(2):
            weights = model.lora.parameters(kwargs["reference"])
            handed.append({name: p.detach().clone() for name, p in weights.items()})
            assert not any(p.requires_grad for p in weights.values())
            if len(handed) == 1:
                result = train_ppo(*args, **kwargs)
        assert kwargs["reference"] != kwargs["policy"] != kwargs["start"]
        return result

    train_ppo = round_module.train_ppo
    monkeypatch.setattr(round_module, "train_ppo", watched)
    learner = learner_on(data_dir, model, tokenizer)
    with Store.open(data_dir, read_only=True) as store:
        voted = store.voted_comparisons()
    record = learner.run_round(learner.files.begin(), voted, made["version"], run_requested=0, report=lambda *_: None)
    assert record["state"] == "published", record["reason"]
    assert record["reference"] == record["parent"] == made["version"] and record["kind"] == "ppo"
    for weights in handed:  # before and after: what was published, bit for bit
        assert weights.keys() == published.keys()
        assert all(torch.equal(weights[name], published[name]) for name in published)
    assert record["ppo"]["history"][0]["kl"] == pytest.approx(0.0, abs=1e-5)  # it starts where its reference is

    # The next one starts from that PPO version and still measures from the finetuned one, not from base or its parent.
    monkeypatch.setattr(round_module, "train_ppo", train_ppo)
    second = learner.run_round(learner.files.begin(), voted, record["version"], run_requested=0, report=lambda *_: None)
    assert (second["parent"], second["reference"]) == (record["version"], made["version"])
    assert second["ppo"]["history"][0]["kl"] != pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("new, paused, expected", [(5, False, False), (6, False, True), (60, True, False)])
def test_finetuning_is_due_when_enough_new_demonstrations_came(new: int, paused: bool, expected: bool) -> None:
    assert finetuning_due(new, paused, CONFIG) is expected


def test_demonstrations_are_counted_as_they_stand(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        edit_on(store, 4)
        assert store.standing_demonstrations() == 4 and store.standing_demonstrations(since_seq=3) == 1
        store.withdraw_vote("edit-3", "ann")
        assert store.standing_demonstrations() == 3
        store.record_vote("edit-0", "ann", groups=[[0], [1]], kind="favourite")  # replaced, without an edit
        assert store.standing_demonstrations() == 2
