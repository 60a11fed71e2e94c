"""Engine and learner on a GPU, against transformers on the CPU and against themselves; skipped where torch sees none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from engine import decoder, gpu
from engine.engine import Engine, SamplingParams, Sequence
from engine.model import CausalModel, ModelError
from engine.replay import Replay
from engine.tokenizer import ChatTokenizer
from learner.config import PPOConfig
from learner.round import Learner
from store.adapters import AdapterRegistry
from store.rounds import RoundFiles
from store.store import Store
from tests.test_engine import greedy, oracle, prompts, run
from tests.test_lora import made_by_peft, randomise, targets_of
from tests.test_replay import busy
from tests.test_round import QUICK, vote_on
from tests.tiny import tiny_model_dir

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
STARTER = Path(__file__).parents[1] / "learner" / "starter" / "assistant"
CUDA = torch.device("cuda")
Make = Callable[..., Engine]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gpt2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp(f"tiny-{request.param}"), request.param)


@pytest.fixture(params=["kernels", "no kernels"])
def make(request: pytest.FixtureRequest, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Engines on the GPU in float32, with the kernels and without, as where there is no Triton."""
    if request.param == "no kernels":
        monkeypatch.setattr(gpu, "kernels", lambda device: None)
    elif gpu.kernels(CUDA) is None:
        pytest.fail("the kernels could not be built here")

    def make_engine(adapters: int = 2, replayed: bool = True, most: int = 6, device: str = "cuda") -> Engine:
        model = CausalModel.load(directory, device=device)
        for i in range(adapters):
            model.lora.create(f"v{i + 1}", r=2 + i, targets=targets_of(model)[i:], seed=i, trainable=False)
            randomise(model, f"v{i + 1}", seed=i)
        engine = Engine(model, ChatTokenizer.load(directory), max_sequences=most)
        if not replayed:
            engine._replay = None
        return engine

    return make_engine


def assert_same(got: list[Sequence], want: list[Sequence]) -> None:
    """Tokens and reasons alike, log-probabilities to rounding."""
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


# --- the engine in float32; draws fall on another side of an edge by rounding in about 1 of 1e4 tokens' worth of chances a test


def test_greedy_tokens_equal_those_of_transformers(directory: Path, make: Make) -> None:
    engine, model = make(most=20), AutoModelForCausalLM.from_pretrained(directory).eval()
    many, lengths = prompts(5, 30, 12, 1, 77, 33, 8, 50), [10, 15, 40, 25, 30, 12, 40, 20]
    want = [oracle(model, p, n) for p, n in zip(many, lengths, strict=True)]
    assert [s.token_ids for s in engine.generate(many, [greedy(n) for n in lengths])] == want
    assert engine.generate(many[:1], [greedy(10)])[0].token_ids == want[0]


def test_greedy_tokens_with_an_adapter_made_by_peft_equal_those_of_transformers(directory: Path, make: Make, tmp_path: Path) -> None:
    engine, base = make(adapters=0), AutoModelForCausalLM.from_pretrained(directory).eval()
    theirs = made_by_peft(base, tmp_path, targets_of(engine.model), r=4, fan_in_fan_out=engine.model.lora.fan_in_fan_out)
    engine.load_version("v1", tmp_path)
    many = prompts(9, 40, 17, 3, 60)
    want = [oracle(theirs, p, 25) for p in many]
    assert [s.token_ids for s in engine.generate(many, [greedy(25)] * 5, "v1")] == want
    assert engine.generate(many[:1], [greedy(25)], "v1")[0].token_ids == want[0]


def test_replayed_steps_say_what_ordinary_ones_and_the_cpu_say(make: Make) -> None:
    got = busy(make())
    assert_same(got, busy(make(replayed=False)))
    assert_same(got, busy(make(device="cpu")))


def test_versions_and_seeds_side_by_side_equal_each_alone(make: Make) -> None:
    """Twenty rows, so that the batch shrinks past 16, 4 and 1."""
    engine, (prompt, *others) = make(most=20), prompts(31, 7, 50)
    versions = ["v1", "base", "v2", "v1"] * 3
    params = [SamplingParams(seed=i, max_tokens=4 + 2 * i, temperature=0.5 + 0.05 * i, top_p=1.0 if i % 3 else 0.8) for i in range(12)]
    ours = engine.add(prompt, params, versions)
    for p in others:
        engine.add(p, [SamplingParams(seed=90 + i, max_tokens=5 + i) for i in range(4)], ["v2", "base", "v1", "base"])
    run(engine)
    alone = make(most=20)
    assert_same(ours, [alone.generate([prompt], [p], v)[0] for p, v in zip(params, versions, strict=True)])


