# docker build -t segnet .                         SegNet on the CPU
# docker build -t segnet:cuda --target cuda .      the same with CuPy and NVRTC; the driver comes from the machine
# docker run -v VOC:/data -v runs:/runs segnet     evaluates /data/model.safetensors, or trains: docs/how-to/container.md
#
# .ci/container.py carries these instructions out in fresh Debian roots, without Docker. Debian's packages are those of its stable
# release and libraries those that pyproject.toml allows, so neither has its version repeated here.
# hadolint global ignore=DL3008,DL3013

FROM debian:bookworm-slim AS base
# g++ compiles the kernels of the host device. Any user may write to the volumes: docker run --user.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --no-create-home segnet \
    && mkdir -m 1777 /cache /runs
ENV PATH=/opt/segnet/bin:$PATH HOME=/cache SEGNET_CACHE=/cache PYTHONUNBUFFERED=1

FROM base AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/segnet
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir '.[report]'

FROM build AS build-cuda
RUN pip install --no-cache-dir '.[cuda13]'

FROM base AS run
COPY --chmod=755 container/entry /usr/local/bin/segnet-container
USER 1000
WORKDIR /runs
VOLUME /cache /runs
ENTRYPOINT ["segnet-container"]

FROM run AS cuda
COPY --from=build-cuda /opt/segnet /opt/segnet
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM run AS cpu
COPY --from=build /opt/segnet /opt/segnet
