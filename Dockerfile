# Two images from one file:
#   docker build --target cpu -t megatron-hybrid:cpu .    tests and small runs, no GPU needed
#   docker build --target gpu -t megatron-hybrid:gpu .    training, on top of BASE_IMAGE
#
# In both: `docker run IMAGE smoke-test`, `docker run IMAGE pretrain ...`, `docker run IMAGE bash`.
# Everything installed has the version of docker/constraints.txt. Packages are installed before the
# source is copied, so a change of the source alone installs nothing again.

# Its torch must be of the release that setup.py asks for (this one: 2.13, with CUDA 13.3).
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3

FROM python:3.12-slim AS cpu
RUN useradd --create-home --shell /bin/bash --uid 10001 trainer \
    && install --directory --owner trainer /opt/megatron-hybrid
WORKDIR /opt/megatron-hybrid
# PyPI's torch for Linux is the build for CUDA, some 5 GB with its libraries. An index that has the
# CPU's, given as --build-arg PIP_EXTRA_INDEX_URL=..., is preferred: 2.13.0+cpu fits ==2.13.0 too.
ARG PIP_EXTRA_INDEX_URL
COPY docker/constraints.txt docker/requirements.py docker/
COPY setup.py ./
RUN python docker/requirements.py wanted setup.py --extra dev > /tmp/wanted.txt \
    && pip install --no-cache-dir --constraint docker/constraints.txt --requirement /tmp/wanted.txt \
        setuptools \
    && rm /tmp/wanted.txt
COPY --chown=trainer . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation \
        --constraint docker/constraints.txt --editable .
USER 10001
RUN megatron-hybrid doctor
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-hybrid, CPU" \
      org.opencontainers.image.description="Tests and small runs of hybrid Mamba-Transformer models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"
ENTRYPOINT ["/opt/megatron-hybrid/docker/entrypoint.sh"]
CMD ["doctor"]

# The base brings torch and Transformer Engine, built for each other, and a list of
# constraints (PIP_CONSTRAINT) by which pip leaves alone whatever it has. Added are only packages
# that it lacks.
FROM ${BASE_IMAGE} AS gpu
RUN useradd --create-home --shell /bin/bash --uid 10001 trainer \
    && install --directory --owner trainer /opt/megatron-hybrid
WORKDIR /opt/megatron-hybrid
# The base's Python is the system's, which pip would refuse to add to.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
# Compilers that run at once; each of them takes some 4 GB of memory.
ARG MAX_JOBS=8
COPY docker/constraints.txt docker/requirements.py docker/
# Compiled against the torch that is there: wheels made for other builds of torch do not load, and
# packages that are only theirs to bring (--no-deps) come in the next step. The import shows that
# what was compiled can be loaded.
RUN python docker/requirements.py lacking docker/constraints.txt > /tmp/lacking.txt \
    && MAX_JOBS="${MAX_JOBS}" CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
        pip install --no-cache-dir --no-deps --no-build-isolation \
        --constraint /tmp/lacking.txt causal-conv1d mamba-ssm \
    && python -c "import torch, causal_conv1d_cuda, selective_scan_cuda" \
    && rm /tmp/lacking.txt
COPY setup.py ./
# `convert` is for transformers, which mamba-ssm imports.
RUN python docker/requirements.py lacking docker/constraints.txt > /tmp/lacking.txt \
    && python docker/requirements.py wanted setup.py --extra convert --without torch \
        > /tmp/wanted.txt \
    && pip install --no-cache-dir --constraint /tmp/lacking.txt --requirement /tmp/wanted.txt \
    && rm /tmp/lacking.txt /tmp/wanted.txt
COPY --chown=trainer . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation \
        --constraint docker/constraints.txt --editable .
USER 10001
# Ends the build where a version that the base brought is not one that setup.py allows. What the
# extra `gpu` names is looked at as well, imported.
RUN megatron-hybrid doctor
ARG REVISION=unknown
LABEL org.opencontainers.image.title="megatron-hybrid, GPU" \
      org.opencontainers.image.description="Distributed training of hybrid Mamba-Transformer models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"
ENTRYPOINT ["/opt/megatron-hybrid/docker/entrypoint.sh"]
CMD ["doctor"]
