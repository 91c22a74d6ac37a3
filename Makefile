# Every target sets up what it needs: a virtual environment of its own in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
OLDEST := .venv-oldest

.PHONY: demo docs recipe-reference test test-all test-wide test-slow test-faults test-oldest lint bench gpu-pack benchmark benchmark-controlnet benchmark-adapters benchmark-dit benchmark-guidance embedded-model clean

demo: $(STAMP)
	$(BIN)/difftune demo --output runs/demo --overwrite

# A process a core, each with one thread and whole files, whose tests share what they trained.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# With the breadth that `make test` samples: every family, adapter and verb, every kind of bad input in each.
test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m 'not slow and not benchmark'

# What `make test-all` has and `make test` has not.
SHARE = 3

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

# The figures of the README: two processes of one thread each are faster on two cores than one of two.
benchmark: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/benchmark.py --work build/benchmark --worker 0 --workers 2 & \
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/benchmark.py --work build/benchmark --worker 1 --workers 2 && wait $$!
	$(BIN)/python examples/emoji/benchmark.py --work build/benchmark --collect examples/emoji/benchmark.json

benchmark-controlnet: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/controlnet.py --work build/controlnet & \
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/controlnet.py --work build/controlnet && wait $$!
	$(BIN)/python examples/emoji/controlnet.py --work build/controlnet --collect examples/emoji/controlnet.json
	$(BIN)/python examples/emoji/controlnet.py --table examples/emoji/controlnet.json

benchmark-adapters: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/adapters.py --work build/adapters --worker 0 --workers 2 & \
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/adapters.py --work build/adapters --worker 1 --workers 2 && wait $$!
	$(BIN)/python examples/emoji/adapters.py --work build/adapters --collect examples/emoji/adapters.json
	$(BIN)/python examples/emoji/adapters.py --table examples/emoji/adapters.json

benchmark-dit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/dit.py --work build/dit --source
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/dit.py --work build/dit --worker 0 --workers 2 & \
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/dit.py --work build/dit --worker 1 --workers 2 && wait $$!
	$(BIN)/python examples/emoji/dit.py --work build/dit --collect examples/emoji/dit.json
	$(BIN)/python examples/emoji/dit.py --table examples/emoji/dit.json

# The figures of the drop-in pipelines: trains, then samples.
benchmark-guidance: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/emoji/guidance.py --work build/guidance
	$(BIN)/python examples/emoji/guidance.py --work build/guidance --collect examples/emoji/guidance.json
	$(BIN)/python examples/emoji/guidance.py --table examples/emoji/guidance.json

# Rebuilds the embedded model and its picture sets from the npm packages; hours on two cores, resumable.
embedded-model: $(STAMP)
	$(BIN)/python -m pip install -q -e '.[emoji]'
	$(BIN)/python examples/emoji/prepare.py --work build/emoji --assets difftuning_control/assets
	$(BIN)/python examples/emoji/train_vae.py --work build/emoji
	$(BIN)/python examples/emoji/train_unet.py --work build/emoji
	$(BIN)/python examples/emoji/train_unet.py --work build/emoji --export difftuning_control/assets/embedded
	$(BIN)/python examples/emoji/evaluate_base.py --work build/emoji

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
