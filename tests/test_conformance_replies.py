"""From a sampled reply to what is learned from it, where pad is an end token and a model has several (as many real ones do).

Every family says its pad token in the middle of prompts and ends replies with it. Oracles: the same draws with the end
tokens ignored, and `transformers` on each row alone, without padding.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.engine import Engine, SamplingParams
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.advantages import last_valid, token_rewards
from learner.config import RewardConfig
from learner.data import encoded
from learner.finetune import last_reply
from learner.reward import RewardModel
from learner.rollout import Trajectories, reply_hidden, reply_logprobs, sample
from learner.sft import IGNORE, collate, encode_chat

TEMPERATURE, TOKENS, GROUP = 0.8, 10, 5
CHAT = (
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"},
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model whose pad is one of its three end tokens, replies of it, and the oracles."""

    model: CausalModel
    tokenizer: ChatTokenizer
    engine: Engine
    prompts: list[list[int]]
    batch: Trajectories
    streams: list[list[int]]  # what would have been said if no token ended a reply
    oracle: torch.nn.Module  # transformers


@pytest.fixture(scope="module")
def case(tiny_any: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    plain = CausalModel.load(tiny_any)
    questions = [ChatTokenizer.load(tiny_any).render([{"role": "user", "content": q}]) for q in ("Hi", "Tell me about the moon.", "Why?")]

    def streams(prompts: list[list[int]]) -> list[list[int]]:
        engine = Engine(plain, ChatTokenizer.load(tiny_any), max_sequences=len(prompts) * GROUP)
        params = [SamplingParams(temperature=TEMPERATURE, max_tokens=TOKENS, seed=100 + i, ignore_eos=True) for i in range(len(prompts) * GROUP)]
        return [s.token_ids for s in engine.generate([p for p in prompts for _ in range(GROUP)], params, "base")]

    said = Counter(t for stream in streams(questions) for t in stream)
    pad, other = [t for t, _ in said.most_common() if t > 4][:2]
    directory = Path(shutil.copytree(tiny_any, tmp_path_factory.mktemp("pad-is-end") / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [pad, other]}))
    tokenizer = AutoTokenizer.from_pretrained(tiny_any)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.save_pretrained(directory)

    prompts = [[pad, *q[:3], pad, pad, *q[3:]] for q in questions]
    model, chat = CausalModel.load(directory), ChatTokenizer.load(directory)
    assert model.pad_id == chat.pad_id == pad and {pad, other, 1} == set(chat.eos_ids)
    engine = Engine(model, chat, max_sequences=len(prompts) * GROUP)
    batch = sample(engine, prompts, version="base", group=GROUP, max_tokens=TOKENS, temperature=TEMPERATURE, seed=100)
    oracle = AutoModelForCausalLM.from_pretrained(tiny_any, dtype=torch.float32).eval()
    return Case(model, chat, engine, prompts, batch, streams(prompts), oracle)


def cut_by_hand(stream: Iterable[int], ends: set[int]) -> list[int]:
    """Tokens up to the first end token, which is the last one."""
    kept: list[int] = []
    for token in stream:
        kept.append(token)
        if token in ends:
            break
    return kept


def test_a_reply_goes_up_to_its_first_end_token_whichever_it_is_and_holds_it(case: Case) -> None:
    ends = set(case.tokenizer.eos_ids)
    assert case.batch.completions == [cut_by_hand(stream, ends) for stream in case.streams]
    last = Counter(c[-1] for c in case.batch.completions)
    assert last[case.model.pad_id] and len(ends & set(last)) >= 2  # the cases that this file is about are there
    assert {len(c) for c in case.batch.completions} >= {TOKENS} and min(map(len, case.batch.completions)) < TOKENS


def test_a_cut_reply_has_no_end_token_and_all_others_have_one_as_their_last(case: Case) -> None:
    ends = set(case.tokenizer.eos_ids)
    for completion, reason, cut in zip(case.batch.completions, case.batch.finish_reasons, case.batch.cut.tolist(), strict=True):
        assert not ends & set(completion[:-1])
        assert cut == (reason == "length") == (completion[-1] not in ends)
        assert len(completion) == TOKENS or not cut
    assert 0 < int(case.batch.cut.sum()) < len(case.batch)


