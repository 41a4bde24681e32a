# syntax=docker/dockerfile:1
# StageInteractor in a container; docs/dependencies.md says how to build and run it.
#
#     docker build --target cpu -t stageinteractor:cpu .
#     docker build --target cuda -t stageinteractor:cuda .

ARG PYTHON=3.11

# -- the wheel, from the sources, without what builds it -----------------------------------------
FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir "$(grep -o '^hatchling==[0-9.]*' requirements/dev.txt)" \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

# -- what both have: pinned packages but for PyTorch, and Detectron2 as a wheel ------------------
FROM python:${PYTHON}-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 \
    DETECTRON2_DATASETS=/data
COPY requirements/runtime.txt requirements/detectron2.txt /requirements/
# A few pinned packages exist as source only: the pinned setuptools builds them.
RUN pip install --no-cache-dir "$(grep -o '^setuptools==[0-9.]*' /requirements/runtime.txt)" \
    && pip install --no-cache-dir --no-build-isolation -r /requirements/runtime.txt \
    && pip install --no-cache-dir --no-deps --only-binary=:all: --python-version 3.10 \
        --target "$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" \
        --require-hashes -r /requirements/detectron2.txt
RUN useradd --create-home --uid 1000 detect && mkdir /data /workspace && chown 1000 /data /workspace
WORKDIR /workspace

# -- for a CPU: PyTorch's own index has builds without CUDA --------------------------------------
# The project comes last, here and below: what changes most often keeps the large layers.
FROM base AS cpu
COPY requirements/torch.txt /requirements/
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
        --extra-index-url https://pypi.org/simple -r /requirements/torch.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl
USER 1000
ENTRYPOINT ["stageinteractor"]
CMD ["--help"]

# -- for a GPU: PyPI's build of PyTorch brings CUDA; the host has the driver ---------------------
FROM base AS cuda
COPY requirements/torch.txt /requirements/
RUN pip install --no-cache-dir -r /requirements/torch.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl
USER 1000
ENTRYPOINT ["stageinteractor"]
CMD ["--help"]
