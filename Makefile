# Every target sets up .venv by itself: `make demo` on a fresh machine needs Python >= 3.11 and nothing else.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
# The first of these that runs and is new enough.
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python,$(shell $(name) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(name))))

.PHONY: demo test check slow bench clean

demo: $(READY)  ## Images to autoencoder to latents to diffusion to pipeline, and runs/demo/report.html
	$(BIN)/firststage train_autoencoder --config configs/autoencoder/demo.yaml --out runs/demo/autoencoder
	$(BIN)/firststage encode_dataset --config configs/latents/demo.yaml --model runs/demo/autoencoder --out runs/demo/latents
	$(BIN)/firststage train_diffusion --config configs/diffusion/demo.yaml --latents runs/demo/latents --out runs/demo/diffusion
	$(BIN)/firststage report runs/demo/autoencoder runs/demo/diffusion --out runs/demo/report.html
	@echo "Open $(CURDIR)/runs/demo/report.html"

test: check  ## Lint, types and all tests, a process a core
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: $(READY)  ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/mypy

slow: $(READY)  ## The tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout 3600

bench: $(READY)  ## Benchmarks, against their baselines, and docs/performance.md
	@for file in $(filter-out benchmarks/performance.py,$(sort $(wildcard benchmarks/*.py))); do echo "$(BIN)/python $$file"; $(BIN)/python $$file || exit 1; done
	@$(BIN)/python benchmarks/performance.py

clean:  ## Remove .venv and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { echo "error: $(PYTHON) is older than Python 3.11; give another: make PYTHON=/path/to/python3" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
