"""What pyproject.toml cannot say: how engine/decode.c is built, and that Plaudit also works without it."""

import hashlib
import platform
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "engine/decode.c"
vectors = ["-mavx2", "-mfma"] if platform.machine() in ("x86_64", "AMD64") else []
built_from = hashlib.sha256(Path(SOURCE).read_bytes()).hexdigest()
setup(
    ext_modules=[
        Extension(
            "engine._decode", [SOURCE], define_macros=[("BUILT_FROM", f'"{built_from}"')], extra_compile_args=["-O3", "-std=gnu11", *vectors],
            libraries=["m", "pthread"], optional=True,
        )
    ]
)  # fmt: skip