def test_a_reply_that_ends_itself_with_its_last_allowed_token_is_not_cut(case: Case) -> None:
    row = next(i for i, c in enumerate(case.batch.completions) if 1 < len(c) < TOKENS)
    completion, prompt = case.batch.completions[row], case.batch.prompts[row]

    def again(max_tokens: int) -> Trajectories:
        return sample(case.engine, [prompt], version="base", group=1, max_tokens=max_tokens, temperature=TEMPERATURE, seed=100 + row)

    just, short = again(len(completion)), again(len(completion) - 1)
    assert just.completions == [completion] and just.finish_reasons == ["stop"] and not just.cut.any()
    assert short.completions == [completion[:-1]] and short.finish_reasons == ["length"] and short.cut.all()


def test_the_mask_covers_the_sampled_tokens_the_end_among_them_and_nothing_else(case: Case) -> None:
    batch, pad = case.batch, case.model.pad_id
    for i, completion in enumerate(batch.completions):
        assert batch.mask[i].tolist() == [r < len(completion) for r in range(batch.mask.shape[1])]
        assert batch.tokens[i][batch.mask[i]].tolist() == completion
        assert batch.tokens[i][~batch.mask[i]].tolist() == [pad] * (batch.mask.shape[1] - len(completion))
        assert int(batch.valid[i].sum()) == len(batch.prompts[i]) + len(completion)  # pads that were said are no padding
    masked_ends = [batch.tokens[i, int(n) - 1].item() for i, n in enumerate(batch.lengths) if not batch.cut[i]]
    assert masked_ends.count(pad) == sum(c[-1] == pad for c in batch.completions) > 0


