# gaoler with its pinned CLI in one image.
#
# What a container gets: gaoler of this release starts only where the whole kernel tier holds. A default
# container lacks what that needs (mounts, namespaces, cgroups that can be written), so gaoler says what is
# missing and exits. Run it with those privileges on a machine that is gaoler's own:
#
#     docker run --privileged --cgroupns=host -v gaoler-state:/var/lib/gaoler --network=host IMAGE
#
# A privileged container is not a boundary of its own; the cages inside it are the boundary.

FROM rust:1-bookworm AS build
WORKDIR /gaoler
RUN apt-get update && apt-get install -y --no-install-recommends nodejs npm && rm -rf /var/lib/apt/lists/*
COPY scripts scripts
RUN scripts/fetch-cli
COPY . .
RUN cargo build --locked --release --workspace --bins \
    && install -D -t /out/usr/local/bin "$(scripts/binaries release)"/gaoler \
        "$(scripts/binaries release)"/gaoler-supervisor "$(scripts/binaries release)"/gaoler-egress \
        "$(scripts/binaries release)"/gaoler-upstream \
    && install -D -t /out/usr/local/lib/gaoler "$(scripts/fetch-cli)"

# The tools in this image are what an agent finds in its cage.
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git python3 curl jq ripgrep \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /out /
VOLUME /var/lib/gaoler
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/gaoler"]
CMD ["serve"]
