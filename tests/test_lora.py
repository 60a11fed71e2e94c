"""engine/lora.py against PEFT: what PEFT makes we read, what we write PEFT reads, and the numbers are the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.lora import AdapterError
from engine.mixture import PATIENCE
from engine.model import CausalModel

# PEFT 0.21 reads a property that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
IDS = torch.tensor([[17, 203, 44, 91, 300, 8, 77, 150], [99, 12, 340, 7, 222, 45, 18, 31]])
CLOSE = {"rtol": 0, "atol": 5e-5}
Family = tuple[CausalModel, Callable[[], torch.nn.Module]]


@pytest.fixture
def family(tiny_any: Path) -> Family:
    return CausalModel.load(tiny_any), lambda: AutoModelForCausalLM.from_pretrained(tiny_any).eval()


def targets_of(model: CausalModel) -> list[str]:
    return ["c_attn", "c_proj", "c_fc"] if model.lora.fan_in_fan_out else ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def made_by_peft(base: torch.nn.Module, path: Path, targets: list[str], seed: int = 0, **kwargs: object) -> torch.nn.Module:
    """PEFT's own adapter with random A and B, saved to `path`."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **kwargs)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(path)
    return model


def randomise(model: CausalModel, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.lora.parameters(name).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_made_by_peft_gives_the_same_logits_here(family: Family, tmp_path: Path, rslora: bool) -> None:
    ours, base = family
    fan = ours.lora.fan_in_fan_out
    theirs = made_by_peft(base(), tmp_path, targets_of(ours), r=4, lora_alpha=6, use_rslora=rslora, fan_in_fan_out=fan)
    ours.lora.load("v1", tmp_path)
    want = theirs(IDS).logits
    torch.testing.assert_close(ours.logits(ours(IDS, adapter="v1")), want, **CLOSE)
    assert (ours.logits(ours(IDS)) - want).abs().max() > 0.1
    with theirs.disable_adapter():  # the reference policy: the base, untouched by what is loaded
        torch.testing.assert_close(ours.logits(ours(IDS)), theirs(IDS).logits, **CLOSE)


@torch.no_grad()
def test_what_is_saved_here_loads_in_peft_with_the_same_logits(family: Family, tmp_path: Path) -> None:
    ours, base = family
    ours.lora.create("new", r=8, alpha=20, targets=targets_of(ours)[:3])
    randomise(ours, "new")
    ours.lora.save("new", tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(ours.logits(ours(IDS, adapter="new")), theirs(IDS).logits, **CLOSE)


def test_saving_what_was_loaded_changes_no_number(family: Family, tmp_path: Path) -> None:
    ours, base = family
    made_by_peft(base(), tmp_path / "a", targets_of(ours), r=4, use_rslora=True, fan_in_fan_out=ours.lora.fan_in_fan_out)
    ours.lora.load("v1", tmp_path / "a")
    ours.lora.save("v1", tmp_path / "b")
    ours.lora.load("v2", tmp_path / "b")
    first, second = load_file(tmp_path / "a" / "adapter_model.safetensors"), load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(ours(IDS, adapter="v1"), ours(IDS, adapter="v2"))


def test_gradients_equal_those_of_peft(family: Family, tmp_path: Path) -> None:
    ours, base = family
    theirs = made_by_peft(base(), tmp_path, targets_of(ours), r=4, fan_in_fan_out=ours.lora.fan_in_fan_out)
    ours.lora.load("v1", tmp_path, trainable=True)
    ours.logprobs(IDS, adapter="v1").mean().backward()
    theirs(IDS).logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).mean().backward()
    want = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    mine = {name: p.grad for name, p in ours.lora.parameters("v1").items()}
    assert mine.keys() == want.keys()
    for name, grad in mine.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-3, atol=1e-5)  # float32 rounding


@torch.no_grad()
def test_rows_of_several_versions_in_one_batch_equal_each_version_alone(family: Family) -> None:
    ours, _ = family
    for i, (name, targets) in enumerate([("a", targets_of(ours)), ("b", targets_of(ours)[:1]), ("c", targets_of(ours)[1:])]):
        ours.lora.create(name, r=2 + 3 * i, targets=targets, seed=i)
        randomise(ours, name, seed=i)
    mixture = ours.lora.mixture(["a", "b", "c"])
    ids = IDS[:1].expand(6, -1)
    for rows in ([0, 1, 2, -1, 0, 2], [-1] * 6, [1] * 6):
        mixture.choose(rows)
        mixed = ours.logits(ours(ids, adapter=mixture))
        for i, row in enumerate(rows):
            alone = ours.logits(ours(ids[:1], adapter=None if row < 0 else "abc"[row]))
            torch.testing.assert_close(mixed[i : i + 1], alone, **CLOSE)


