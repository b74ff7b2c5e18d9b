# Everything from a fresh clone: make demo, make test. Needs Python >= 3.10, make and git.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/installed
# separate environment of the documentation, without torch
DOCS := .venv-docs
TORCH := $(shell grep '^torch==' constraints.txt)
# index of torch builds without CUDA
CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test test-thorough test-portable slow lines browser gpu network cluster lint types bench figures model families notebooks docs check lock licences audit campaign

# torch: if plain pip would install CUDA (several GB) on a machine without an NVIDIA GPU, the build without CUDA is installed instead.
# The rest: hashes are checked on the platform of the pins (Python 3.11 on Linux). torch has none: its builds differ between machines.
$(INSTALLED): pyproject.toml constraints.txt requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if command -v nvidia-smi >/dev/null || ! $(PIP) install -q --dry-run --report - $(TORCH) | grep -q '"name": "nvidia'; \
		then index=; else index="--index-url $(CPU_INDEX)"; fi; \
		set -x; $(PIP) install -q $$index $(TORCH)
	@if $(BIN)/python -c "import sys; sys.exit(sys.platform != 'linux' or sys.version_info[:2] != (3, 11))"; \
		then set -x; $(PIP) install -q --require-hashes --no-deps -r requirements.txt && $(PIP) install -q --no-deps -e .; \
		else set -x; $(PIP) install -q -c constraints.txt -e ".[dev]"; fi
	$(PIP) check
	touch $@

demo: $(INSTALLED)          ## prune code neurons, prose neurons and random neurons of the embedded model (about 7 minutes)
	$(BIN)/sepcap demo

# workers take all cores: threads of NumPy beside them made the tests a quarter slower
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: $(INSTALLED)          ## fast tests (three to six minutes on two cores)
	$(PYTEST)

# the others that need nothing but this environment: over a second each
EVERYDAY := not slow and not browser and not gpu and not network and not cluster

test-thorough: $(INSTALLED) ## whole studies, interrupted and resumed, worker processes (about four minutes on two cores)
	$(PYTEST) -m "thorough and $(EVERYDAY)"

# numerical tests, and instruction sets limited to those of every x86-64
NUMERICAL := tests/statistics tests/selection tests/models/test_forward.py tests/models/test_partial.py \
	tests/evaluation/test_next_token.py tests/interventions/test_deletion.py tests/interventions/test_rotation.py \
	tests/interventions/test_ablation.py tests/studies/similarity/test_similarity.py tests/learning \
	tests/studies/single_ablations tests/studies/importances/test_measures.py
PLAIN := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1

test-portable: $(INSTALLED) ## numerical tests with the rounding of another processor
	$(PLAIN) $(BIN)/python -m pytest -n auto --dist worksteal -m "$(EVERYDAY)" $(NUMERICAL)

# separate environment with transformer-lens 3.9, which SAELens and HookedTransformer need
OLDER := .venv-tl39
OLDER_PIP := $(OLDER)/bin/python -m pip --disable-pip-version-check

$(OLDER)/installed: $(INSTALLED) pyproject.toml constraints-tl39.txt
	test -x $(OLDER)/bin/python || $(PYTHON) -m venv $(OLDER)
	@if command -v nvidia-smi >/dev/null || ! $(OLDER_PIP) install -q --dry-run --report - $(TORCH) | grep -q '"name": "nvidia'; \
		then index=; else index="--index-url $(CPU_INDEX)"; fi; \
		set -x; $(OLDER_PIP) install -q $$index $(TORCH)
	$(OLDER_PIP) install -q -c constraints-tl39.txt -e ".[notebooks]" sae-lens pillow pytest hypothesis beartype
	$(OLDER_PIP) check
	touch $@

slow: $(INSTALLED) $(OLDER)/installed $(DOCS)/installed  ## tests that take minutes, including notebooks and both versions of transformer-lens
	$(BIN)/python -m pytest -m slow

lines: $(INSTALLED) $(OLDER)/installed  ## tests of transformer-lens 3.9 and 4.x, each in its environment
	$(BIN)/python -m pytest -m "slow or not slow" tests/hooked_transformer tests/models/test_backend.py tests/families/test_families.py
	$(OLDER)/bin/python notebooks/execute.py beside-saelens