def test_versions_come_and_go_between_steps(make: Make, tmp_path: Path) -> None:
    engine, fresh, (prompt,) = make(), make(), prompts(12)
    engine.model.lora.save("v2", tmp_path)
    want = {v: fresh.generate([prompt], [greedy(20)], v)[0].token_ids for v in ("v1", "v2")}
    (s,) = engine.add(prompt, [greedy(20)], ["v1"])
    for _ in range(5):
        engine.step()
    engine.load_version("v3", tmp_path)
    (t,) = engine.add(prompt, [greedy(20)], ["v3"])
    for _ in range(3):
        engine.step()
    engine.unload_version("v2")
    run(engine)
    assert (s.token_ids, t.token_ids) == (want["v1"], want["v2"])
    engine.unload_version("v1")
    engine.unload_version("v3")
    engine.load_version("v1", tmp_path)  # an old name, another adapter
    assert engine.generate([prompt], [greedy(20)], "v1")[0].token_ids == want["v2"]


def test_an_adapter_trained_between_two_batches_is_used_as_it_is_now(make: Make) -> None:
    engine, (prompt,) = make(adapters=1), prompts(9)
    engine.model.lora.copy("v1", "policy", trainable=True)
    before = engine.generate([prompt], [greedy(12)], "policy")[0].token_ids
    with torch.no_grad():
        for p in engine.model.lora.parameters("policy").values():
            p.mul_(-2)
    after = engine.generate([prompt], [greedy(12)], "policy")[0].token_ids
    engine.model.lora.copy("policy", "fresh")
    assert after == engine.generate([prompt], [greedy(12)], "fresh")[0].token_ids != before


def test_a_version_whose_numbers_break_down_ends_its_own_replies_only(make: Make) -> None:
    engine, (prompt,) = make(adapters=1), prompts(12)
    want = engine.generate([prompt], [greedy(12)])[0].token_ids
    with torch.no_grad():
        next(iter(engine.model.lora.parameters("v1").values())).fill_(3e38)
    broken, sound = engine.add(prompt, [greedy(12)] * 2, ["v1", "base"])
    run(engine)
    assert broken.finish_reason == "cancelled" and sound.token_ids == want
    assert [s.token_ids for s in engine.generate([prompt] * 3, [greedy(12)] * 3)] == [want] * 3


