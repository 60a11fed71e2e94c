"""The loop's benchmark: what it says of broken replies."""

from __future__ import annotations

import pytest

from benchmarks.learning import broken_rise, no_more_broken

WHOLE, CUT = "Bees make honey.", "Bees make"


def test_the_rise_in_broken_replies_has_an_interval_by_prompt() -> None:
    ours = [CUT, WHOLE] * 5 + [WHOLE, WHOLE] * 45  # of 50 prompts with two replies each: five break one, 5% of all
    low, high = broken_rise(ours, [WHOLE] * 100, 50)
    deviation = (0.1 * 0.9 * 50 / 49) ** 0.5 * 0.5 / 50**0.5  # of a mean of 50 that are 0.5 in a tenth
    assert (low, high) == pytest.approx((0.05 - 2.0096 * deviation, 0.05 + 2.0096 * deviation), abs=1e-4)


@pytest.mark.parametrize(("rise", "passes"), [
    ((-0.001, 0.005), True), ((-0.01, -0.001), True), ((0.0, 0.01), True),
    ((0.0001, 0.005), False),  # more beyond doubt, however few
    ((-0.02, 0.03), False),  # too few replies to tell
])  # fmt: skip
def test_no_more_are_broken_where_the_interval_holds_0_and_is_narrow(rise: tuple[float, float], passes: bool) -> None:
    assert no_more_broken(rise) is passes