def test_a_mixture_of_one_for_all_needs_no_mask(tiny_llama: Path) -> None:
    ours = CausalModel.load(tiny_llama)
    ours.lora.create("a")
    ours.lora.create("idle")
    mixture = ours.lora.mixture(["a"])
    mixture.choose([0, 0])
    assert set(mixture.masks.values()) == {None}
    assert all(a.shape[0] <= 3 * 16 for a, _, _ in mixture.stacks.values())  # the idle adapter has no columns here


@torch.no_grad()
def test_a_version_alone_is_added_into_the_weights_a_layer_a_step_and_says_the_same(tiny_llama: Path, either_way: None) -> None:
    ours = CausalModel.load(tiny_llama)
    for i, name in enumerate("ab"):
        ours.lora.create(name, seed=i, trainable=False)
        randomise(ours, name, seed=i)
    ours.pack()
    ids, layers = IDS[:, :6], len(ours.lora.linears)
    mixture = ours.lora.mixture(["a", "b"])
    want = {}
    for row in (0, 1):
        mixture.choose([row, row])
        want[row] = ours.logits(ours(ids, adapter=mixture))
        assert not mixture.whole
    for step in range(PATIENCE + layers):
        mixture.choose([0, 0])
        assert len(mixture.whole) <= max(0, step + 3 - PATIENCE), "no more than a layer a step"
        if step % 7 == 0:
            torch.testing.assert_close(ours.logits(ours(ids, adapter=mixture)), want[0], **CLOSE)
    assert len(mixture.whole) == layers
    torch.testing.assert_close(ours.logits(ours(ids, adapter=mixture)), want[0], **CLOSE)
    mixture.choose([0, 1])  # together they are stacked again
    mixed = ours.logits(ours(ids, adapter=mixture))
    torch.testing.assert_close(mixed[0], want[0][0], **CLOSE)
    torch.testing.assert_close(mixed[1], want[1][1], **CLOSE)
    mixture.choose([1, 1])  # another version alone: the copy is given up
    assert not mixture.whole and ours.lora.whole is not None and ours.lora.whole.adapter is ours.lora.adapters["b"]
    ours.lora.delete("b")
    assert ours.lora.whole is None


@torch.no_grad()
def test_an_adapter_in_training_is_added_anew_for_every_mixture(tiny_llama: Path, either_way: None) -> None:
    ours = CausalModel.load(tiny_llama)
    ours.lora.create("a")
    ours.pack()
    for seed in (1, 2):
        randomise(ours, "a", seed=seed)
        mixture = ours.lora.mixture(["a"])
        mixture.choose([0, 0])
        assert len(mixture.whole) == len(ours.lora.linears) and ours.lora.whole is None
        torch.testing.assert_close(ours(IDS, adapter=mixture), ours(IDS, adapter="a"), **CLOSE)


def test_a_new_adapter_changes_nothing_and_depends_on_its_seed_alone(family: Family) -> None:
    ours, _ = family
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        ours.lora.create(name, r=4, seed=seed)
    assert torch.equal(ours(IDS, adapter="a"), ours(IDS))
    a, b, c = (ours.lora.parameters(name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a if "lora_A" in key)


def test_a_new_adapter_is_spread_as_peft_spreads_it(tiny_llama: Path) -> None:
    """Kaiming uniform with a = sqrt 5 is uniform within 1 / sqrt(inputs): standard deviation 1 / sqrt(3 inputs)."""
    ours = CausalModel.load(tiny_llama)
    ours.lora.create("a", r=64)
    for key, p in ours.lora.parameters("a").items():
        if "lora_A" in key:
            bound = 1 / math.sqrt(p.shape[1])
            assert p.abs().max() <= bound
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        else:
            assert not p.any()


def test_by_default_every_linear_layer_of_the_blocks_is_adapted(tiny_llama: Path) -> None:
    ours = CausalModel.load(tiny_llama)
    ours.lora.create("a")
    names = {key.split(".")[-3] for key in ours.lora.parameters("a")}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(ours.lora.parameters("a")) == 2 * 2 * 7


def test_training_one_adapter_moves_no_other(tiny_llama: Path) -> None:
    ours = CausalModel.load(tiny_llama)
    ours.lora.create("policy", seed=1)
    randomise(ours, "policy")
    ours.lora.copy("policy", "old", trainable=False)
    before = ours(IDS, adapter="old").detach()
    optimizer = torch.optim.SGD(ours.lora.parameters("policy").values(), lr=0.1)
    ours.logprobs(IDS, adapter="policy").mean().backward()
    optimizer.step()
    assert torch.equal(ours(IDS, adapter="old"), before)
    assert not torch.equal(ours(IDS, adapter="policy"), before)
    assert not any(p.requires_grad for p in ours.lora.parameters("old").values())


def test_what_was_read_changes_nothing_until_it_is_put_and_is_then_stacked_without_a_copy(saved: tuple[CausalModel, Path]) -> None:
    model, path = saved
    bank = model.lora
    before, revision = bank.names(), bank.revision
    read = bank.read(path)
    assert bank.names() == before and bank.revision == revision  # another thread may decode meanwhile
    bank.put("b", read)
    alone, both = bank.mixture(["b"]), bank.mixture(["a", "b"])
    assert read.stacked and all(alone.stacks[linear][:2] == kept for linear, kept in read.stacked.items())
    meant = model.logits(model(IDS[:1], adapter="a"))
    for mixture, row in ((alone, 0), (both, 1)):
        mixture.choose([row])
        torch.testing.assert_close(model.logits(model(IDS[:1], adapter=mixture)), meant, **CLOSE)


def test_names_come_and_go(tiny_llama: Path) -> None:
    bank = CausalModel.load(tiny_llama).lora
    bank.create("a")
    bank.copy("a", "b")
    assert bank.names() == ["a", "b"]
    bank.delete("a")
    assert bank.names() == ["b"]
    with pytest.raises(AdapterError, match="no adapter named 'a': loaded are b"):
        bank.parameters("a")
    with pytest.raises(AdapterError, match="no layer of the model is named nonsense: choose among down_proj"):
        bank.create("c", targets=["nonsense"])


@pytest.fixture
def saved(tiny_llama: Path, tmp_path: Path) -> tuple[CausalModel, Path]:
    model = CausalModel.load(tiny_llama)
    model.lora.create("a", r=4)
    randomise(model, "a")
    model.lora.save("a", tmp_path)
    return model, tmp_path


def edit_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | fields))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_loaded(saved: tuple[CausalModel, Path], value: float) -> None:
    model, path = saved
    edit_weights(path, lambda tensors: tensors[Q_A].view(-1)[5:6].fill_(value))
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj\.lora_A\.weight has NaN or infinite"):
        model.lora.load("v1", path)
    assert model.lora.names() == ["a"]