# --- the kernels, one by one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 4])
@torch.no_grad()
def test_a_product_of_ours_is_torchs(rows: int, dtype: torch.dtype) -> None:
    """All that it takes along, with sizes that fill no tile; the wanted numbers are computed in float64."""
    torch.manual_seed(rows)
    k, n, r = 2500, 301, 24

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=CUDA).to(dtype)

    x, w, bias, add, norm = draw(rows, 1, k), draw(2 * n, k), draw(2 * n), draw(rows, 1, n), draw(k)
    owner, choice = torch.arange(3, device=CUDA).repeat_interleave(8).int(), torch.tensor([-1, 0, 2, 1], device=CUDA)[:rows].int()
    low = gpu.Low(draw(r, k), draw(r, 2 * n), owner, choice)
    eps = 1e-6
    got = gpu.linear(x, w, bias, norm=norm, eps=eps, gated=True, add=add, low=low)
    x64 = F.rms_norm(x.double(), (k,), norm.double(), eps)
    h = torch.where((choice[:, None] == owner)[:, None], x64 @ low.a.double().T, 0.0)
    gate, up = (F.linear(x64, w.double(), bias.double()) + h @ low.b.double()).chunk(2, -1)
    want = F.silu(gate) * up + add.double()
    assert got.dtype == dtype and float((got - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 5e-3)
    plain, want = gpu.linear(x, w), x.double() @ w.double().T
    assert float((plain - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "d", "normed"), [(14, 2, 64, False), (4, 2, 16, True), (6, 1, 24, False), (8, 8, 128, True)])
@torch.no_grad()
def test_attention_of_one_token_is_torchs(heads: int, kv_heads: int, d: int, normed: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(d)
    n, room, eps = 3, 300, 1e-6
    keys, values = (torch.randn(n, kv_heads, room, d, device=CUDA).to(dtype) for _ in range(2))
    keys[0, :, 1:], values[0, :, 1:] = math.nan, math.nan  # what is not cached is not looked at
    qkv, lengths = torch.randn(n, 1, (heads + 2 * kv_heads) * d, device=CUDA).to(dtype), torch.tensor([0, room - 1, 17], device=CUDA)
    angles = torch.randn(n, 1, 1, d // 2, device=CUDA) * 5
    cos, sin = (f(torch.cat([-angles, angles], -1)).to(dtype) for f in (torch.cos, torch.sin))
    norms = tuple(torch.rand(d, device=CUDA).to(dtype) + 0.5 for _ in range(2)) if normed else None
    q, k, v = qkv.double().view(n, -1, 1, d).split([heads, kv_heads, kv_heads], 1)
    if norms:
        q, k = (F.rms_norm(t, (d,), w.double(), eps) for t, w in zip((q, k), norms, strict=True))
    q, k = (decoder.rotate(t, (cos.double(), sin.double())) for t in (q, k))
    want = torch.empty(n, 1, heads * d, device=CUDA, dtype=torch.float64)
    for i, length in enumerate(lengths.tolist()):
        ks, vs = (torch.cat([old[i, :, :length].double(), new[i]], 1).repeat_interleave(heads // kv_heads, 0) for old, new in ((keys, k), (values, v)))
        want[i] = F.scaled_dot_product_attention(q[i], ks, vs).transpose(0, 1).reshape(1, -1)
    got = gpu.attend(qkv, (cos, sin), keys, values, lengths, heads, norms, eps)
    assert float((got - want).norm() / want.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)
    at = torch.arange(n, device=CUDA)
    for cache, new in ((keys, k), (values, v)):
        torch.testing.assert_close(cache[at, :, lengths].double(), new[:, :, 0], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


# --- as served and as trained: the starter in bfloat16


@pytest.fixture
def starter() -> tuple[CausalModel, ChatTokenizer]:
    return CausalModel.load(STARTER, dtype=torch.bfloat16, device="cuda"), ChatTokenizer.load(STARTER)


def test_bfloat16_logprobs_of_replayed_steps_are_those_of_the_training_pass(starter: tuple[CausalModel, ChatTokenizer]) -> None:
    model, tokenizer = starter
    model.lora.create("v1", r=4, trainable=False)
    randomise(model, "v1")
    with torch.no_grad():
        for p in model.lora.parameters("v1").values():
            p.mul_(0.2)
    engine = Engine(model, tokenizer, max_sequences=16)
    assert engine._replay is not None
    prompt = tokenizer.render([{"role": "user", "content": "Tell me about the moon."}])
    replies = engine.add(prompt, [SamplingParams(seed=i, max_tokens=60) for i in range(8)], ["base", "v1"] * 4)
    run(engine)
    for s in replies:
        ids = torch.tensor([prompt + s.token_ids], device=CUDA)
        with torch.no_grad():
            want = model.logprobs(ids, adapter=None if s.version == "base" else "v1")[0, len(prompt) - 1 :]
        assert float((torch.tensor(s.logprobs) - want.cpu()).abs().mean()) < 0.03, "bfloat16 has three digits"


def test_a_round_runs_on_the_gpu_with_finite_numbers(starter: tuple[CausalModel, ChatTokenizer], tmp_path: Path) -> None:
    """A reward model, two PPO updates and the gate."""
    model, tokenizer = starter
    config = replace(QUICK, ppo=replace(QUICK.ppo, updates=2))
    learner = Learner(model, tokenizer, config, RoundFiles(tmp_path / "rounds"), AdapterRegistry(tmp_path / "adapters"))
    with Store.open(tmp_path) as store:
        vote_on(store, tokenizer, 24)
        record = learner.run_round(learner.files.begin(), store.voted_comparisons(), "base", run_requested=0, report=lambda *_: None)
    assert record["state"] == "published", record["reason"]
    history = record["ppo"]["history"]
    assert len(history) == 3 and all(math.isfinite(x) for row in history for x in row.values() if isinstance(x, float))
    assert record["gate"]["checks"] and all(check["value"] is not None for check in record["gate"]["checks"])
    assert PPOConfig().estimator == config.ppo.estimator


@pytest.fixture
def little_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_model_that_does_not_fit_is_refused_in_one_line(little_memory: None) -> None:
    with pytest.raises(ModelError, match=r"does not fit into the memory of .* GB .* are free: .* use device cpu"):
        CausalModel.load(STARTER, device="cuda")


def test_only_models_whose_steps_hang_on_tensors_alone_are_replayed(directory: Path, make: Make) -> None:
    engine = make()
    assert isinstance(engine._replay, Replay) == engine.model.net.replayable == (directory.name.startswith("tiny-gpt2") is False)
