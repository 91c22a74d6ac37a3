# Every target sets up what it needs: a virtual environment of its own in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
OLDEST := .venv-oldest

.PHONY: demo docs recipe-reference test test-all test-wide test-slow test-faults test-oldest lint bench gpu-pack embedded-model results clean

demo: $(STAMP)
	$(BIN)/difftune demo --output runs/demo --overwrite

# A process a core, each with one thread and whole files, whose tests share what they trained.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# With the breadth that `make test` samples: every family, adapter and verb, every kind of bad input in each.
test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow and not benchmark'

# What `make test-all` has and `make test` has not.
SHARE = 4

test-wide: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m 'wide and not slow and not benchmark' --share $(SHARE)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# `make test` with the oldest versions that are supported, in an environment of its own (Python 3.11 to 3.13).
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --dist loadfile

# Kills, full disks, damaged files, signals under launchers; prints the table of kills.
test-faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s tests/faults

bench: $(STAMP)
	$(BIN)/python -m pytest -m benchmark -s tests/benchmarks

# A folder to take to a machine with a GPU and without a network, to measure there; PEERS is a folder of diffusers' scripts,
# which are fetched otherwise, and WHEELS=no leaves out the packages.
gpu-pack: $(STAMP)
	$(BIN)/python tests/gpu/make_pack.py --to build/gpu-pack $(if $(PEERS),--peers $(PEERS)) $(if $(filter no,$(WHEELS)),--no-wheels)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The pages of docs/ as a site in build/site; a dead link or anchor fails. Reads the package's source and imports none of it.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean -f docs/mkdocs.yml

# docs/recipe.md, from the docstrings of the recipe's dataclasses.
recipe-reference: $(STAMP)
	$(BIN)/python docs/generate_recipe_reference.py

# Rebuilds the embedded model and its picture sets from the npm packages; half a day on one core, resumable at any step.
EMOJI := OMP_NUM_THREADS=1 $(BIN)/python examples/emoji
embedded-model: $(STAMP)
	$(BIN)/python -m pip install -q -e '.[emoji]'
	$(EMOJI)/prepare.py --work build/emoji --assets difftuning_control/assets
	$(EMOJI)/build_bank.py --work build/emoji pictures
	$(EMOJI)/train_vae.py --work build/emoji
	$(EMOJI)/build_bank.py --work build/emoji latents
	$(EMOJI)/build_bank.py --work build/emoji maps
	$(EMOJI)/train_unet.py --work build/emoji
	$(EMOJI)/train_unet.py --work build/emoji --export difftuning_control/assets/embedded
	$(EMOJI)/evaluate_base.py --work build/emoji
	$(EMOJI)/survival.py --work build/emoji

# Makes anew whatever the repository shows of the embedded model; many hours on two cores, what is done is not done again.
# make results STAGES="base demo" makes only these.
results: $(STAMP)
	$(BIN)/python -m pip install -q -e '.[emoji]'
	$(BIN)/python examples/emoji/results.py $(if $(STAGES),--stages $(STAGES))

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

$(OLDEST)/.installed: tests/environments/oldest.txt pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q -r tests/environments/oldest.txt
	$(OLDEST)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build runs .pytest_cache .ruff_cache .mypy_cache