def test_an_adapter_that_broke_in_training_is_not_saved(saved: tuple[CausalModel, Path]) -> None:
    model, path = saved
    next(iter(model.lora.parameters("a").values())).data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"NaN or infinite numbers in .*: it is not saved"):
        model.lora.save("a", path / "out")
    assert not (path / "out").exists()


def test_an_adapter_of_another_model_is_refused(saved: tuple[CausalModel, Path]) -> None:
    model, path = saved
    edit_weights(path, lambda tensors: tensors.update({Q_A: torch.zeros(4, 99)}))
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight has shape \(4, 99\), this model needs \(4, 64\)"):
        model.lora.load("v1", path)
    edit_weights(path, lambda tensors: tensors.update({Q_A: torch.zeros(4, 64), Q_A.replace("s.0", "s.7"): torch.zeros(4, 64)}))
    with pytest.raises(AdapterError, match=r"1 tensors that fit no layer of this model, the first is .*layers\.7"):
        model.lora.load("v1", path)


def test_half_a_pair_is_refused(saved: tuple[CausalModel, Path]) -> None:
    model, path = saved
    edit_weights(path, lambda tensors: tensors.pop(Q_A))
    with pytest.raises(AdapterError, match=r"lacks .*q_proj\.lora_A\.weight"):
        model.lora.load("v1", path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "not a LoRA config"),
        ({"use_dora": True}, "sets use_dora"),
        ({"bias": "all"}, "sets bias"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "sets rank_pattern"),
        ({"r": 0}, "lacks a usable r"),
        ({"r": math.inf}, "lacks a usable r"),
        ({"r": 10**400}, "lacks a usable r"),
        ({"target_modules": None}, "lacks a usable r, lora_alpha or target_modules"),
        ({"lora_alpha": "much"}, "lacks a usable r"),
        ({"lora_alpha": math.nan}, "lacks a usable r"),
        ({"lora_alpha": math.inf}, "lacks a usable r"),
        ({"init_lora_weights": "pissa"}, "changes the base model's own weights"),
        ({"init_lora_weights": "olora"}, "convert it to plain LoRA"),
        ({"r": 8}, r"has shape \(4, 64\), this model needs \(8, 64\)"),
    ],
)
def test_configs_that_mean_something_else_are_refused(saved: tuple[CausalModel, Path], fields: dict, message: str) -> None:
    model, path = saved
    edit_config(path, **fields)
    with pytest.raises(AdapterError, match=message):
        model.lora.load("v1", path)


def test_broken_or_missing_files_are_named(saved: tuple[CausalModel, Path], tmp_path: Path) -> None:
    model, path = saved
    with pytest.raises(AdapterError, match="is not an adapter directory"):
        model.lora.load("v1", tmp_path / "nowhere")
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is damaged"):
        model.lora.load("v1", path)
    weights.unlink()
    (path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match="save the adapter as safetensors"):
        model.lora.load("v1", path)
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="not a LoRA config"):
        model.lora.load("v1", path)
    (path / "adapter_config.json").write_text("{nope")
    with pytest.raises(AdapterError, match="cannot be read as JSON"):
        model.lora.load("v1", path)
