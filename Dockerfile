# Two images from one file:
#   docker build --target cpu -t megatron-hybrid:cpu .    tests and small runs, no GPU needed
#   docker build --target gpu -t megatron-hybrid:gpu .    training, on top of BASE_IMAGE

ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.10-py3

FROM python:3.12-slim AS cpu
RUN useradd --create-home --shell /bin/bash trainer
WORKDIR /opt/megatron-hybrid
COPY --chown=trainer . .
RUN chown trainer . && pip install --no-cache-dir --editable '.[dev]'
USER trainer
CMD ["python", "-m", "pytest"]

# The base brings torch, Transformer Engine and flash-attn, built for each other, and constraints
# which keep pip from replacing them. So setup.py must not ask for its own torch here, and what
# has kernels is compiled against the torch that is there (--no-build-isolation).
FROM ${BASE_IMAGE} AS gpu
RUN useradd --create-home --shell /bin/bash trainer
WORKDIR /opt/megatron-hybrid
COPY --chown=trainer . .
RUN chown trainer . \
    && sed -i 's/"torch==[^"]*"/"torch"/' setup.py \
    && pip install --no-cache-dir --no-build-isolation 'mamba-ssm>=2.3' 'causal-conv1d>=1.5' \
    && pip install --no-cache-dir --editable .
USER trainer
CMD ["megatron-hybrid", "doctor"]
