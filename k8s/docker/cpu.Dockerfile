# syntax=docker/dockerfile:1
# LoopServe for CPUs, from the repository root:
#
#   docker build -f k8s/docker/cpu.Dockerfile -t loopserve:0.1.0-cpu .
#
# Where packages come from is said by pip's own variables, given as build arguments: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL. With an extra index
# that has CPU builds of PyTorch, pip takes those (2.13.0+cpu counts as newer than 2.13.0), and the image is some gigabytes smaller.
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
# KubeRay's probes call wget, its start command is bash's.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --create-home loopserve
COPY --from=build /opt/loopserve /opt/loopserve
ENV PATH=/opt/loopserve/bin:$PATH HF_HOME=/models PYTHONUNBUFFERED=1
RUN install --directory --owner loopserve --group loopserve /models
USER 1000:1000
WORKDIR /home/loopserve
EXPOSE 8000
CMD ["loopserve", "serve", "--host", "0.0.0.0"]
