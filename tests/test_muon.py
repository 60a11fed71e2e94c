"""Muon in float32 is torch's Muon, within what its bfloat16 loses."""

from __future__ import annotations

import pytest
import torch

from learner.muon import Muon, orthogonalise
from learner.sft import fast_bf16


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
def test_orthogonalising_keeps_the_singular_vectors_and_brings_the_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    out = orthogonalise(x)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    middle = u.mT @ out @ v.mT  # diagonal, if the vectors are the same
    values = middle.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(middle, torch.diag_embed(values), atol=1e-4)
    assert values.min() > 0.3 and values.max() < 1.3


def test_a_few_steps_are_those_of_torch() -> None:
    torch.manual_seed(1)
    start = [torch.randn(24, 16), torch.randn(16, 16), torch.randn(24, 16)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    one = Muon(ours, lr=1e-2, weight_decay=0.1)
    two = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        two.step()
    for a, b, first in zip(ours, theirs, start, strict=True):
        moved = (b - first).norm()
        assert moved > 0.1 and (a - b).norm() < 0.02 * moved  # bfloat16 keeps 8 bits


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.zeros(3)])


def test_bfloat16_is_used_only_where_the_processor_says_that_it_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False, "amx_bf16": False})
    assert not fast_bf16()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert fast_bf16()
