"""Versions against each other: intervals against scipy and hand arithmetic, benchmarks on adapters whose answers are known."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

import plaudit
from engine.engine import probe
from engine.features import COUNTS
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.config import RewardConfig, SFTRoundConfig
from learner.evaluate import (
    EvaluationError,
    blind_win_rate,
    bounded,
    compare,
    generation,
    known_answers,
    mean_t,
    mmlu,
    right,
    some,
)
from learner.finetune import publish_finetuned
from learner.formats import Instruction
from learner.mmlu import Question, Subject
from learner.reward import RewardModel
from learner.reward_eval import as_examples, evaluate_reward
from store import AdapterRegistry, NotFound, Preference, RoundFiles, Store, import_preferences

HI = {"role": "user", "content": "Hi"}
ASKED = {"role": "user", "content": "Question 77?\nAnswer:"}  # like what the version below was trained on


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> CausalModel:
    return CausalModel.load(tiny_llama)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_llama)


@pytest.fixture(scope="module")
def always_b(tmp_path_factory: pytest.TempPathFactory, model: CausalModel, tokenizer: ChatTokenizer) -> Path:
    """A data directory whose v000001 answers "B" to whatever it is asked."""
    data_dir = tmp_path_factory.mktemp("always-b")
    chats = [[{"role": "user", "content": f"Question {n}?\nAnswer:"}, {"role": "assistant", "content": "B"}] for n in range(24)]
    config = SFTRoundConfig(passes=20, lora_r=8, lr=1e-2, tokens_per_batch=128, max_seconds=1e9)
    publish_finetuned(model, tokenizer, chats, config, AdapterRegistry(data_dir / "adapters"))
    return data_dir


def longer_is_better(model: CausalModel) -> RewardModel:
    """Two members that score a reply by the logarithm of its length, once and twice."""
    reward = RewardModel.create(model, RewardConfig(), 2)
    for weight, member in enumerate(reward.members, 1):
        with torch.no_grad():
            member.head.weight[0, -COUNTS] = float(weight)
    return reward


# --- intervals


def test_the_t_interval_is_scipys() -> None:
    values = [0.1, 0.4, -0.3, 0.9, 0.2]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    got = mean_t(values)
    assert (got.value, got.low, got.high) == pytest.approx((sum(values) / 5, low, high))
    assert mean_t([3.0]).low is None


def test_a_share_has_wilsons_interval() -> None:
    """7 of 10: Wilson by scipy."""
    expected = stats.binomtest(7, 10).proportion_ci(0.95, method="wilson")
    got = right([1.0] * 7 + [0.0] * 3)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_equal_scores_never_claim_certainty() -> None:
    same = compare("b", "m", {"a": [1.0] * 5, "b": [1.0] * 5}, right)
    assert same.difference.value == 0 and same.difference.low < -0.2 and same.difference.high > 0.2
    assert bounded([1.0] * 5).low < 0.9 and bounded([1.0] * 5).high == 1.0
    assert bounded([0.2, 0.4, 0.6]).low == pytest.approx(max(0.0, mean_t([0.2, 0.4, 0.6]).low))


def test_the_difference_is_paired_and_groups_have_their_means() -> None:
    a, b = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]
    figure = compare("b", "m", {"x": a, "y": b}, right, groups=["s", "s", "t", "t"])
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (figure.difference.low, figure.difference.high) == pytest.approx((expected.low, expected.high))
    assert figure.parts == {"s": {"x": 0.5, "y": 0.0}, "t": {"x": 1.0, "y": 0.5}}
    assert compare("b", "m", {"x": a}, right).difference is None


def test_a_limit_draws_the_same_items_again_in_their_order() -> None:
    drawn = some(list(range(100)), 10, 3)
    assert drawn == some(list(range(100)), 10, 3) == sorted(drawn) and len(drawn) == 10
    assert some([1, 2], 10, 0) == [1, 2]


# --- benchmarks


def test_a_version_that_always_says_b_gets_the_share_of_bs(always_b: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    questions = [Question(f"What of {n}?", ("p", "q", "r", "s"), answer) for n, answer in enumerate([1, 1, 1, 0, 2, 3, 1, 0])]
    subjects = [Subject("botany", tuple(questions[:5])), Subject("law", tuple(questions[5:]))]
    model.lora.load("b", AdapterRegistry(always_b / "adapters").path("v000001"))
    try:
        figure = mmlu(model, tokenizer, {"v000001": "b"}, subjects)
        assert figure.values["v000001"].value == 4 / 8 and figure.items == 8
        assert figure.parts == {"botany": {"v000001": 3 / 5}, "law": {"v000001": 1 / 3}}
    finally:
        model.lora.delete("b")


def test_generated_text_is_scored_against_its_references(always_b: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    """The version says "B": 1 against "b", 2/3 against "b two", 0 against "c"; the best reference counts."""
    asked = [Instruction((ASKED,), refs) for refs in (("b",), ("b two",), ("c",), ("c", "B!"))] * 9  # more than one batch
    model.lora.load("b", AdapterRegistry(always_b / "adapters").path("v000001"))
    try:
        figure = generation(model, tokenizer, {"v": "b", "base": None}, asked, name="t", max_tokens=4)
    finally:
        model.lora.delete("b")
    assert figure.values["v"].value == pytest.approx((1 + 2 / 3 + 0 + 1) / 4) and figure.items == 36
    assert figure.difference.value == pytest.approx(figure.values["v"].value - figure.values["base"].value)


def test_prompts_without_room_for_a_reply_are_left_out_and_counted(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    long = Instruction(({"role": "user", "content": "word " * 600},), ("x",))
    figure = generation(model, tokenizer, {"base": None}, [long, Instruction((HI,), ("x",))], name="t", max_tokens=2)
    assert figure.items == 1 and "1 prompts too long" in figure.notes[0]
    with pytest.raises(EvaluationError, match="no prompt fits"):
        generation(model, tokenizer, {"base": None}, [long], name="t", max_tokens=2)


def test_the_blind_judge_prefers_what_it_was_made_to_prefer(always_b: Path, model: CausalModel, tokenizer: ChatTokenizer) -> None:
    """A judge of length, one version that says one word, and the base, which babbles to the limit."""
    model.lora.load("b", AdapterRegistry(always_b / "adapters").path("v000001"))
    prompts = [[{"role": "user", "content": f"Question {n}?\nAnswer:"}] for n in range(6)]
    try:
        ask = lambda adapters: blind_win_rate(model, tokenizer, adapters, longer_is_better(model), prompts, max_tokens=12)  # noqa: E731
        assert ask({"v": "b", "base": None}).values["v"].value < 0.2
        assert ask({"base": None, "v": "b"}).values["base"].value > 0.8
        with pytest.raises(EvaluationError, match="two different versions"):
            ask({"v": "b"})
    finally:
        model.lora.delete("b")


def test_a_version_never_beats_itself_blind(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    model.lora.create("same", r=2, trainable=False)  # B = 0: exactly the base, and both draw with the same seeds
    figure = blind_win_rate(model, tokenizer, {"same": "same", "base": None}, longer_is_better(model), [[HI]] * 3, replies=1, max_tokens=8)
    model.lora.delete("same")
    assert figure.values["same"].value == 0.5


def test_the_known_answers_are_the_gates(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    from learner.gate import load_probes, probe_answers

    told, loss = known_answers(model, tokenizer, {"base": None})
    expected = probe_answers(model, tokenizer, load_probes(), None)
    assert told.values["base"].value == pytest.approx(expected.accuracy) and loss.values["base"].value == pytest.approx(expected.loss, abs=1e-4)


# --- reward models on files

PAIRS = [Preference(({"role": "user", "content": f"Question {n}?"},), "Bees, bees and bees.", "No.", f"v{n}") for n in range(30)]
PAIRS += [Preference(({"role": "user", "content": f"Other {n}?"},), "No.", "Bees, bees and bees.", f"w{n}") for n in range(10)]


def test_the_figures_of_a_reward_model_are_those_worked_out_by_hand(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    report = evaluate_reward(longer_is_better(model), tokenizer, PAIRS)
    assert report["accuracy"]["value"] == 30 / 40 and report["comparisons"] == 40
    long, short = (math.log1p(len(tokenizer.encode(text)) + 1) for text in ("Bees, bees and bees.", "No."))
    p = 1 / (1 + math.exp(-1.5 * (long - short)))  # the members' mean slope is 1.5
    assert report["brier"] == pytest.approx((30 * (1 - p) ** 2 + 10 * p**2) / 40, abs=1e-4)
    assert report["ece"] == pytest.approx(abs(p - 0.75), abs=1e-4)  # one bin: 75% right at confidence p
    assert report["length_only"]["value"] == 0.75 and report["verdict"] == "only_length" and "length" in report["words"]


def test_rows_the_model_learned_from_are_left_out_and_counted(model: CausalModel, tokenizer: ChatTokenizer) -> None:
    learned = {e.prompt_key for e in as_examples(PAIRS[:10], tokenizer)}
    report = evaluate_reward(longer_is_better(model), tokenizer, PAIRS, learned=learned)
    assert (report["rows"], report["learned_from"], report["comparisons"]) == (40, 10, 30)
    assert report["accuracy"]["value"] == pytest.approx(20 / 30, abs=1e-4)
    with pytest.raises(NotFound, match="learned from every prompt"):
        evaluate_reward(longer_is_better(model), tokenizer, PAIRS[:10], learned=learned)


# --- the commands


def run(*args: object):
    """Run a command in this process."""
    return CliRunner().invoke(plaudit.app, list(map(str, args)), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}, catch_exceptions=False)


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def judged(tmp_path: Path, always_b: Path, model: CausalModel, tokenizer: ChatTokenizer) -> Path:
    """A data directory with a version, and a round whose reward model learned from ten of PAIRS."""
    data_dir = tmp_path / "data"
    with Store.open(data_dir) as store:
        import_preferences(store, write_rows(tmp_path / "own.jsonl", [p.row() for p in PAIRS[:10]]), hash_voter=str)
        standing = store.voted_comparisons()
        votes = [item.vote.id for item in standing]
        store.withdraw_vote(standing[0].comparison.id, standing[0].vote.voter)  # what was learned from them was learned
        store.record_vote(standing[1].comparison.id, standing[1].vote.voter, groups=[[0, 1]], kind="tie")
    (data_dir / "adapters").symlink_to(always_b / "adapters")
    files = RoundFiles(data_dir / "rounds")
    n = files.begin()
    longer_is_better(model).save(files.directory(n) / "reward")
    files.finish(n, {"state": "failed", "vote_ids": votes, "base_digest": model.digest, "config": {"reward": {"max_tokens": 256}}})
    cut_short = files.begin()  # by an earlier Plaudit: nobody knows what its reward model learned from
    longer_is_better(model).save(files.directory(cut_short) / "reward")
    files.finish(cut_short, {"state": "abandoned"})
    return data_dir


@pytest.mark.parametrize("implicit", [False, True])
def test_reward_eval_reads_trls_layouts_and_prints_figures_words_and_json(judged: Path, tiny_llama: Path, tmp_path: Path, implicit: bool) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", [p.row(implicit=implicit) for p in PAIRS])
    result = run("reward", "eval", file, "--data-dir", judged, "--model", tiny_llama, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["round"] == 1 and report["learned_from"] == 10 and report["accuracy"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert report["words"] in result.stdout and "66.7%" in result.stdout and "length alone" in result.stdout


def test_eval_compares_versions_on_everything_at_once_and_prints_json_last(judged: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with (tmp_path / "botany_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["What?", "a", "b", "c", "d", "B"], ["Who?", "a", "b", "c", "d", "A"]])
    task = write_rows(tmp_path / "task.jsonl", [{"prompt": [ASKED], "references": ["b"]}] * 3)
    pairs = write_rows(tmp_path / "pairs.jsonl", [p.row() for p in PAIRS])
    result = run(
        "eval", "v000001", "--data-dir", judged, "--model", tiny_llama, "--mmlu", tmp_path, "--shots", 0, "--task", task, "--preferences", pairs,
        "--win-rate", "--limit", 20, "--max-tokens", 8, "--probe", "--json",
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["versions"] == ["v000001", "base"] and told["round"] == 1
    figures = {figure["benchmark"] + "/" + figure["metric"]: figure for figure in told["figures"]}
    assert figures["mmlu/accuracy, 0-shot"]["values"]["v000001"]["value"] == 0.5
    assert figures["task.jsonl/ROUGE-L"]["values"]["v000001"]["value"] == 1.0
    assert 0 <= figures["blind win rate/against base"]["values"]["v000001"]["value"] < 0.3
    assert {"known answers/told from 3 wrong ones", "known answers/nats a token"} <= set(figures)
    assert told["reward"]["comparisons"] + told["reward"]["learned_from"] == 20
    table = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    assert "difference" in table and "ROUGE-L" in table and "(lower is better)" in table


def test_eval_measures_a_bare_model_directory(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("eval", "--model", tiny_llama, "--json")
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["versions"] == ["base"] and all(figure["difference"] is None for figure in told["figures"])
    assert not list(tmp_path.iterdir())  # it only reads


def test_live_is_what_the_data_directory_serves(judged: Path, tiny_llama: Path) -> None:
    with Store.open(judged) as store:
        store.deploy("v000001", "base", actor="op", action="promote")
        told = json.loads(run("eval", "--data-dir", judged, "--model", tiny_llama, "--json").stdout.splitlines()[-1])  # beside the writer
    assert told["versions"] == ["v000001", "base"]


def test_sft_publishes_a_candidate_and_prints_the_held_out_loss_before_and_after(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Question {n}?", "input": "", "output": "The answer is bees."} for n in range(20)]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    args = ("--data-dir", tmp_path / "data", "--model", tiny_llama, "--passes", 3, "--rank", 4, "--lr", 0.01)
    result = run("sft", tmp_path / "alpaca.json", *args, "--name", "bees")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["version"] == "v000001" and told["loss_after"] < told["loss_before"] and told["held_out"] == 2
    manifest = AdapterRegistry(tmp_path / "data" / "adapters").verify("v000001")
    assert (manifest.kind, manifest.gate, manifest.extra["name"]) == ("sft", None, "bees")
    fresh = CausalModel.load(tiny_llama)
    fresh.lora.load("v", tmp_path / "data" / "adapters" / "v000001")
    assert probe(fresh, "v", manifest.probe["prompt_ids"])["top_ids"] == manifest.probe["top_ids"]  # what the server will check


BAD = {
    "no file": ["sft", "{tmp}/none.json"],
    "is a directory": ["sft", "{tmp}"],
    "no known layout": ["sft", "{tmp}/wrong.jsonl"],
    "no version 'v000009'": ["sft", "{tmp}/chats.jsonl", "--parent", "v000009", "--data-dir", "{tmp}", "--model", "{model}"],
    "refuses all 1 chats": ["sft", "{tmp}/chats.jsonl", "--data-dir", "{tmp}", "--model", "{strict}"],
    "no model directory": ["sft", "{tmp}/chats.jsonl", "--data-dir", "{tmp}", "--model", "/nonexistent/model"],
    "no version 'v000007'": ["eval", "v000007", "--data-dir", "{tmp}", "--model", "{model}"],
    "no version 'latest'": ["eval", "latest", "--data-dir", "{tmp}", "--model", "{model}"],
    "no *_test.csv": ["eval", "--mmlu", "{tmp}", "--data-dir", "{tmp}"],
    "wrong.jsonl:1": ["eval", "--task", "{tmp}/wrong.jsonl", "--data-dir", "{tmp}"],
    "wrong.jsonl:1 has no 'chosen'": ["eval", "--preferences", "{tmp}/wrong.jsonl", "--data-dir", "{tmp}"],
    "has saved a reward model": ["eval", "base", "--win-rate", "--against", "v000001", "--data-dir", "{tmp}"],
    "no file {tmp}/p.txt": ["eval", "--win-rate", "--prompts", "{tmp}/p.txt", "--data-dir", "{tmp}"],
    "two different versions": ["eval", "base", "--win-rate", "--data-dir", "{judged}"],
    "round 3 has saved no reward model; these have: 1": ["reward", "eval", "{tmp}/pairs.jsonl", "--round", "3", "--data-dir", "{judged}"],
    "reads another base model": ["reward", "eval", "{tmp}/pairs.jsonl", "--data-dir", "{judged}", "--model", "{other}"],
    "no file {tmp}/none": ["reward", "eval", "{tmp}/none", "--data-dir", "{tmp}"],
    "learned from every prompt": ["reward", "eval", "{tmp}/pairs.jsonl", "--data-dir", "{judged}", "--model", "{model}"],
}


@pytest.mark.parametrize("why", BAD)
def test_what_cannot_be_measured_is_one_line_and_status_2(why: str, judged: Path, tmp_path: Path, tiny_llama: Path) -> None:
    from tests.tiny import tiny_model_dir

    empty = tmp_path / "empty"
    empty.mkdir()
    write_rows(empty / "wrong.jsonl", [{"text": "plain"}])
    write_rows(empty / "chats.jsonl", [{"prompt": "Hi", "references": ["Hello"]}])
    write_rows(empty / "pairs.jsonl", [p.row() for p in PAIRS[:10]])
    names = {"tmp": empty, "judged": judged, "model": tiny_llama}
    if "{other}" in BAD[why]:
        names["other"] = tiny_model_dir(tmp_path / "other", seed=1)
    if "{strict}" in BAD[why]:
        names["strict"] = tiny_model_dir(tmp_path / "strict")
        (tmp_path / "strict" / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    fill = lambda text: text.format(**names) if "{" in text else text  # noqa: E731
    result = run(*map(fill, BAD[why]))
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert fill(why) in result.stderr and result.stderr.splitlines()[-1].startswith("plaudit: "), result.stderr
    assert result.stderr.count("plaudit: ") == 1
