# The serving image: no torch, not root, the bundled model inside.
#     docker build -t cdm-serve .  &&  docker run --rm -p 8000:8000 cdm-serve
FROM python:3.11.13-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /src
RUN python -m venv /opt/cdm-serve
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY cdm_serve cdm_serve
COPY engines engines
# The other commands need torch, which is not here.
RUN /opt/cdm-serve/bin/pip install --constraint constraints.txt ".[openvino,otel]" \
    && rm /opt/cdm-serve/bin/cdm-train /opt/cdm-serve/bin/cdm-export /opt/cdm-serve/bin/cdm-bench

FROM python:3.11.13-slim-bookworm
RUN useradd --system --uid 10001 --create-home cdm
COPY --from=build /opt/cdm-serve /opt/cdm-serve
# Another port: `-e CDM_SERVE_PORT=…` rather than --port, so that the health check asks there too.
ENV PATH=/opt/cdm-serve/bin:$PATH PYTHONUNBUFFERED=1 CDM_SERVE_HOST=0.0.0.0 CDM_SERVE_PORT=8000
USER 10001
WORKDIR /home/cdm
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"CDM_SERVE_PORT\"]}/readyz', timeout=2)"]
ENTRYPOINT ["cdm-serve"]
