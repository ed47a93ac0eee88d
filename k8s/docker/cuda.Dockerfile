# syntax=docker/dockerfile:1
# LoopServe for NVIDIA GPUs, from the repository root:
#
#   docker build -f k8s/docker/cuda.Dockerfile -t loopserve:0.1.0-cuda .
#
# PyTorch's default build for Linux brings its CUDA libraries along, so the base needs none: the driver comes from the node, through the
# container runtime. Another build of PyTorch comes through pip's own variables, given as build arguments: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL.
ARG BASE_IMAGE=python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/loopserve
ENV PATH=/opt/loopserve/bin:$PATH
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY loopserve ./loopserve
COPY router ./router
COPY deploy ./deploy
COPY monitoring ./monitoring
RUN pip install --constraint constraints.txt .

FROM ${BASE_IMAGE}
# KubeRay's probes call wget, its start command is bash's. Triton compiles a launcher for every kernel: it needs a C compiler at run time.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends wget gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home loopserve
COPY --from=build /opt/loopserve /opt/loopserve
ENV PATH=/opt/loopserve/bin:$PATH HF_HOME=/models PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN install --directory --owner loopserve --group loopserve /models
USER 1000:1000
WORKDIR /home/loopserve
EXPOSE 8000
CMD ["loopserve", "serve", "--host", "0.0.0.0"]