browser network: $(INSTALLED)
	$(BIN)/python -m pytest -m $@ || test $$? -eq 5

# Ray is in no environment of the tests: it is large, and no other test needs it
cluster: $(INSTALLED)       ## sweeps and passes on a Ray cluster of two nodes on the loopback, whose actors, nodes and driver are killed
	$(PIP) install -q -c constraints.txt -e ".[ray]"
	$(BIN)/python -m pytest -m cluster

gpu: $(INSTALLED)           ## core tests and benchmarks on a CUDA device, if there is one
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python -m pytest -m gpu && $(BIN)/python benchmarks/ratios.py --device cuda; \
	else echo "make gpu: torch sees no CUDA device here, so nothing was run"; fi

lint: $(INSTALLED)
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/pyright

bench: $(INSTALLED)         ## speed and memory as ratios; run it with nothing else running
	$(BIN)/python benchmarks/ratios.py
	$(BIN)/python benchmarks/sweep.py

figures: $(INSTALLED)       ## the figures in figures/
	$(BIN)/python figures/make.py

# separate environment with the packages whose text is used for training in addition to that of the tasks
TRAINING := .venv-training
TRAINING_PIP := $(TRAINING)/bin/python -m pip --disable-pip-version-check

$(TRAINING)/installed: $(INSTALLED) training/requirements.txt
	test -x $(TRAINING)/bin/python || $(PYTHON) -m venv $(TRAINING)
	@if command -v nvidia-smi >/dev/null || ! $(TRAINING_PIP) install -q --dry-run --report - $(TORCH) | grep -q '"name": "nvidia'; \
		then index=; else index="--index-url $(CPU_INDEX)"; fi; \
		set -x; $(TRAINING_PIP) install -q $$index $(TORCH)
	$(TRAINING_PIP) install -q -c constraints.txt -e . -r training/requirements.txt
	touch $@

model: $(TRAINING)/installed ## train the embedded model (two hours on two cores; resumes from its checkpoint), measure overlap, write its card
	$(TRAINING)/bin/python training/train.py
	$(TRAINING)/bin/python training/overlap.py
	$(TRAINING)/bin/python training/card.py

families: $(INSTALLED) $(OLDER)/installed  ## docs/families.md: what works for which family, with both versions of transformer-lens
	$(BIN)/python docs/families.py

notebooks: $(INSTALLED)     ## execute the notebooks from their sources
	$(BIN)/python notebooks/execute.py

# the pages are made of files, and docstrings are read without importing anything
$(DOCS)/installed: docs/requirements.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install -q -r docs/requirements.txt
	touch $@

docs: $(DOCS)/installed     ## the documentation in build/docs (index.html), without any resource from elsewhere; a wrong link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

lock: $(INSTALLED)          ## constraints.txt and requirements.txt (with hashes) from the installed packages
	{ echo "# What was tested, on Python 3.11 and Linux; made by \`make lock\`. Python 3.10, which some of these releases do not support, has torch alone."; \
		$(PIP) freeze --exclude-editable | sed 's/+cpu$$//; /^torch==/!s/$$/ ; python_version >= "3.11"/'; } > constraints.txt
	{ echo "# The same with the hashes of all their files; torch is left out, because its builds differ between machines."; \
		sed -n '/^torch==/d; s/ ;.*//; /==/p' constraints.txt | \
		$(BIN)/uv pip compile -q --no-deps --generate-hashes --no-header --no-annotate -; } > requirements.txt

campaign: $(INSTALLED)      ## 300 wrong calls and 300 damaged folders: each must end in one error or the right numbers
	$(BIN)/python tests/campaign.py

licences: $(INSTALLED)      ## licences of all installed packages
	$(BIN)/pip-licenses --order=license --with-urls

audit: $(INSTALLED)         ## known vulnerabilities of the pinned packages (queries an online database)
	$(BIN)/pip-audit --disable-pip --no-deps -r requirements.txt

check: lint types test
