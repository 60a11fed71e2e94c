"""Muon (Jordan 2024): momentum, then the nearest orthogonal matrix as the step. In float32, so that any processor runs it.

`torch.optim.Muon` is the same rule with its products in bfloat16, which a processor without such instructions emulates:
8.5 s a step there on a model of 3.5 million parameters. Matrices of one shape are taken together here, as one batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values towards 1 (Jordan 2024)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix (N, A, B) by values near 1, by Newton-Schulz iteration. Same shape."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For matrices only. The step's size is 0.2 sqrt(max(A, B)) of the rate, AdamW's usual one, so both may share a rate."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        if any(p.dim() != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon steps matrices only: give vectors and tables to AdamW")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient: Nesterov momentum, orthogonalised; decoupled weight decay."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}  # by shape: a parameter and its momentum, one step ahead
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                alike.setdefault(p.shape, []).append((p, torch.lerp(p.grad, buffer, group["momentum"])))
            for shape, pairs in alike.items():
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for (p, _), direction in zip(pairs, orthogonalise(torch.stack([ahead for _, ahead in pairs])), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=size)
