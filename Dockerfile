# The server as an image: docker build -t realtime-server .
#
# docker-compose.yml runs two of it and a worker, with Redis and nginx. Alone, for a try:
#     docker run --rm -p 127.0.0.1:8000:8000 realtime-server serve --insecure-no-auth

# The Python that the tests run on. The same image in both stages: the environment is made for its interpreter.
FROM python:3.11-slim AS build
WORKDIR /build
# An environment of its own, without pip: what runs later can't install anything.
RUN python -m venv --without-pip /opt/realtime
# The pins alone first: their layer is built again only when they change.
COPY requirements/runtime.txt requirements/
RUN pip --python /opt/realtime/bin/python install --no-cache-dir --only-binary :all: -r requirements/runtime.txt
COPY pyproject.toml LICENSE ./
COPY docs/package/README.md docs/package/
COPY realtime realtime
COPY static static
RUN pip --python /opt/realtime/bin/python install --no-cache-dir --no-deps .

FROM python:3.11-slim
# A fixed number, so that volumes and policies can name it; nothing on the disk belongs to it.
RUN groupadd --gid 10001 realtime && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin realtime
COPY --from=build /opt/realtime /opt/realtime
# Inside a container every address but this one is out of reach. As it can be reached by others, the server starts only
# with authentication, or when told that none is meant.
ENV PATH=/opt/realtime/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    REALTIME_HOST=0.0.0.0 \
    REALTIME_PORT=8000 \
    REALTIME_LOG_FORMAT=json
USER 10001:10001
EXPOSE 8000
# The server drains on it: docker stop has to wait longer than REALTIME_DRAIN_S, so --time 30.
STOPSIGNAL SIGTERM
# There is no curl in the image. Alive, not ready: an instance whose Redis is away must not be restarted for it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['REALTIME_PORT'] + '/healthz', timeout=4)"]
# Without a shell in between, which would keep the signal to itself.
ENTRYPOINT ["realtime"]
CMD ["serve"]
