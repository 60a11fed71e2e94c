"""engine/native.py and decode.c against torch's operations on the same numbers, and a row against itself in other company."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.llama import quality
from engine import native
from engine.cache import KVCache, Pack, Prompt, Rows
from engine.decoder import Decoder
from engine.mixture import Mixture
from engine.model import CausalModel, ModelError
from tests.tiny import tiny_model_dir

LENGTHS, IDS = [3, 17, 17, 30, 0, 8, 31], [5, 6, 7, 300, 5, 9, 11]
CHOICES = [0, -1, 1, 0, 1, 2, -1]  # of three adapters, and the base
pytestmark = pytest.mark.skipif(native.library() is None, reason="decode.c was not built here: no C compiler")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["llama", "qwen2", "qwen3", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> CausalModel:
    made = CausalModel.load(tiny_model_dir(tmp_path / "model", request.param))
    made.pack()
    for at, (name, rank, targets) in enumerate([("a", 6, None), ("b", 16, None), ("c", 3, ["q_proj", "up_proj"])]):
        made.lora.create(name, r=rank, targets=targets, seed=at, trainable=False)
        for p in made.lora.parameters(name).values():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(at)) * 0.2)
    return made


@torch.inference_mode()
def step(model: CausalModel, rows: range, mixture: Mixture | None, *, by_torch: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """One token in some rows of a cache that is full of noise: hidden states, and all keys and values afterwards."""
    torch.manual_seed(0)
    cache = model.new_cache(len(IDS) + 1, 64)
    cache.reserve(len(IDS) + 1, 40)
    cache.keys.normal_()
    cache.values.normal_()
    if mixture is not None:
        mixture.choose([CHOICES[i] for i in rows] if mixture.count > 1 else [0] * len(rows))
    decode, model.decode = model.decode, None if by_torch else model.decode
    model.lora.native = model.decode is not None
    try:
        ids = torch.tensor([[IDS[i]] for i in rows])
        hidden = model(ids, adapter=mixture, cache=Rows(cache, [LENGTHS[i] for i in rows], first=1 + rows[0]))
        return hidden, cache.keys, cache.values
    finally:
        model.decode, model.lora.native = decode, decode is not None


@pytest.mark.parametrize("names", [(), ("b",), ("a", "b", "c")])
def test_a_step_is_what_torch_computes(model: CausalModel, names: tuple[str, ...], threads: None) -> None:
    mixtures = [model.lora.mixture(names) if names else None for _ in range(2)]
    ours = step(model, range(len(IDS)), mixtures[0])
    theirs = step(model, range(len(IDS)), mixtures[1], by_torch=True)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=5e-5)


def test_a_row_does_not_depend_on_the_others_or_on_threads(model: CausalModel) -> None:
    """Bit for bit: the same seed gives the same tokens whoever else is writing."""
    mixture, before = model.lora.mixture(("a", "b", "c")), torch.get_num_threads()
    together, keys, values = step(model, range(len(IDS)), mixture)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for rows in (range(len(IDS)), range(2), range(1, 4), range(3, 7), range(5, 6)):
                alone, own_keys, own_values = step(model, rows, mixture)
                assert torch.equal(alone, together[list(rows)])
                for i in rows:
                    assert torch.equal(own_keys[:, i + 1], keys[:, i + 1])
                    assert torch.equal(own_values[:, i + 1], values[:, i + 1])
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def read(model: CausalModel, stretches: list[tuple[list[int], Callable[[KVCache], Prompt | Rows | Pack]]], mixture: Mixture | None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of all tokens (T, D), and keys and values of rows 1 and 2 afterwards."""
    cache = model.new_cache(4, 64)
    hidden = [model(torch.tensor(ids if isinstance(ids[0], list) else [ids]), adapter=mixture, cache=made(cache)) for ids, made in stretches]
    return torch.cat([h.flatten(0, 1) for h in hidden]), cache.keys[:, 1:3, :, :40], cache.values[:, 1:3, :, :40]