def oracle_logprobs(case: Case, temperature: float) -> list[torch.Tensor]:
    """By transformers, each row by itself: log softmax(logits / temperature) of the reply's tokens, one tensor a row."""
    found = []
    for prompt, completion in zip(case.batch.prompts, case.batch.completions, strict=True):
        with torch.no_grad():
            logits = case.oracle(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()
        found.append((logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].float())
    return found


def test_what_is_trained_is_each_sampled_tokens_log_probability_in_an_unpadded_row(case: Case) -> None:
    with torch.no_grad():
        ours = reply_logprobs(case.model, case.batch, torch.arange(len(case.batch)), None, TEMPERATURE)
    for row, expected in zip(ours, oracle_logprobs(case, TEMPERATURE), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=2e-4)
        assert (row[len(expected) :] == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_the_engine_and_the_training_pass_mean_the_same_temperature(case: Case, temperature: float) -> None:
    """docs/design.md: temperature on both sides. Softmax of logits / T where tokens are drawn and where they are learned."""
    batch = sample(case.engine, case.prompts, version="base", group=2, max_tokens=TOKENS, temperature=temperature, seed=7)
    with torch.no_grad():
        ours = reply_logprobs(case.model, batch, torch.arange(len(batch)), None, temperature)
        other = reply_logprobs(case.model, batch, torch.arange(len(batch)), None, 1.3 * temperature)
    expected = oracle_logprobs(replace(case, batch=batch), temperature)
    for i, row in enumerate(expected):
        torch.testing.assert_close(batch.engine_logprobs[i, : len(row)], row, rtol=0, atol=5e-4)
        torch.testing.assert_close(ours[i, : len(row)], row, rtol=0, atol=5e-4)
    assert (other - batch.engine_logprobs).abs().max() > 0.05


def test_a_prompt_padded_on_the_left_as_trl_lays_it_out_gives_the_same_log_probabilities(case: Case) -> None:
    """Prompts padded on the left, replies on the right, in one batch, with a pad that prompts and replies also say."""
    pad, batch = case.model.pad_id, case.batch
    context = max(map(len, batch.prompts))
    ids = torch.full((len(batch), context + TOKENS), pad)
    valid = torch.zeros(ids.shape, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        span = slice(context - len(prompt), context + len(completion))
        ids[i, span], valid[i, span] = torch.tensor([*prompt, *completion]), True
    assert not valid[:, 0].all() and not valid[:, -1].all()
    with torch.no_grad():
        ours = case.model.logprobs(ids, valid=valid, temperature=TEMPERATURE)[:, context - 1 :]
    for row, expected in zip(ours, oracle_logprobs(case, TEMPERATURE), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=2e-4)
        assert (row[len(expected) :] == 0).all()


def test_what_lies_in_the_padding_changes_nothing(case: Case) -> None:
    junk = torch.randint(5, 400, case.batch.ids.shape, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(len(case.batch))
    with torch.no_grad():
        clean = reply_logprobs(case.model, case.batch, rows, None, 1.0)
        dirty = reply_logprobs(case.model, replace(case.batch, ids=torch.where(case.batch.valid, case.batch.ids, junk)), rows, None, 1.0)
    assert not case.batch.valid.all() and torch.equal(clean, dirty)


def test_the_state_before_each_reply_token_is_transformers(case: Case) -> None:
    """Where the policy and the value function read: token r is chosen from the state of the token before it."""
    with torch.no_grad():
        ours = reply_hidden(case.model, case.batch, torch.arange(len(case.batch)), None)
        for i, (prompt, completion) in enumerate(zip(case.batch.prompts, case.batch.completions, strict=True)):
            states = case.oracle.base_model(torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
            torch.testing.assert_close(ours[i, : len(completion)], states[len(prompt) - 1 : -1], rtol=1e-3, atol=2e-3)


def test_the_reward_model_reads_the_last_valid_token_even_where_that_is_the_pad(case: Case) -> None:
    """As transformers' own states have it; of the reply's own tokens, the last is part of the mean, the sum and the count."""
    reward = RewardModel.create(case.model, RewardConfig(members=1), 1)
    torch.nn.init.normal_(reward.members[0].head.weight, generator=torch.Generator().manual_seed(0))
    scores = reward.score(case.batch.prompts, case.batch.completions)[:, 0]
    weight = reward.members[0].head.weight.detach()[0]
    for i, (prompt, completion) in enumerate(zip(case.batch.prompts, case.batch.completions, strict=True)):
        with torch.no_grad():
            states = case.oracle.base_model(torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
        own, n, k = states[len(prompt) :], math.log(1 + len(completion)), len(completion) / 64
        m = math.log(1 + sum(any(mark in case.tokenizer.hf.decode([token]) for mark in ".!?\n") for token in completion))
        features = torch.cat([states[-1], own.mean(0), own.sum(0) / 64, torch.tensor([n, n**2, k, k**2, m, m**2])])
        assert scores[i].item() == pytest.approx(float(weight @ features), rel=1e-3, abs=1e-2)


def test_the_score_lands_on_the_end_token_or_the_last_token_of_a_cut_reply_and_nowhere_else(case: Case) -> None:
    scores = torch.arange(1.0, len(case.batch) + 1)
    rewards = token_rewards(scores, torch.zeros(case.batch.mask.shape), case.batch.mask, 0.1)
    for i, completion in enumerate(case.batch.completions):
        assert rewards[i].tolist() == [float(i + 1) * (r == len(completion) - 1) for r in range(case.batch.mask.shape[1])]
    assert torch.equal(last_valid(case.batch.mask), case.batch.lengths - 1)


def test_instruction_finetuning_learns_the_end_token_and_no_padding_where_they_are_the_same_token(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end == 1
    examples = [encode_chat(ChatTokenizer.of(tokenizer), CHAT), encode_chat(ChatTokenizer.of(tokenizer), CHAT[:2])]
    ids, targets = collate(examples, pad_id=end)
    _, elsewhere = collate(examples, pad_id=0)
    assert torch.equal(targets, elsewhere) and (targets == end).sum(1).tolist() == [2, 1]  # one a reply
    short = len(examples[1].ids)
    assert ids[1, short:].tolist() == [end] * (ids.shape[1] - short) and (targets[1, short - 1 :] == IGNORE).all()


def test_a_reply_that_nobody_sampled_ends_as_the_chat_template_ends_one_whichever_end_token_is_named_first(tiny_llama: Path, tmp_path: Path) -> None:
    """Llama 3 names <|end_of_text|> before the <|eot_id|> that its template writes; edits must not be told by their end."""
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    tokenizer = ChatTokenizer.load(directory)
    assert tokenizer.eos_ids[0] == 7 and tokenizer.hf.convert_ids_to_tokens(1) == "<|end|>"
    assert encoded("Hello you", tokenizer) == (*tokenizer.encode("Hello you"), 1)
    assert last_reply(tokenizer, [5], "See you", 99).ids[-1] == 1


@pytest.mark.parametrize("pad", [-1, 100_000, None])
def test_a_pad_that_the_embedding_has_no_row_for_is_replaced_by_an_end_token(tiny_llama: Path, tmp_path: Path, pad: int | None) -> None:
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    model = CausalModel.load(directory)
    engine = Engine(model, ChatTokenizer.load(directory), max_sequences=4)
    batch = sample(engine, [[5, 6, 7], [8] * 9], version="base", group=2, max_tokens=4, temperature=1.0, seed=0)
    with torch.no_grad():
        ours = reply_logprobs(model, batch, torch.arange(4), None, 1.0)
    assert model.pad_id == 1 and not batch.valid.all() and (ours - batch.engine_logprobs).abs().max() < 1e-4
