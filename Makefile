# `make` or `make help` lists the targets. Serving and testing have an environment each: the first has no torch.

# A measurement that fails fails its target, though its output goes through tee.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

SERVE := .venv-serve
TEST := .venv
TRITON := .venv-triton
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
# Of the tests; each is kept to cores of its own (tests/conftest.py).
WORKERS ?= 2

# The first of these that is at least 3.11 builds the environments; PYTHON=… overrides.
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
endif
PIP = -m pip --disable-pip-version-check install --quiet --progress-bar off --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help serve test triton kernels gpu-acceptance check readme model figures figures-engines figures-training load fuzz clean lock python

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

serve: $(SERVE)/.installed ## install what serving needs (once) and serve on http://127.0.0.1:8000; PORT=… HOST=… ARGS='--flag …'
	$(SERVE)/bin/cdm-serve --host $(HOST) --port $(PORT) $(ARGS)

test: $(TEST)/.installed $(TRITON)/.installed ## install everything (once) and run the tests; ARGS='-k …'
	$(TEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

triton: $(TRITON)/.installed ## install Triton Inference Server's wheel, for its tests and cdm-bench triton

kernels: $(TEST)/.installed ## compile the GPU kernels for every GPU generation; needs no GPU
	$(BIN)/python -m engines.kernels.compile

gpu-acceptance: $(TEST)/.installed ## on a machine with a GPU: build, check and time everything, write a report (docs/gpu.md); ARGS='--size medium'
	$(BIN)/cdm-bench gpu-acceptance --out $(RUNS)/gpu-acceptance $(ARGS)

check: $(TEST)/.installed ## ruff, mypy --strict, layout rules, hadolint, shellcheck
	PATH="$(CURDIR)/$(TEST)/bin:$$PATH" scripts/check

lock: | python ## write constraints.txt anew: the newest versions that all extras agree on
	$(PYTHON) scripts/lock.py

readme: $(TEST)/.installed ## write the tables of settings and figures in the README and docs/ anew
	$(TEST)/bin/python scripts/readme.py

# Hours of training: every command resumes where it was stopped.
BIN = $(TEST)/bin
RUNS ?= runs
model: $(TEST)/.installed ## train a model like the bundled one from nothing and export it (hours; resumes)
	$(BIN)/cdm-train emoji-data
	$(BIN)/cdm-train emoji-autoencoder --threads 2 --out $(RUNS)/autoencoder
	$(BIN)/cdm-train emoji-teacher --threads 2 --vae $(RUNS)/autoencoder/vae --out $(RUNS)/teacher
	$(BIN)/cdm-train emoji-cdm --threads 2 --teacher $(RUNS)/teacher/model --out $(RUNS)/emoji-cdm
	$(BIN)/cdm-export $(RUNS)/emoji-cdm/student --out cdm_serve/bundles/emoji --name emoji

TEACHER ?= training/assets/teacher
RESULTS = benchmarks/results
SAME = --count 400 --diversity-prompts 16 --threads 2
figures: $(TEST)/.installed ## measure what the README quotes, on an otherwise idle machine (about 20 minutes)
	$(BIN)/cdm-train evaluate $(TEACHER) $(SAME) --steps 4,50 --guidance 4 --name teacher --out $(RESULTS)/quality-teacher.json
	$(BIN)/cdm-train evaluate $(RUNS)/emoji-cdm/student $(SAME) --steps 1,2,3,4,6,8 --no-baselines --name student --record \
		--out $(RESULTS)/quality-student.json
	$(BIN)/cdm-train samples --teacher $(TEACHER) --student $(RUNS)/emoji-cdm/student --out docs/samples.png \
		--row docs/samples-row.png
	$(BIN)/cdm-bench engine --bundle cdm_serve/bundles/emoji --student $(RUNS)/emoji-cdm/student --teacher $(TEACHER) \
		--threads 2 --rounds 24 | tee $(RESULTS)/engine.txt
	$(BIN)/cdm-bench engine --bundle cdm_serve/bundles/emoji --student $(RUNS)/emoji-cdm/student --precision f32 --rounds 3 | \
		tee $(RESULTS)/engine-f32.txt
	$(BIN)/cdm-bench http | tee $(RESULTS)/http.txt
	$(BIN)/cdm-bench invariance --rounds 8 | tee $(RESULTS)/invariance.txt
	$(BIN)/cdm-bench coldstart --runs 5 --install | tee $(RESULTS)/coldstart.txt
	$(BIN)/python scripts/readme.py

SCALE = $(RUNS)/scale
STEPS = $(BIN)/cdm-bench steps --threads 2
figures-engines: $(TEST)/.installed ## measure what docs/engines.md quotes, on an otherwise idle machine (an hour; 20 GB of memory)
	$(BIN)/python -c "from pathlib import Path; from benchmarks.random_sd3 import build_random_sd3 as build; build(Path('$(SCALE)/75m'), '75m')"
	$(BIN)/python -c "from pathlib import Path; from benchmarks.random_sd3 import build_random_sd3 as build; build(Path('$(SCALE)/medium'), 'medium')"
	$(BIN)/cdm-export $(SCALE)/75m --out $(SCALE)/75m-bundle --sizes 256x256
	$(BIN)/cdm-export $(SCALE)/medium --out $(SCALE)/medium-bundle --sizes 512x512 --batches 1 --verify openvino:bf16
	$(STEPS) --bundle cdm_serve/bundles/emoji --student $(RUNS)/emoji-cdm/student --rounds 12 | tee $(RESULTS)/steps-emoji.txt
	$(STEPS) --bundle $(SCALE)/75m-bundle --student $(SCALE)/75m --rounds 8 --converted $(RUNS)/genai-75m | tee $(RESULTS)/steps-75m.txt
	$(STEPS) --bundle $(SCALE)/medium-bundle --student $(SCALE)/medium --batches 1 --rounds 4 --apart --no-pictures \
		--contenders ours,genai,compile-bf16,diffusers-bf16 --converted $(RUNS)/genai-medium | tee $(RESULTS)/steps-medium.txt
	$(BIN)/cdm-bench roofline --bundle cdm_serve/bundles/emoji --student $(RUNS)/emoji-cdm/student --batches 1,8 --threads 2 | tee $(RESULTS)/roofline-emoji.txt
	$(BIN)/cdm-bench roofline --bundle $(SCALE)/75m-bundle --student $(SCALE)/75m --batches 1,4 --threads 2 | tee $(RESULTS)/roofline-75m.txt
	$(BIN)/cdm-bench roofline --bundle $(SCALE)/medium-bundle --student $(SCALE)/medium --batches 1 --rounds 4 --threads 2 | tee $(RESULTS)/roofline-medium.txt
	$(BIN)/cdm-bench rewrites --longcat 2 --size 512x512 --threads 2 --rounds 6 --work $(RUNS)/rewrites | tee $(RESULTS)/rewrites-2.txt
	$(BIN)/cdm-bench rewrites --longcat 8 --size 512x512 --threads 2 --rounds 6 --work $(RUNS)/rewrites | tee $(RESULTS)/rewrites-8.txt
	$(BIN)/cdm-bench student --bundle cdm_serve/bundles/emoji --threads 2 --rounds 20 | tee $(RESULTS)/student-emoji.txt
	$(BIN)/cdm-bench student --bundle $(SCALE)/75m-bundle --threads 2 --rounds 5 | tee $(RESULTS)/student-75m.txt
	$(BIN)/cdm-bench build --student $(RUNS)/emoji-cdm/student --runs 5 --threads 2 | tee $(RESULTS)/build-emoji.txt
	$(BIN)/cdm-bench build --student $(SCALE)/75m --sizes 256x256 --runs 3 --threads 2 | tee $(RESULTS)/build-75m.txt
	$(BIN)/cdm-bench build --student $(SCALE)/medium --sizes 512x512 --batches 1 --verify openvino:bf16 --engines openvino:bf16 \
		--runs 1 --threads 2 | tee $(RESULTS)/build-medium.txt
	$(BIN)/cdm-bench bundle --bundle cdm_serve/bundles/emoji --student $(RUNS)/emoji-cdm/student --prompts 60 --threads 2 | \
		tee $(RESULTS)/bundle-emoji.txt
	$(BIN)/python scripts/readme.py

figures-training: $(TEST)/.installed ## the evidence of docs/training.md and docs/planning.md (many hours; resumes)
	$(BIN)/cdm-bench ablation --teacher $(TEACHER) --out $(RUNS)/ablation --steps 500 --seeds 0,1,2 --plot docs/ablation.png \
		| tee $(RESULTS)/ablation.txt
	$(BIN)/cdm-bench finetune --teacher $(TEACHER) --student $(RUNS)/emoji-cdm/student --out $(RUNS)/finetune \
		| tee $(RESULTS)/finetune.txt
	$(BIN)/cdm-bench training --teacher $(TEACHER) --n-max 28 --rounds 16 | tee $(RESULTS)/training.txt
	$(BIN)/cdm-bench training --teacher $(TEACHER) --n-max 28 --rounds 16 --savings | tee $(RESULTS)/training-savings.txt
	$(BIN)/cdm-bench plan | tee $(RESULTS)/plan.txt
	$(BIN)/cdm-bench plan --blocks | tee $(RESULTS)/plan-blocks.txt
	$(BIN)/python scripts/readme.py

SWEEP = --slo-ms 250,1000 --rates 14,42,56,70,85,110 --duration 8 --warmup 2
SIMULATED = --slo-ms 250,1000 --rates 0.1x,0.2x,0.3x,0.4x,0.5x,0.6x,0.7x,0.8x,0.9x,1x,1.1x,1.2x,1.4x,1.6x,1.8x,2x,2.2x,2.4x --duration 30 --seed 20
load: $(TEST)/.installed ## the policies under load: real servers, a simulated GPU-like one, half an hour of overload (an hour, idle machine)
	$(BIN)/cdm-bench serve $(SWEEP) --rounds 3 --out $(RUNS)/load | tee $(RESULTS)/serve.txt
	$(BIN)/cdm-bench simulate $(SIMULATED) --costs gpu-like --steps 4 | tee $(RESULTS)/simulate-gpu.txt
	$(BIN)/cdm-bench simulate $(SIMULATED) --costs gpu-like --steps 1,2,4,8 | tee $(RESULTS)/simulate-gpu-mixed.txt
	$(BIN)/cdm-bench soak --minutes 30 --load 1.2 --out $(RUNS)/soak | tee $(RESULTS)/soak.txt
	cp $(RUNS)/load/goodput.png docs/load.png
	cp $(RUNS)/soak/vitals.png docs/soak.png
	$(BIN)/python scripts/readme.py

fuzz: $(TEST)/.installed ## Schemathesis against the served API, deep (an hour)
	FUZZ_EXAMPLES=3000 $(BIN)/python -m pytest tests/cdm_serve/test_schemathesis.py

clean: ## remove environments, caches and build output (never data/ and runs/)
	rm -rf $(SERVE) $(TEST) $(TRITON) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find cdm_serve engines training benchmarks tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@$(or $(PYTHON),false) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
	echo "No Python 3.11 or newer with venv was found$(if $(PYTHON), at PYTHON=$(PYTHON)). Install one (Debian:" \
	"apt-get install python3 python3-venv) or name it: make serve PYTHON=python3.12" >&2; exit 1; }

$(SERVE)/.installed: pyproject.toml constraints.txt | python
	$(PYTHON) -m venv --clear $(SERVE)
	$(SERVE)/bin/python $(PIP) --editable '.[openvino]'
	@touch $@

# The server's wheel is for one platform: where it cannot be installed, its tests are skipped and say so.
$(TRITON)/.installed: Makefile | python
	@test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	-$(TRITON)/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off --no-deps nvidia-pytriton==0.7.0 \
		&& touch $@

$(TEST)/.installed: pyproject.toml constraints.txt | python
	@test -x $(TEST)/bin/python || $(PYTHON) -m venv $(TEST)
	$(TEST)/bin/python $(PIP) --editable '.[dev]'
	@touch $@
