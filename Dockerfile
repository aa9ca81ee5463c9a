# histossl in a container: the torch wheels bring CUDA, so a slim Python image is all it needs.
#
#   docker build -t histossl .
#   docker run --rm --gpus all --shm-size 2g -v "$PWD/slides:/slides:ro" -v histossl-work:/workspace histossl \
#       pretrain --slides /slides
#
# Build arguments:
#   BASE_IMAGE     any Debian or Ubuntu image with python3 (3.11 or newer) and its venv module
#   PIP_ARGS       further arguments for pip, say an index of your own
#   EXTRAS         optional dependencies by their names in pyproject.toml, comma-separated: dask
#   TIMM_MODELS    timm names, space-separated, whose ImageNet weights are baked in, for machines without internet

ARG BASE_IMAGE=python:3.12-slim-bookworm
FROM ${BASE_IMAGE}

# Dependencies first: a change in the code rebuilds none of these gigabytes.
ARG PIP_ARGS=""
ARG EXTRAS=""
ENV PATH=/opt/histossl/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml /opt/src/
RUN python3 -m venv /opt/histossl \
    && python -c "import os, tomllib; \
project = tomllib.load(open('/opt/src/pyproject.toml', 'rb'))['project']; \
extras = [name for name in os.environ['EXTRAS'].split(',') if name]; \
print(*project['dependencies'], *(line for name in extras for line in project['optional-dependencies'][name]), sep='\n')" \
        > /opt/src/requirements.txt \
    && pip install ${PIP_ARGS} -r /opt/src/requirements.txt

# The hub's cache. A fresh volume on it starts with what is baked in; an empty folder mounted over it hides that.
ARG TIMM_MODELS=""
ENV HF_HOME=/hf
RUN mkdir -p /hf /workspace \
    && for name in ${TIMM_MODELS}; do \
        python -c "import sys, timm; timm.create_model(sys.argv[1], pretrained=True, num_classes=0)" "$name" || exit 1; \
    done \
    && chmod -R a+rwX /hf && chmod 1777 /hf /workspace

COPY LICENSE README.md /opt/src/
COPY histossl /opt/src/histossl
RUN pip install ${PIP_ARGS} setuptools && pip install ${PIP_ARGS} --no-deps --no-build-isolation /opt/src

# Any user may run it, also one without a name or a home (--user 1234:1234): what libraries want to write goes to /tmp.
ENV HISTOSSL_WORKSPACE=/workspace \
    HOME=/tmp \
    USER=histossl \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/hf", "/workspace"]
WORKDIR /workspace
USER 1000:1000
ENTRYPOINT ["histossl"]
CMD ["--help"]
