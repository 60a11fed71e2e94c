"""engine/model.py and what is behind it, against transformers on the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine import packed
from engine.cache import Prompt, Rows
from engine.model import CausalModel, ModelError, context_limit
from engine.source import WrittenConfig, read_config
from tests.tiny import tiny_config, tiny_model_dir

IDS = torch.tensor([[17, 203, 44, 91, 300, 8, 77, 150, 29, 411, 63, 5], [99, 12, 340, 7, 222, 45, 18, 31, 260, 84, 11, 400]])
CLOSE = {"rtol": 0, "atol": 3e-5}  # logits are of order 10


def reference(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def save_random(path: Path, config: Any, **kwargs: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path, **kwargs)
    return path


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CausalModel, torch.nn.Module]:
    path = tiny_model_dir(tmp_path_factory.mktemp(request.param), request.param)
    return CausalModel.load(path), reference(path)


@torch.no_grad()
def test_logits_equal_those_of_transformers(pair: tuple[CausalModel, torch.nn.Module]) -> None:
    ours, theirs = pair
    torch.testing.assert_close(ours.logits(ours(IDS)), theirs(IDS).logits, **CLOSE)


def test_the_common_families_run_in_our_own_decoder_and_others_in_transformers(pair: tuple[CausalModel, torch.nn.Module]) -> None:
    ours, theirs = pair
    assert type(ours.net).__name__ == ("General" if theirs.config.model_type == "gpt2" else "Decoder")


@torch.no_grad()
def test_padding_left_right_or_not_at_all_is_the_same(pair: tuple[CausalModel, torch.nn.Module]) -> None:
    ours, theirs = pair
    short = IDS[0, :8]
    alone = theirs(short[None]).logits[0]
    pad = torch.zeros(4, dtype=torch.long)
    left, right = torch.stack([torch.cat([pad, short]), IDS[1]]), torch.stack([torch.cat([short, pad]), IDS[1]])
    left_valid, right_valid = torch.ones(2, 12, dtype=torch.bool), torch.ones(2, 12, dtype=torch.bool)
    left_valid[0, :4] = right_valid[0, 8:] = False
    got_left, got_right = ours.logits(ours(left, valid=left_valid)), ours.logits(ours(right, valid=right_valid))
    torch.testing.assert_close(got_left[0, 4:], alone, **CLOSE)
    torch.testing.assert_close(got_right[0, :8], alone, **CLOSE)
    torch.testing.assert_close(got_left[1], got_right[1], **CLOSE)
    assert got_left.isfinite().all() and got_right.isfinite().all()


@torch.no_grad()
def test_candidates_packed_behind_one_prompt_equal_separate_forwards(pair: tuple[CausalModel, torch.nn.Module]) -> None:
    ours, theirs = pair
    prompt, one, two = IDS[0, :6], IDS[0, 6:10], IDS[1, :5]
    ids = torch.cat([prompt, one, two])[None]
    owner = torch.tensor([0] * 6 + [1] * 4 + [2] * 5)
    sees = (owner[None] == owner[:, None]) | (owner[None] == 0)
    attend = sees & torch.ones(15, 15, dtype=torch.bool).tril()
    positions = torch.tensor([[*range(6), *range(6, 10), *range(6, 11)]])
    got = ours.logits(ours(ids, positions=positions, attend=attend[None]))[0]
    torch.testing.assert_close(got[:10], theirs(ids[:, :10]).logits[0], **CLOSE)
    torch.testing.assert_close(got[10:], theirs(torch.cat([prompt, two])[None]).logits[0, 6:], **CLOSE)


@torch.no_grad()
def test_logprobs_equal_a_plain_forward_of_transformers(pair: tuple[CausalModel, torch.nn.Module]) -> None:
    ours, theirs = pair
    for temperature in (1.0, 0.6):
        oracle = (theirs(IDS).logits[:, :-1].double() / temperature).log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
        torch.testing.assert_close(ours.logprobs(IDS, temperature=temperature).double(), oracle, rtol=0, atol=5e-5)


@torch.no_grad()
def test_logprobs_of_padding_are_zero_and_those_of_tokens_unmoved(pair: tuple[CausalModel, torch.nn.Module]) -> None:
    ours, _ = pair
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, :3] = False
    got = ours.logprobs(IDS, valid=valid)
    assert (got[0, :3] == 0).all()  # the third predicts a token from padding
    torch.testing.assert_close(got[0, 3:], ours.logprobs(IDS[:1, 3:])[0], **CLOSE)


@torch.no_grad()
def test_reading_in_pieces_and_then_token_by_token_equals_one_pass(pair: tuple[CausalModel, torch.nn.Module]) -> None:
    ours, theirs = pair
    cache = ours.new_cache(3, 16)
    pieces = [ours(IDS[:1, :5], cache=Prompt(cache, 0, 0, 5)), ours(IDS[:1, 5:8], cache=Prompt(cache, 0, 5, 3))]
    ours(IDS[1:, :4], cache=Prompt(cache, 1, 0, 4))
    cache.copy(0, 2, 8)
    steps = [ours(torch.stack([IDS[0, 8 + i], IDS[1, 4 + i], IDS[0, 8 + i]])[:, None], cache=Rows(cache, [8 + i, 4 + i, 8 + i])) for i in range(4)]
    want = theirs(IDS).logits
    torch.testing.assert_close(ours.logits(torch.cat(pieces, 1)), want[:1, :8], **CLOSE)
    got = ours.logits(torch.cat(steps, 1))
    torch.testing.assert_close(got[0], want[0, 8:], **CLOSE)
    torch.testing.assert_close(got[1], want[1, 4:8], **CLOSE)
    torch.testing.assert_close(got[2], want[0, 8:], **CLOSE)


@torch.no_grad()
def test_a_growing_cache_keeps_what_it_holds(tiny_llama: Path) -> None:
    ours, theirs = CausalModel.load(tiny_llama), reference(tiny_llama)
    ids = torch.randint(5, 400, (1, 300), generator=torch.Generator().manual_seed(0))
    cache = ours.new_cache(9, 512)
    small = cache.bytes
    for start in (0, 100, 200):
        got = ours(ids[:, start : start + 100], cache=Prompt(cache, 0, start, 100))
    cache.reserve(9, 300)
    assert cache.bytes > 4 * small
    torch.testing.assert_close(ours.logits(got), theirs(ids).logits[:, 200:], **CLOSE)
    with pytest.raises(ValueError, match="over the cache's 9 x 512"):
        cache.reserve(9, 513)


@torch.inference_mode()
def test_packed_weights_give_the_same_logits(tiny_any: Path, without_c: None) -> None:
    ours = CausalModel.load(tiny_any)
    plain = ours.logits(ours(IDS))
    ours.pack()
    if not any(linear.packed is not None for linear in ours.lora.linears):
        pytest.skip("this build of torch has no oneDNN")
    torch.testing.assert_close(ours.logits(ours(IDS)), plain, **CLOSE)


def test_packing_is_left_aside_when_a_gradient_is_wanted() -> None:
    weight, x = torch.randn(5, 3), torch.randn(2, 3, requires_grad=True)
    packed.linear(x, weight, None, packed.pack(weight)).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 3))


@torch.no_grad()
@pytest.mark.parametrize(
    "extra",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"tie_word_embeddings": False},
        {"hidden_act": "gelu"},
    ],
    ids=lambda extra: next(iter(extra)) + str(next(iter(extra.values())))[:30],
)  # fmt: skip
def test_variants_of_a_family_are_computed_exactly_too(extra: dict, tmp_path: Path) -> None:
    config = tiny_config("llama", 512)
    for key, value in extra.items():
        setattr(config, key, value)
    save_random(tmp_path, config)
    ours, theirs = CausalModel.load(tmp_path), reference(tmp_path)
    torch.testing.assert_close(ours.logits(ours(IDS)), theirs(IDS).logits, **CLOSE)
    unusual = extra.get("hidden_act") == "gelu" or extra.get("rope_parameters", {}).get("rope_type") == "linear"
    assert type(ours.net).__name__ == ("General" if unusual else "Decoder")


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt_neox", "olmo2", "cohere", "granite"])
def test_any_other_architecture_is_computed_exactly_too(family: str, tmp_path: Path) -> None:
    common = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {} if family == "gpt_neox" else {"num_key_value_heads": 2}
    extra |= {"cohere": {"logit_scale": 0.3}, "granite": {"logits_scaling": 5.0}}.get(family, {})
    config = AutoConfig.for_model(family, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0, **extra, **common)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data *= 20  # logits large enough to reach a soft cap
    model.save_pretrained(tmp_path)
    ours, theirs = CausalModel.load(tmp_path), reference(tmp_path)
    torch.testing.assert_close(ours.logits(ours(IDS)), theirs(IDS).logits, **CLOSE)


def test_an_architecture_that_does_something_else_to_its_logits_is_refused(tiny_any: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2LMHeadModel

    forward = GPT2LMHeadModel.forward

    def louder(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(GPT2LMHeadModel, "forward", louder)
    if json.loads((tiny_any / "config.json").read_text())["model_type"] != "gpt2":
        CausalModel.load(tiny_any)
        return
    with pytest.raises(ModelError, match="GPT2LMHeadModel is not supported: its logits are not"):
        CausalModel.load(tiny_any)


def test_quantised_weights_are_refused_and_not_computed_as_if_they_were_plain(tiny_any: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_any, tmp_path / "quantised")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}}))
    with pytest.raises(ModelError, match="stored quantised"):
        CausalModel.load(copy)


def test_a_router_that_is_a_linear_layer_and_more_stays_as_it_is(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "phimoe", vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(5, 17)[None]
    ours = CausalModel.load(tmp_path)
    with torch.no_grad():
        assert torch.allclose(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4)
    assert not any("router" in path or path.endswith("gate") for linear in ours.lora.linears for part in linear.parts for path in [part.path])


@pytest.mark.parametrize("family", ["phi3", "olmo2"])
def test_a_deep_model_in_half_precision_is_not_taken_for_another(family: str, tmp_path: Path) -> None:
    """Its logits are as wide as a trained model's, so each rounds by more than a tenth."""
    config = AutoConfig.for_model(
        family, vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=16, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        theirs.lm_head.weight *= 5 / float(theirs(torch.arange(5, 17)[None]).logits.std())
    theirs.save_pretrained(tmp_path)
    ours, ids = CausalModel.load(tmp_path, dtype=torch.bfloat16), torch.arange(5, 17)[None]
    with torch.no_grad():
        got, want = ours.logits(ours(ids)).float(), theirs.eval()(ids).logits
    assert (got - want).std() < 0.1 * want.std()


def test_a_model_whose_positions_are_those_of_the_longest_row_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bart", is_decoder=True, vocab_size=512, d_model=64, decoder_layers=2, encoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="positions of their own"):
        CausalModel.load(tmp_path)


def test_a_recurrent_model_is_refused_by_name(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=512, hidden_size=32, num_hidden_layers=1, state_size=4)
    save_random(tmp_path, config)
    with pytest.raises(ModelError, match=r"Mamba.*not supported"):
        CausalModel.load(tmp_path)


def test_dropout_stays_off_whatever_mode_is_asked_for(tmp_path: Path) -> None:
    config = tiny_config("gpt2", 512)
    config.resid_pdrop = config.attn_pdrop = 0.5
    model = CausalModel.load(save_random(tmp_path, config)).train()
    assert torch.equal(model(IDS), model(IDS))


def test_the_base_is_frozen(tiny_any: Path) -> None:
    assert not any(p.requires_grad for p in CausalModel.load(tiny_any).parameters())


def test_the_digest_is_of_the_weights_not_of_their_files(tmp_path: Path) -> None:
    whole = save_random(tmp_path / "whole", tiny_config("llama", 512))
    shards = save_random(tmp_path / "shards", tiny_config("llama", 512), max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    a, b = CausalModel.load(whole), CausalModel.load(shards)
    assert a.digest == b.digest
    tensors = load_file(whole / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    assert CausalModel.load(whole).digest != a.digest


def test_the_context_is_what_the_model_can_see(tmp_path: Path, tiny_any: Path) -> None:
    assert CausalModel.load(tiny_any).max_context == 512
    config = tiny_config("mistral", 512)
    config.sliding_window = 40
    assert CausalModel.load(save_random(tmp_path, config)).max_context == 40


def test_the_context_ends_where_rows_would_no_longer_be_alone_with_their_positions(tmp_path: Path) -> None:
    """longrope's factors go by the longest row of a pass, and GPT-Neo's window is counted in columns."""
    common = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256, "pad_token_id": 0}
    factors = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}
    phi = AutoConfig.for_model("phi3", intermediate_size=96, num_attention_heads=4, original_max_position_embeddings=64, rope_parameters=factors, **common)
    neo = AutoConfig.for_model("gpt_neo", num_layers=2, num_heads=4, intermediate_size=96, window_size=16, attention_types=[[["global", "local"], 1]], vocab_size=512, hidden_size=64, max_position_embeddings=256)
    assert context_limit(phi) == 64 and context_limit(neo) == 16
    assert not CausalModel.load(save_random(tmp_path / "local", neo)).packs  # nor may replies share a prompt's row there
    neo.attention_layers = ["global", "global"]
    assert context_limit(neo) == 256


def test_hidden_states_are_as_wide_as_the_head_and_not_as_the_config_says(tmp_path: Path) -> None:
    config = AutoConfig.for_model("opt", vocab_size=512, hidden_size=64, word_embed_proj_dim=32, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, pad_token_id=0)
    model = CausalModel.load(save_random(tmp_path, config))
    assert model.hidden_size == model(IDS).shape[-1] == 32


@pytest.mark.parametrize(("said", "sampling"), [
    ({}, (1.0, 1.0)), ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}, (0.7, 0.8)), ({"top_p": 0.95}, (1.0, 0.95)),
    ({"temperature": 0, "top_p": 0}, (1.0, 1.0)), ({"temperature": None, "top_p": "all"}, (1.0, 1.0)), ({"temperature": 1e9, "top_p": 1.5}, (1.0, 1.0)),
])  # fmt: skip
def test_how_a_model_asks_to_be_sampled(tiny_llama: Path, tmp_path: Path, said: dict, sampling: tuple[float, float]) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | said))
    assert CausalModel.load(tmp_path).sampling == sampling


