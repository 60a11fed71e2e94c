"""Charts: drawn where matplotlib is, and one plain line where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth, overoptimisation, votes


@pytest.mark.parametrize("benchmark", [growth, overoptimisation, votes])
def test_a_chart_without_matplotlib_is_one_line_that_says_what_to_install(
    benchmark: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.charts.find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        benchmark.main(["--plot", str(tmp_path / "charts" / "x.png")])  # type: ignore[attr-defined]
    assert "charts need matplotlib: `make venv`" in capsys.readouterr().err.splitlines()[-1]


def test_each_chart_is_drawn(tmp_path: Path) -> None:
    from benchmarks.charts import chart_file

    file = chart_file(str(tmp_path / "charts" / "x.png"))
    growth.draw_curves([growth.Curve(name, [10, 100], [0.1, 0.2], unit="votes") for name in ("store: a", "store: b", "reward")], file)
    growing = file.stat().st_size
    rows = [{"taste": t, "votes": v, "share": 0.9, "kl": 2.0, "best_of_8": 0.8, "dpo": [{"share": 0.8, "kl": 9.0}]} for t in ("shorter", "list") for v in (30, 60)]
    votes.draw(rows, file)
    assert file.stat().st_size > 5_000 and file.stat().st_size != growing
    points = [{"kl": float(i), "gold": i * 0.1, "proxy": i * 0.2} for i in range(4)]
    overoptimisation.plot(file, {"one member": points, "ensemble": points}, {name: {"stopped_at": points[2]} for name in ("one member", "ensemble")}, "title")
    assert file.stat().st_size > 5_000