@pytest.mark.parametrize("names", [(), ("a",)])
def test_a_prompt_is_read_as_torch_reads_it_however_it_is_cut(model: CausalModel, names: tuple[str, ...], threads: None) -> None:
    """At once, in parts, side by side with another, or a token at a time: the same bits."""
    mixture = model.lora.mixture(names) if names else None
    if mixture is not None:
        mixture.choose([0])
    ids = torch.randint(5, 400, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = read(model, [(ids, lambda c: Prompt(c, 1, 0, 40))], mixture)
    meant = model(torch.tensor([ids]), adapter=names[0] if names else None)[0]
    torch.testing.assert_close(whole[0], meant, rtol=1e-4, atol=5e-5)
    parts = read(model, [(ids[:23], lambda c: Prompt(c, 1, 0, 23)), (ids[23:], lambda c: Prompt(c, 1, 23, 17))], mixture)
    tokens = read(model, [([t], lambda c, i=i: Rows(c, [i], first=1)) for i, t in enumerate(ids)], mixture)
    for other in (parts, tokens):
        assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    packed = read(model, [(ids + ids[:7], lambda c: Pack(c, [1, 2], [40, 7]))], mixture)
    assert torch.equal(packed[0], torch.cat((whole[0], whole[0][:7])))
    assert torch.equal(packed[1][:, 0], whole[1][:, 0]) and torch.equal(packed[2][:, 1, :, :7], whole[2][:, 0, :, :7])


def test_an_adapter_alone_is_added_into_the_weights(model: CausalModel) -> None:
    """A layer a step, after a while; the numbers stay the same to rounding."""
    mixture = model.lora.mixture(("b",))
    first = step(model, range(len(IDS)), mixture)[0]
    for _ in range(60):
        later = step(model, range(len(IDS)), mixture)[0]
    assert len(mixture.whole) == len(model.lora.linears)
    torch.testing.assert_close(later, first, rtol=1e-4, atol=5e-5)
    assert not torch.equal(later, first)


def test_a_row_that_broke_down_breaks_no_other(model: CausalModel) -> None:
    mixture = model.lora.mixture(("a", "b", "c"))
    whole = step(model, range(len(IDS)), mixture)[0]
    mixture = model.lora.mixture(("a", "b", "c"))
    for linear, (a, b, ranks) in mixture.stacks.items():
        mixture.stacks[linear] = (a, torch.where(torch.arange(len(b))[:, None] < ranks[0], float("nan"), b), ranks)
    broken = step(model, range(len(IDS)), mixture)[0]
    for i, choice in enumerate(CHOICES):
        assert bool(broken[i].isnan().all()) if choice == 0 else torch.equal(broken[i], whole[i])


@pytest.mark.parametrize("rows, inputs, outputs", [(1, 8, 1), (2, 64, 63), (3, 24, 65), (4, 128, 257), (9, 40, 8)])
def test_logits_are_the_product(rows: int, inputs: int, outputs: int, threads: None) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    built = native.library()
    assert built is not None
    torch.testing.assert_close(native.product(built, x, w), x @ w.T, rtol=1e-4, atol=1e-4)


def test_scores_far_apart_and_far_from_nought(model: CausalModel) -> None:
    """Softmax where e^x would overflow or be nothing: one key is liked beyond all others, and no number is lost."""
    with torch.no_grad():
        for block in model.net.blocks:
            block.qkv.weight.mul_(30)
    ours, theirs = (step(model, range(len(IDS)), None, by_torch=by_torch)[0] for by_torch in (False, True))
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_a_product_with_8_bits_is_that_of_what_they_stand_for(rows: int, threads: None) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(rows, 96), torch.randn(67, 96) * torch.logspace(-3, 1, 67)[:, None]
    x[0] *= 1e4  # its scale is its own: no other row loses by it
    x[:, 5] *= 30
    w[3, :32] = 0
    small, built = native.Int8(w), native.library()
    assert built is not None
    assert (small.meant() - w).abs().max() <= w.abs().max() / 254 * 1.001
    got, meant = native.product(built, x, small), x @ small.meant().T
    for i in range(rows):
        torch.testing.assert_close(got[i], meant[i], rtol=1e-3, atol=float(5e-3 * meant[i].abs().mean()))
        assert torch.equal(got[i : i + 1], native.product(built, x[i : i + 1], small))


def test_what_is_not_a_number_stays_in_its_row_with_8_bits() -> None:
    small, built = native.Int8(torch.randn(64, 32)), native.library()
    assert built is not None
    x = torch.randn(5, 32)
    whole = native.product(built, x, small)
    x[1, 7], x[3, 0], x[4] = float("nan"), float("inf"), 0
    got = native.product(built, x, small)
    assert got[[1, 3]].isnan().all() and torch.equal(got[[0, 2]], whole[[0, 2]]) and not got[4].any()


def test_a_model_in_8_bits_decodes_as_one_with_those_weights(tmp_path: Path) -> None:
    """Against torch on the weights that the 8 bits stand for; adapters stay as they are, also alone and for long."""
    directory = tmp_path / "model"
    tiny_model_dir(directory, hidden=128)
    models = [CausalModel.load(directory) for _ in range(2)]
    for model in models:
        for name in ("a", "b", "c"):
            model.lora.create(name, seed=ord(name), trainable=False)
            for p in model.lora.parameters(name).values():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(ord(name))) * 0.2)
    models[0].pack(int8=True)
    assert models[0].decode is not None
    for linear in models[1].lora.linears:
        linear.weight.data = native.Int8(linear.weight).meant()
    models[1].pack()
    for names in ((), ("b",), ("a", "b", "c")):
        ours, theirs = (m.lora.mixture(names) if names else None for m in models)
        meant = step(models[1], range(len(IDS)), theirs, by_torch=True)[0]
        for _ in range(60 if len(names) == 1 else 1):
            got = step(models[0], range(len(IDS)), ours)[0]
        torch.testing.assert_close(got, meant, rtol=1e-2, atol=2e-3)
        assert ours is None or not ours.whole
    ids = torch.randint(5, 400, (1, 30))
    with torch.no_grad():
        torch.testing.assert_close(models[0](ids, cache=Prompt(models[0].new_cache(1, 30), 0, 0, 30)), models[1](ids), rtol=1e-2, atol=2e-3)
    hidden = torch.randn(4, 128)
    torch.testing.assert_close(models[0].next_logits(hidden), hidden @ native.Int8(models[0].net.head).meant().T, rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match="serve without int8"):
        CausalModel.load(tiny_model_dir(tmp_path / "odd", hidden=64)).pack(int8=True)  # heads of 16


