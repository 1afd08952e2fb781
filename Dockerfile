# docker build --target cpu -t groundup .          docker run --rm -it -v $PWD/runs:/groundup/runs groundup
# docker build --target cuda -t groundup:cuda .    docker run --rm -it --gpus all -v $PWD/runs:/groundup/runs groundup:cuda

FROM debian:bookworm-slim AS base
# git: the revision in config.json; EGL and Mesa: videos without a screen; chromium: tests/test_report.py
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates chromium git libegl1 libgl1 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*
COPY --from=ghcr.io/astral-sh/uv:latest /uv /usr/local/bin/uv
ENV UV_LINK_MODE=copy UV_PYTHON_INSTALL_DIR=/opt/python UV_PYTHON=3.11
WORKDIR /groundup
COPY pyproject.toml ./

# torch without CUDA is a fifth of the other; UV_NO_SYNC: `uv run` takes what is there
FROM base AS cpu
RUN uv venv && uv pip install --torch-backend cpu -r pyproject.toml --group dev --no-cache
ENV UV_NO_SYNC=1
COPY . .
CMD ["bash"]

# the wheels of torch bring CUDA; the driver comes from outside with --gpus, its EGL with the capability graphics
FROM base AS cuda
RUN uv sync --no-cache
ENV UV_NO_SYNC=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
COPY . .
CMD ["bash"]
