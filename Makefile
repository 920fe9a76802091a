# `make` lists the targets. Everything lives in .venv; nothing is installed outside this folder.

# What `make setup` installs beside the library. Add slurm or quant with EXTRAS=notebooks,sweep,report,tasks,dev,quant.
EXTRAS ?= notebooks,sweep,report,tasks,dev
# Where torch comes from, when it should not come from PyPI: TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH := $(shell grep '^torch==' constraints.txt)

SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c '$(SUITABLE)' 2>/dev/null && { command -v $$p; break; }; done)
endif

BIN := .venv/bin
STAMP := .venv/.installed-$(EXTRAS)
# All cores of the machine; CORES=2 leaves others free. More options of Snakemake's: make demo SNAKEMAKE="-n"
CORES ?= all
SWEEP = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakemake --cores $(CORES) $(SNAKEMAKE) --configfile

.DEFAULT_GOAL := help
.PHONY: help setup demo reference report test smoke readme lint format constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it (needs Python 3.11-3.13, pip, make)
	@echo "Ready. To use it by hand: source .venv/bin/activate"

demo: $(STAMP) ## run every notebook on what is in the box (params/demo.yaml), then make the report
	$(SWEEP) params/demo.yaml
	$(MAKE) report

reference: $(STAMP) ## run the study at full size into results/reference (hours, resumable; KVNEOX_TEXTS=<folder>)
	$(BIN)/python tools/pack.py --unpack results/reference
	$(SWEEP) params/reference.yaml; done=$$?; $(BIN)/python tools/pack.py results/reference; exit $$done

test: $(STAMP) ## run all tests, the slow ones too
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

smoke: $(STAMP) ## check the adapter against the stock model, and generate a few tokens
	$(BIN)/python -m kvneox_lib verify --smoke

report: $(STAMP) ## render report/ from the records: HTML, PDF and docx with Quarto, without it a preview
	@export PATH="$(CURDIR)/$(BIN):$$PATH" QUARTO_PYTHON="$(CURDIR)/$(BIN)/python"; \
	if command -v quarto >/dev/null; then quarto render report; else \
		echo "Quarto (1.7 or newer) is not installed: conda env create -f environment.yml brings it, or https://quarto.org/docs/download"; \
		echo "Without it: a preview in one HTML file; no PDF, no docx, nothing of Quarto's layout and navigation:"; \
		python report/preview.py; fi

lint: $(STAMP) ## check style, and that no notebook carries outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call for_notebooks,--verify)

format: $(STAMP) ## put that in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(call for_notebooks,)

readme: $(STAMP) ## put current tables and pictures into the READMEs and docs/
	$(BIN)/python tools/readme.py

constraints: | $(BIN)/pip ## pin the newest versions that fit, for all Pythons and platforms; torch stays
	$(BIN)/python -m pip install --quiet uv
	grep '^torch==' constraints.txt > .venv/torch.txt
	$(BIN)/uv pip compile --quiet --universal --fork-strategy fewest --python-version 3.11 --all-extras \
		--default-index "$${PIP_INDEX_URL:-https://pypi.org/simple}" --constraints .venv/torch.txt \
		--no-header --no-annotate pyproject.toml > .venv/resolved.txt
	@{ grep '^#' constraints.txt; grep -vE '^(nvidia-|cuda-|triton==)' .venv/resolved.txt; } > .venv/constraints.txt
	mv .venv/constraints.txt constraints.txt

clean: ## remove .venv, caches and build output (results/ stays)
	rm -rf .venv .pytest_cache .ruff_cache .snakemake build dist *.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

define for_notebooks
find . \( -path './.*' -o -path ./results -o -name .ipynb_checkpoints \) -prune -o -name '*.ipynb' \
	-exec $(BIN)/nbstripout --keep-id $(1) {} +
endef

# Some systems ship Python without ensurepip; pip can then install itself from outside.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(SUITABLE)' || { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@echo "$(PYTHON) makes .venv"; $(PYTHON) -m venv --clear .venv || { \
		$(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install pip; }

# torch goes first, so that nothing else picks a build of it. An index of torch alone lacks its dependencies in the
# pinned versions: they come with the second command.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/pip
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install --no-deps --index-url "$(TORCH_INDEX)" "$(TORCH)"
else
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
		echo "No NVIDIA GPU found. If pip now fetches gigabytes of CUDA libraries, stop it and take the CPU build instead:"; \
		echo "  make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu"; fi
	$(BIN)/python -m pip install -c constraints.txt "$(TORCH)"
endif
	$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
