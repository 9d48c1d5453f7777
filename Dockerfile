# The workflow with all it needs, for the CPU and for NVIDIA GPUs; docs/deployment.md says how to call it.
# This file has never been built: no machine with a container engine and an image registry was at hand.
#
#   docker build -t mmfm .
#   docker build -t mmfm --build-arg EXTRA_INDEX=https://download.pytorch.org/whl/cpu .    without CUDA, a tenth in size
FROM python:3.11-slim-bookworm

ARG EXTRA_INDEX=""

# The base image has no CUDA: PyTorch's wheels bring it, and the driver comes from the machine. Caches go to /tmp, because
# the user that runs the container need not have a home in it.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache

# Compiled models (train.compile, sample.compile) need a C compiler at run time.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mmfm

# Dependencies in a layer of their own, which a change of the code leaves alone.
COPY pyproject.toml README.md LICENSE requirements.txt ./
RUN mkdir -p src/mmfm && touch src/mmfm/__init__.py \
    && PIP_EXTRA_INDEX_URL="$EXTRA_INDEX" pip install -c requirements.txt -e .

COPY Snakefile ./
COPY config config
COPY envs envs
COPY profiles profiles
COPY resources resources
COPY rules rules
COPY src src
COPY workflow workflow

RUN useradd --no-create-home mmfm && mkdir /work && chown mmfm /work
USER mmfm
WORKDIR /work

CMD ["snakemake", "-s", "/opt/mmfm/Snakefile", "-n"]
