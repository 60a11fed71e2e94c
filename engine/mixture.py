"""Adapters side by side in one batch, each row by its own (serving): all of them stacked, and one alone added into the weights.

Owns what a step with several versions computes, and what it costs. Does not own the adapters (`engine/lora.py`) or which row has which
(`engine/engine.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import packed
from engine.gpu import Low, onto

if TYPE_CHECKING:
    from engine.lora import Adapter, LoraBank, LoraLinear
    from engine.native import Decode

NOTHING: dict[LoraLinear, Tensor] = {}
PATIENCE = 32  # steps in a row of one version alone, before its weights are added up


class Whole:
    """One adapter added into a copy of the weights, so that a layer costs what it costs bare. They are laid out for what decodes:
    packed, or plain where that is `engine/native.py`.

    It is made a layer a step, so that no step waits for it, and not before its adapter has had the model to itself for
    `patience` steps; with a patience of 0, all at once.
    """

    def __init__(self, adapter: Adapter, bank: LoraBank, patience: int = PATIENCE) -> None:
        self.adapter, self.patience, self.at_once, self.plain = adapter, patience, patience == 0, bank.native
        self.left = [linear for linear in bank.linears if bank.mergeable and (self.plain or linear.packed is not None)]
        self.made: dict[LoraLinear, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """The adapter has the model to itself for one step more."""
        self.patience = max(0, self.patience - 1)
        while self.left and not self.patience:
            linear = self.left.pop()
            if (fused := self.adapter.fused(linear)) is not None:
                plain = linear.weight.detach() + fused[1].detach() @ fused[0].detach()
                if (weight := plain if self.plain else packed.pack(plain)) is not None:
                    self.made[linear] = weight
            if not self.at_once:
                break


class Mixture:
    """Several adapters in one batch, stacked: however many there are, a layer pays two small products.

    A of every adapter is laid end to end, so x A^T computes all of them; a mask then clears, in each row, the
    columns of adapters that are not that row's; B of every adapter, side by side, brings them back. While all rows have
    one and the same adapter, layers that are there as a `Whole` are taken from it.
    """

    def __init__(self, bank: LoraBank, adapters: Sequence[Adapter]) -> None:
        self.count, self.bank, self.adapters = len(adapters), bank, list(adapters)
        self.wholes: dict[int, Whole] = {}  # of adapters in training, whose numbers hold as long as this mixture does
        self.whole = NOTHING  # for the rows at hand
        linears = bank.linears
        self.stacks: dict[LoraLinear, tuple[Tensor, Tensor, tuple[int, ...]]] = {}
        self.owners: dict[tuple[int, ...], Tensor] = {}  # by ranks: whose each of the R columns is, (R,)
        for linear in linears:
            stacks = [adapter.stack(linear) for adapter in adapters]
            if found := [each for each in stacks if each is not None]:
                ranks = tuple(0 if each is None else len(each[0]) for each in stacks)
                # one alone that never changes is taken as it is
                a, b = found[0] if self.count == 1 and linear in adapters[0].stacked else map(torch.cat, zip(*found, strict=True))
                self.stacks[linear] = (a, b, ranks)  # (R, in), (R, out)
                if ranks not in self.owners:
                    self.owners[ranks] = onto(a.device, [i for i, r in enumerate(ranks) for _ in range(r)], torch.int32)
        self.stale = False  # whether adapters may have been trained since
        self.masks: dict[tuple[int, ...], Tensor | None] = {}
        self.counts = {ranks: onto(bank.device, ranks, torch.int32) for ranks in self.owners}
        self.rows: tuple[int, ...] | None = None
        self._told: tuple[dict[LoraLinear, Tensor], int, Any] | None = None
        self.choice: Tensor | None = None  # the same on the device, (rows,)

    def choose(self, rows: Sequence[int]) -> None:
        """Say which adapter each row of the batch has: an index into `adapters`, -1 for the bare base."""
        if self.rows != tuple(rows):
            self.follow(onto(self.bank.device, rows, torch.int32))
            self.rows = tuple(rows)
            if self.count == 1 and all(row == 0 for row in rows):
                self.masks = dict.fromkeys(self.owners)
        self.whole = self._whole_of(rows[0]).made if rows[0] >= 0 and rows.count(rows[0]) == len(rows) else NOTHING

    def follow(self, choice: Tensor) -> None:
        """As `choose`, by numbers on the device, (rows,), that may be others when a recorded step is replayed."""
        self.rows, self.whole, self.choice = None, NOTHING, choice.int()
        # (rows, 1, R), True = another's column
        self.masks = {ranks: (self.choice[:, None] != owner)[:, None] for ranks, owner in self.owners.items()}

    def low(self, linear: LoraLinear) -> Low | None:
        """What the adapters add to a layer's output, None for nothing; see `choose` and `follow`."""
        if (stack := self.stacks.get(linear)) is None:
            return None
        a, b, ranks = stack
        assert self.choice is not None
        return Low(a, b, self.owners[ranks], self.choice)

    def table(self, decode: Decode) -> Any:
        """What `engine/native.py` tells of every layer, for the rows at hand."""
        if self._told is None or self._told[0] is not self.whole or self._told[1] != len(self.whole):
            self._told = self.whole, len(self.whole), decode.layers(self)
        return self._told[2]

    def rest(self) -> None:
        """Nothing runs, so adapters in training may change from here on."""
        self.stale = any(adapter.trainable for adapter in self.adapters)
        self.wholes, self.whole, self._told = {}, NOTHING, None

    @torch.no_grad()
    def renew(self) -> None:
        """Take over what the adapters' numbers have become, to where the old ones were: a recorded step finds them there."""
        self.stale = False
        for linear, (a, b, _) in self.stacks.items():
            found = [each for each in (adapter.stack(linear) for adapter in self.adapters) if each is not None]
            a.copy_(torch.cat([each[0] for each in found]))
            b.copy_(torch.cat([each[1] for each in found]))

    def _whole_of(self, row: int) -> Whole:
        adapter = self.adapters[row]
        if not adapter.trainable:
            whole = self.bank.whole_of(adapter)
        elif row in self.wholes:
            whole = self.wholes[row]
        else:
            whole = self.wholes[row] = Whole(adapter, self.bank, patience=0)
        whole.step()
        return whole

    def through(self, linear: LoraLinear, x: Tensor) -> Tensor:
        """The layer's output, each row's by its own adapter."""
        if not self.bank.native and (weight := self.whole.get(linear)) is not None:
            return packed.product(x, weight, linear.bias)
        y, stack = linear.bare(x), self.stacks.get(linear)
        if stack is None:
            return y
        a, b, ranks = stack
        h = F.linear(x, a)  # (rows, T, R)
        if (mask := self.masks[ranks]) is not None:
            h = h.masked_fill(mask, 0)  # a product would carry one version's overflow into another's rows
        return torch.addmm(y.view(-1, y.shape[-1]), h.view(-1, h.shape[-1]), b).view(y.shape)
