# Every target does its own set-up: nothing but make and a Python >= 3.11 is needed.
#
#   PYTHON=python3.12   the interpreter to work with
#   ARGS="..."          further arguments of `make demo`, `test`, `bench`, `proof`, `model` and `mutants`
#   JOBS=1              how many processes `make test` runs tests in; each has hosts and machines of its own
#   STRIDE=1            each so many-th first fault of two, of `make simulation`
#   STORMS=2000         how many of them `make simulation` does
#   VMFERRY_REQUIRE=all what the machine does not offer fails instead of being left out (CI)

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
STRIDE ?= 8
STORMS ?= 500
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo playground test bench proof model simulation mutants image e2e-containers check \
        check-style check-types check-protos \
        check-guests check-contract format protos guests lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## Make .venv, or bring it up to date (all targets below do this first)
	@$(PYTHON) -I scripts/setup_env.py

demo: setup ## Move a running guest from one service to another and show what happened
	@$(BIN)/vmferry demo $(ARGS)

playground: setup ## Run two hosts and a machine to try things on, until Ctrl-C (needs ./playground empty or absent)
	@$(BIN)/vmferry playground $(ARGS)

test: setup ## Run every test this machine allows; the summary names what is left out, and why
	@$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=worksteal $(ARGS)

bench: setup ## Compare with QEMU's own migration, in turn; ARGS="--all", "--guest idle --runs 1", ...
	@$(BIN)/python -m benchmarks.compare $(ARGS)

proof: setup ## Run the evidence for the hand-off, and end with a table of its figures; ARGS="--quick"
	@$(PYTHON) -I scripts/setup_env.py spin gcc
	@$(BIN)/python scripts/proof.py $(ARGS)

model: setup ## Explore the specification of the hand-off, whole and without its guards; ARGS="--quick"
	@$(PYTHON) -I scripts/setup_env.py spin gcc
	@$(BIN)/python -m models $(ARGS)

simulation: setup ## Strike the services with every fault at every boundary, with two, and with storms of them
	@$(BIN)/python -m tests.simulation.campaign one-fault
	@$(BIN)/python -m tests.simulation.campaign two-faults --stride $(STRIDE)
	@$(BIN)/python -m tests.simulation.campaign storms --count $(STORMS)

mutants: setup ## Take each guard and each sync from the hand-off's core: some suite must notice
	@$(BIN)/python scripts/mutants.py $(ARGS)

image: setup ## Build the container image (needs root and podman); ARGS="--tag NAME"
	@$(BIN)/python scripts/image.py $(ARGS)

e2e-containers: setup ## Build the image, and move guests between two containers whose plugs are pulled (root, podman)
	@VMFERRY_REQUIRE=all $(BIN)/python -m pytest tests/containers $(ARGS)

check: check-style check-types check-protos check-guests check-contract ## Run all checks that need no test to run

check-style: setup ## Lint, and check the formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

check-types: setup ## Check the types, strictly
	@$(BIN)/mypy
	@$(BIN)/mypy scripts
	@$(BIN)/mypy examples

check-protos: setup ## Check that vmferry/v1 is what protos/ says
	@$(BIN)/python scripts/gen_protos.py --check

check-guests: setup ## Check that the guest programs are what their sources say
	@scripts/if-installed "the drift of guest programs" binutils as objcopy -- \
	  $(BIN)/python -m vmferry.machines.microvm.guests.build --check

check-contract: ## Lint the contract in protos/
	@scripts/if-installed "the lint of protos/" "nodejs and npm" node npm -- scripts/buf lint

format: setup ## Format the code, and mend what can be mended automatically
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

protos: setup ## Generate vmferry/v1 from protos/
	@$(BIN)/python scripts/gen_protos.py

guests: setup ## Assemble the guest programs
	@$(BIN)/python -m vmferry.machines.microvm.guests.build

lock: ## Rewrite constraints.txt with the newest versions pyproject.toml allows
	@$(PYTHON) -I scripts/lock.py

clean: ## Remove everything that make made
	@rm -rf .venv .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	@find vmferry source_svc dest_svc models tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
