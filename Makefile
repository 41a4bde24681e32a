# Every target that needs packages goes through .venv/.ready, which is made once and costs nothing
# after that. An installed Detectron2 is kept: see docs/dependencies.md.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
TEST_WORKERS ?= 2
ARGS ?=
COMPILE := uv pip compile --quiet --universal --python-version 3.10 --annotation-style line \
	--custom-compile-command "make requirements"

.DEFAULT_GOAL := help
.PHONY: help demo benchmark web test test-all test-isa soak lint docs gpu ablation ablation-smoke clean distclean requirements shapes-checkpoint

help:  ## list the targets
	@echo "make <target> [PYTHON=python3] [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):[^#]*## *\(.*\)/  \1\t\2/p' Makefile | expand -t 22

demo: $(READY)  ## evaluate the shipped checkpoint, fine-tune it, draw detections: output/demo/
	$(RUN) tools/run_demo.py $(ARGS)

web: $(READY)  ## show the shipped detector on a page in the browser: docs/web.md
	$(RUN) -m detection_toolkit.web $(ARGS)

# One thread a worker: PyTorch would start one a core in each of them.
TEST = OMP_NUM_THREADS=1 $(RUN) -m pytest tests -n $(TEST_WORKERS) --dist loadscope --durations=15 $(ARGS)

test: $(READY)  ## run the tests but for slow ones; ARGS="-k matcher" chooses some
	$(TEST) -m "not slow"

test-all: $(READY)  ## run all tests, as CI does
	$(TEST)

# Instruction sets add in different orders. These keep PyTorch's own kernels, or oneDNN's, from using
# the best one that the processor has, so that the tests round as on an older one.
ISA ?= avx2
ISA_default := ATEN_CPU_CAPABILITY=default
ISA_avx2 := ATEN_CPU_CAPABILITY=avx2
ISA_onednn := ONEDNN_MAX_CPU_ISA=AVX2

test-isa: $(READY)  ## run the tests with other instructions, ISA=avx2, default or onednn
	$(or $(ISA_$(ISA)),$(error ISA=$(ISA) is none of avx2, default, onednn)) $(TEST)

# One process at a time, of one thread: two cores are enough.
soak: $(READY)  ## kill runs, fill disks, damage files, many times; ends with a table (half an hour)
	PYTHONPATH=tests:$$PYTHONPATH OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(RUN) tests/faults/soak.py $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs: $(READY)  ## build the documentation as a site, warnings are errors: output/site/
	rm -rf output/site output/doctrees
	OMP_NUM_THREADS=1 $(RUN) -m sphinx -q -W --keep-going -c docs -d output/doctrees $(ARGS) . output/site

PLAN ?= ablations/shapes_hard.yaml

ablation: $(READY)  ## compare variants over seeds, PLAN=ablations/....yaml (hours): docs/results.md
	$(RUN) tools/run_ablation.py --plan $(PLAN) $(ARGS)

ablation-smoke: $(READY)  ## two cells of a few steps, compared
	rm -rf output/ablations/smoke
	$(RUN) tools/run_ablation.py --plan ablations/smoke.yaml $(ARGS)

benchmark: $(READY)  ## time all against plain forms (ten minutes; ARGS=--quick: one): docs/performance.md
	$(RUN) -m benchmarks $(ARGS)

gpu: $(READY)  ## check and measure on a GPU, one report in output/gpu/ (8 minutes): docs/performance.md
	$(RUN) tools/gpu_report.py $(ARGS)

shapes-checkpoint: $(READY)  ## train the shipped checkpoint from scratch (long)
	$(RUN) tools/make_shapes_checkpoint.py $(ARGS)

# Pins that still suit are kept; remove the .txt first to take the newest of everything.
requirements:  ## compile requirements/*.txt from *.in, for all Python versions (needs uv)
	$(COMPILE) requirements/runtime.in -o requirements/runtime.txt
	$(COMPILE) --override requirements/provided.in requirements/dev.in -o requirements/dev.txt

clean:  ## remove builds and caches; keeps .venv and output/
	rm -rf dist projects/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean  ## also remove .venv
	rm -rf $(VENV)

$(READY): $(wildcard requirements/*) setup.py pyproject.toml tools/setup_env.py
	$(PYTHON) tools/setup_env.py --venv $(VENV)
