"""What pyproject.toml cannot say: how the decode step in C is built, and that Plaudit also works without it."""

import platform

from setuptools import Extension, setup

vectors = ["-mavx2", "-mfma"] if platform.machine() in ("x86_64", "AMD64") else []
setup(
    ext_modules=[
        Extension("engine._decode", ["engine/decode.c"], extra_compile_args=["-O3", "-std=gnu11", *vectors], libraries=["m", "pthread"], optional=True)
    ]
)