@torch.no_grad()
def test_bfloat16_is_near_float32(tiny_any: Path) -> None:
    full, half = CausalModel.load(tiny_any), CausalModel.load(tiny_any, dtype=torch.bfloat16)
    a, b = full.logits(full(IDS)), half.logits(half(IDS))
    assert b.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.995


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model directory at .*/absent"):
        CausalModel.load(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"no model directory at \./absent"):
        CausalModel.load("./absent")
    with pytest.raises(ModelError, match=r"cannot get nobody/nothing from the Hugging Face hub"):
        CausalModel.load("nobody/nothing")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:x"])
def test_a_device_that_is_not_there_is_named(tiny_llama: Path, device: str) -> None:
    with pytest.raises(ModelError, match=rf"{device}.* is not (a device|here)"):
        CausalModel.load(tiny_llama, device=device)


def test_pickled_weights_are_refused(tiny_any: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_any / "config.json").read_text())
    torch.save(load_file(tiny_any / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors only"):
        CausalModel.load(tmp_path)


def test_damaged_files_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        CausalModel.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        CausalModel.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ModelError, match="not a config this release of transformers knows") as unknown:
        CausalModel.load(tmp_path)
    assert "never-heard-of" in str(unknown.value) and "\n" not in str(unknown.value)
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    whole = (tiny_llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        CausalModel.load(tmp_path)


def test_weights_that_do_not_match_the_config_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    tensors = load_file(tiny_llama / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack model\.layers\.2\."):
        CausalModel.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=r"does not use, first model\.layers\.1\."):
        CausalModel.load(tmp_path)


def test_a_config_written_in_full_reads_as_transformers_reads_it(tiny_llama: Path) -> None:
    config, theirs = read_config(tiny_llama), AutoConfig.from_pretrained(tiny_llama)
    assert isinstance(config, WrittenConfig) and not isinstance(theirs, WrittenConfig)
    for name in WrittenConfig.SAYS | {"model_type", "head_dim"}:
        assert getattr(config, name) == getattr(theirs, name), name


@pytest.mark.parametrize("change", [
    {"rms_norm_eps": None}, {"model_type": "mistral"}, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
])  # fmt: skip
def test_a_config_that_leaves_anything_open_is_transformers_to_read(tiny_llama: Path, tmp_path: Path, change: dict) -> None:
    written = json.loads((tiny_llama / "config.json").read_text("utf-8")) | change
    written = {name: value for name, value in written.items() if value is not None or name not in change}
    (tmp_path / "config.json").write_text(json.dumps(written), "utf-8")
    assert not isinstance(read_config(tmp_path), WrittenConfig)
