# Everything from a fresh clone: make demo, make test. Needs Python >= 3.10, make and git.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test slow browser gpu network lint types bench figures families notebooks check

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $@

demo: $(INSTALLED)          ## prune code, prose and random neurons out of the embedded model (under 6 minutes)
	$(BIN)/sepcap prune

test: $(INSTALLED)          ## fast tests (five to ten minutes on two cores)
	$(BIN)/python -m pytest -n auto

slow: $(INSTALLED)          ## tests that take minutes, notebooks included
	$(BIN)/python -m pytest -m slow

browser network: $(INSTALLED)
	$(BIN)/python -m pytest -m $@ || test $$? -eq 5

gpu: $(INSTALLED)           ## core tests and benchmarks on a CUDA device, where there is one
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python -m pytest -m gpu && $(BIN)/python benchmarks/ratios.py --device cuda; \
	else echo "make gpu: torch sees no CUDA device here, so nothing was run"; fi

lint: $(INSTALLED)
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/pyright

bench: $(INSTALLED)         ## speed and memory as ratios; run it with nothing else running
	$(BIN)/python benchmarks/ratios.py

figures: $(INSTALLED)       ## the pictures in figures/
	$(BIN)/python figures/make.py

families: $(INSTALLED)      ## docs/families.md: what works for which family
	$(BIN)/python docs/families.py

notebooks: $(INSTALLED)     ## execute the notebooks from their sources
	$(BIN)/python notebooks/execute.py

check: lint types test
