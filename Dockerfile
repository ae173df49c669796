# The image of `job-registry`: serve, worker, migrate and all other commands.
#
#   docker build -t job-registry .
#   docker run --rm job-registry types
#
# A catalog of your own: an image FROM this one that copies your package and sets JOBS_CATALOG.

FROM node:22-slim AS page
WORKDIR /build/api/web
COPY api/web/package.json api/web/package-lock.json ./
RUN npm ci
COPY api/web ./
RUN npm run build

FROM python:3.13-slim AS build
WORKDIR /build
RUN python -m venv /venv
# With the packages that export traces, which are used only where variables of OpenTelemetry are set.
COPY requirements-otel.txt ./
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r requirements-otel.txt
COPY pyproject.toml README.md LICENSE ./
COPY alembic alembic
COPY registry registry
COPY api api
COPY --from=page /build/api/web/dist api/web/dist
RUN /venv/bin/pip install --no-cache-dir --no-deps .

FROM python:3.13-slim
# A volume that is mounted at /srv/jobs/assets takes its owner from this folder.
RUN useradd --system --uid 10001 --create-home --home-dir /srv/jobs jobs \
    && install --directory --owner=jobs --group=jobs /srv/jobs/assets
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH
USER 10001
WORKDIR /srv/jobs
EXPOSE 8000
# Of `serve`; a worker answers at its --health-port. Not by `urlopen`: it sends the request to the
# proxy of `http_proxy`, which Docker can set in each container.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; from os import environ; c = C('127.0.0.1', environ.get('JOBS_PORT', 8000)); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["job-registry"]
# A container is reached from outside, so `serve` demands authentication: set JOBS_AUTH_*.
CMD ["serve", "--host", "0.0.0.0"]