def test_what_the_benchmark_says_of_8_bits() -> None:
    cost = quality(2)
    assert cost["tokens"] > 20 and 0 < cost["kl_mean"] < 1e-3 and cost["kl_max"] < 0.05 and cost["same_likeliest"] > 0.95 and abs(cost["nll_rise"]) < 0.01


def test_where_it_cannot_be_used(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other precisions, sizes that are no whole vectors, other architectures, or nothing built: torch's operations, and the same replies."""
    half = CausalModel.load(tiny_llama, dtype=torch.bfloat16)
    odd = CausalModel.load(tiny_model_dir(tmp_path / "odd", hidden=48))  # heads of 12
    other = CausalModel.load(tiny_model_dir(tmp_path / "gpt2", "gpt2"))
    for model in (half, odd, other):
        model.pack()
        assert model.decode is None and not model.lora.native
    monkeypatch.setattr(native, "library", lambda: None)
    plain = CausalModel.load(tiny_llama)
    plain.pack()
    assert isinstance(plain.net, Decoder) and plain.decode is None


def test_looking_for_it_leaves_the_draws_of_a_round_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert native.library.__wrapped__() is not None
    assert torch.equal(torch.rand(4), expected)


def test_an_idle_mixture_keeps_no_copy_of_the_weights(model: CausalModel) -> None:
    mixture = model.lora.mixture(("b",))
    for p in model.lora.parameters("b").values():
        p.requires_grad_(True)  # in training: added up at once, and given up when nothing runs
    step(model, range(2), mixture)
    kept = weakref.ref(next(iter(mixture.whole.values())))
    mixture.rest()
    gc.collect()
    assert kept() is None


def test_no_library_is_said_once_and_why(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fresh: Callable[[], object] = native.library.__wrapped__
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    with caplog.at_level("WARNING", logger="plaudit.engine"):
        assert fresh() is None
    assert "C compiler" in caplog.text
    caplog.clear()
    monkeypatch.undo()
    with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="plaudit.engine"):
        patch.setattr(native.hashlib, "sha256", lambda data: hashlib.sha512(data))
        assert fresh() is None
    assert "another decode.c" in caplog.text
    caplog.clear()
    monkeypatch.setattr(native, "product", lambda built, x, w: x @ w.T + 1)
    with caplog.at_level("WARNING", logger="plaudit.engine"):
        assert fresh() is None
    assert "wrong numbers" in caplog.text
