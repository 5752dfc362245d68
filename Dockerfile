# gaoler with its pinned CLI in one image. deploy/README.md says how to run it, and what each way gives.
#
#     docker build -t gaoler .
#     docker build -t gaoler --build-arg BUILD=prebuilt .
#
# The second takes what was built before: prebuilt/usr/local/bin with all of gaoler's programs and
# prebuilt/usr/local/lib/gaoler/claude, which scripts/fetch-cli has checked against scripts/cli.lock.
ARG BUILD=source

FROM rust:1-bookworm AS source
WORKDIR /gaoler
RUN apt-get update && apt-get install -y --no-install-recommends nodejs npm && rm -rf /var/lib/apt/lists/*
# The CLI is 170 MB on the wire and changes rarely: it has a layer of its own.
COPY scripts scripts
RUN scripts/fetch-cli
COPY . .
RUN cargo build --locked --release --workspace --bins \
    && install -D -t /out/usr/local/bin "$(scripts/binaries release)"/gaoler \
        "$(scripts/binaries release)"/gaoler-supervisor "$(scripts/binaries release)"/gaoler-egress \
        "$(scripts/binaries release)"/gaoler-files "$(scripts/binaries release)"/gaoler-upstream \
        "$(scripts/binaries release)"/gaoler-ledger "$(scripts/binaries release)"/gaoler-exporter \
    && install -D -t /out/usr/local/lib/gaoler "$(scripts/fetch-cli)"

FROM debian:bookworm-slim AS prebuilt
COPY prebuilt /out

FROM ${BUILD} AS built

# The tools in this image are what an agent finds in its cage.
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git python3 curl jq ripgrep procps \
    && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/*
# For `--user gaoler`, where the whole container must do without root: the tier is then what one uid can hold.
RUN useradd --uid 10001 --no-create-home --home-dir /var/lib/gaoler --shell /usr/sbin/nologin gaoler \
    && install -d -m 700 /var/lib/gaoler
COPY --from=built /out /
# Besides /tmp the only place that must be writable.
VOLUME /var/lib/gaoler
EXPOSE 8080
STOPSIGNAL SIGTERM
# On whatever address it listens, loopback answers; its own certificate need not name it.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD curl -fsS http://127.0.0.1:8080/readyz || curl -fsSk https://127.0.0.1:8080/readyz
ENTRYPOINT ["/usr/local/bin/gaoler"]
CMD ["serve"]
