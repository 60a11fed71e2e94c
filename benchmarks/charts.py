"""Charts of the benchmarks: matplotlib is for development alone, asked for only where a chart is."""

from __future__ import annotations

from argparse import ArgumentTypeError
from importlib.util import find_spec
from pathlib import Path


def chart_file(text: str) -> Path:
    """An argparse type: where a chart goes; its folder is made. Raises ArgumentTypeError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise ArgumentTypeError("charts need matplotlib: `make venv` installs it")
    file = Path(text)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
