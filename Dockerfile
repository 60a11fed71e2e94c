# syntax=docker/dockerfile:1
# Two targets: `cpu` (the default, last) and `cuda`.
#   docker build -t plaudit .                      docker run -p 7860:7860 -v plaudit:/data plaudit
#   docker build --target cuda -t plaudit:cuda .   docker run --gpus all -p 7860:7860 -v plaudit:/data plaudit:cuda
# A container listens on a public address, so it needs a key first:
#   docker run --rm -v plaudit:/data plaudit keys add alice --role operator
# Settings: -e PLAUDIT_...=..., or a plaudit.toml in the volume.

FROM python:3.11-slim AS source
WORKDIR /app
COPY pyproject.toml setup.py constraints.txt README.md LICENSE plaudit.py ./
COPY store store
COPY engine engine
# engine/decode.c is built with the package.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY server server
COPY learner learner
COPY ui ui

FROM source AS build-cpu
# Where torch without CUDA comes from; behind a mirror: --build-arg TORCH_INDEX=https://...
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir torch==2.13.0 --index-url "$TORCH_INDEX" \
 && /venv/bin/pip install --no-cache-dir -c constraints.txt .

FROM source AS build-cuda
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir torch==2.13.0 \
 && /venv/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim AS runtime
RUN useradd --create-home --uid 10001 plaudit && mkdir /data && chown plaudit /data
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=passive \
    GRADIO_ANALYTICS_ENABLED=False \
    HF_HUB_DISABLE_TELEMETRY=1 \
    PLAUDIT_DATA_DIR=/data \
    PLAUDIT_HOST=0.0.0.0 \
    PLAUDIT_PORT=7860
WORKDIR /data
USER plaudit
VOLUME /data
EXPOSE 7860
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:%s/readyz' % os.environ['PLAUDIT_PORT'], timeout=2)"]
ENTRYPOINT ["plaudit"]
CMD ["serve"]

FROM runtime AS cuda
# Triton builds its kernels (engine/kernels.py) with a C compiler; without one replies come more slowly.
USER root
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER plaudit
COPY --from=build-cuda /venv /venv

FROM runtime AS cpu
COPY --from=build-cpu /venv /venv
