# The commands that README, CONTRIBUTING and CI use. They need Python 3.11 or newer, a C++ compiler and PyPI, nothing else.

PYTHON ?= python3
BIN := .venv/bin
MADE := .venv/.made
LINKS := .links/.made
PACKAGES := benchmarks calibration evaluation exporters optimizer passes runtime
TEST := out/test
# A file's tests stay in one process, which shares what their fixtures make.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1
export TQDM_DISABLE := 1

.DEFAULT_GOAL := help
.PHONY: help demo lora-demo test test-env check fix docs dev bench clean

help:  ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(MADE)  ## Build SmolLM2, ask it a question through the server, print accuracy and speed
	$(BIN)/python -m llmopt.benchmarks.demo

# DATA as for bench: what the adapter's training costs other text is measured on it too.
lora-demo: $(MADE)  ## Train an adapter, build it merged (float, int8, int4) and modular, compare each with PEFT's own model
	$(BIN)/python -m llmopt.benchmarks.lora_demo $(if $(DATA),--data '$(DATA)')

test: check test-env  ## What CI runs: check, then build the wheel and test what it installs
	PYTHONSAFEPATH=1 LLMOPT_TEST_INSTALLED=1 $(TEST)/env/bin/python -m pytest -q $(PARALLEL)

check: $(MADE) $(LINKS)  ## Formatting, lint, types and generated documentation; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy docs/generate.py
	$(BIN)/python docs/generate.py --check

fix: $(MADE)  ## Format, repair what lint can repair, regenerate documentation
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python docs/generate.py

docs: $(MADE)  ## Regenerate the reference pages
	$(BIN)/python docs/generate.py

dev: $(MADE) $(LINKS)  ## Environment for developing: editable install, links for editors, pre-commit hook
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/pre-commit install; fi

# DATA is a text, such as WikiText-2's wiki.valid.tokens; without it the texts are sampled from the model.
bench: $(MADE)  ## Compare with onnxruntime-genai, measure accuracy, start and build: make bench DATA=wiki.valid.tokens
	$(BIN)/python -m llmopt.benchmarks.suite $(if $(DATA),--data '$(DATA)')

clean:  ## Remove builds, environments and caches, but not downloaded models
	rm -rf out build dist *.egg-info .links .venv .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# setuptools and wheel come first because the package is built without isolation, that is with these very versions.
$(MADE): pyproject.toml constraints.txt
	@echo "making .venv (the first time takes a few minutes: torch is large)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmopt needs Python 3.11 or newer")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -c constraints.txt setuptools wheel
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[cpu,serve,dev]'
	@touch $@

# mypy and editors look for the folder X as llmopt.X, and find it here.
$(LINKS): pyproject.toml
	@mkdir -p .links/llmopt
	@for folder in $(PACKAGES); do ln -sfn ../../$$folder .links/llmopt/$$folder; done
	@touch $@

# An environment of its own for the wheel, made in a second: it sees the dependencies installed in .venv through a path
# file, but not the editable llmopt there, because Python does not read the path files of a folder added that way.
test-env: $(MADE)
	rm -rf $(TEST) && mkdir -p $(TEST)
	$(BIN)/python -m build --no-isolation --outdir $(TEST)/dist . >$(TEST)/build.log 2>&1 || { tail -20 $(TEST)/build.log; exit 1; }
	$(BIN)/python -m venv --without-pip $(TEST)/env
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(TEST)/env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(BIN)/python -m pip --python $(TEST)/env/bin/python install -qq --no-deps --force-reinstall $(TEST)/dist/*.whl
