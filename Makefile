# Each target sets itself up. PYTHON=python3.12 chooses the interpreter, ARGS="..." goes to the command that a target
# runs, TORCH_INDEX=... chooses another build of torch (endprompt/install.py), SETUP=no uses PYTHON as it is, for
# containers that have everything installed.

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak bench lint arms
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
SETUP ?= yes
export TORCH_INDEX

ifeq ($(SETUP),no)
PY := $(PYTHON)
SHELLCHECK := shellcheck
READY :=
else
PY := .venv/bin/python
SHELLCHECK := .venv/bin/shellcheck
READY := .venv/.ready
endif

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r target text; do \
		printf '%-14s %s\n' "$$target" "$$text"; done

.venv/.ready: requirements.txt requirements/base.txt requirements/dev.txt requirements/constraints.txt endprompt/install.py
	@$(PYTHON) tools/set_up.py
	@touch $@

setup: $(READY) ## make .venv with everything that CPU and GPU runs need
	@echo "ready: $(PY)"

demo: $(READY) ## extend a real checkpoint from 8K to 64K and show before and after
	@$(PY) tools/demo.py $(ARGS)

# Two workers, a file each: most of the tests wait for processes of their own. One file by itself: .venv/bin/python -m pytest FILE
test: $(READY) ## run the tests
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(READY) ## run the long tests on a SLURM cluster: twenty kills, time limit, hanging ranks
	@SOAK=1 $(PY) -m pytest tests/slurm/test_soak.py --timeout=3600 -s $(ARGS)

bench: $(READY) ## measure speed and memory against the ordinary ways
	@$(PY) benchmarks/run.py $(ARGS)

arms: $(READY) ## compare position schemes and RoPE scalings at full size (needs a GPU; hours on a CPU)
	@$(PY) tools/fetch_assets.py
	@$(PY) tools/prepare_data.py --tokenizer assets/SmolLM2-135M-Instruct --output data/smollm2 --validation-documents 8 \
		--input $$(ls assets/text/*.txt | grep -v moby-dick)
	@$(PY) tools/compare_arms.py --recipe recipes/smollm2_135m_64k.yaml --output runs/arms --text assets/text/moby-dick.txt $(ARGS)

lint: $(READY) ## check Python with ruff and shell scripts with shellcheck
	@$(PY) -m ruff check --quiet .
	@$(SHELLCHECK) --severity=warning --external-sources --check-sourced .ci/run slurm/lib/rank.sh $(wildcard slurm/*.sh)
