# composeprob: every target works as the first command after a clone, given Python >= 3.12 (with venv), make and git.
#   make demo      the main job: ring x bar by three samplers -> out/demo.png, out/results.json
#   make test      the quick tests of the core, and of FAMILIES="pretrained training" (tools/families.py)
#   make test-all  every test, the slow ones too
#   make lint      style, types, layers       make docs       the site, executed, warnings fatal -> docs/_build/html
#   make coverage  the quick tests, and the share of lines that they run -> out/coverage.xml
#   make snapshots rewrite the wording of messages that tests compare
#   make env       only the environment       make train      retrain a zoo model into out/: make train MODEL=ring2d
#   make dist      wheels and sdist           make clean      remove what was built, and out/ (not .venv)
#   make release-check   build, then install and run the wheel in an empty environment of every Python that is here
#   make tpu       fetch the TPU compiler (213 MB), for `python -m benchmarks tpu` and its test
# Settings: PYTHON=python3.12 (when VENV is made)  VENV=.venv  EXTRAS=dev,docs  (EXTRAS=dev,docs,cuda13 on a machine with an NVIDIA GPU)
#           WORKERS=2 (test processes)  PYTEST_ARGS="-k product"  MODEL=ring2d
#           TRAIN_ARGS="--out models/ring2d --replace"  (into the zoo of this checkout)
#           CHECK_ARGS="--python PATH --only 3.14"  (of release-check)
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo cut test test-all coverage snapshots lint format docs train dist release-check tpu clean

VENV    ?= .venv
PYTHON  ?=
EXTRAS  ?= dev,docs
WORKERS ?= 2
MODEL   ?= ring2d
FAMILIES ?=
PYTEST_ARGS ?=
TRAIN_ARGS ?=
CHECK_ARGS ?=

comma := ,
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

env: $(STAMP)

# A Python counts only if it starts (a pyenv shim may not), is new enough, and can make an environment with pip in it.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))

$(STAMP): pyproject.toml constraints.txt
	@if ! { "$(PY)" -c '$(USABLE)' && "$(PY)" -m pip --version; } >/dev/null 2>&1; then \
	  python=""; seen=""; \
	  for candidate in $(or $(PYTHON),python3.14 python3.13 python3.12 python3 python); do \
	    if "$$candidate" -c '$(USABLE)' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	    version=$$("$$candidate" --version 2>/dev/null) && seen="$$seen $$candidate ($$version)"; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "composeprob needs Python >= 3.12 with its venv module (Debian: apt install python3-venv)." >&2; \
	    echo "  Found:$${seen:- nothing that starts}." >&2; \
	    echo "  Fix: install one, or say where it is: make $(or $(firstword $(MAKECMDGOALS)),env) PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$python --version)"; \
	  "$$python" -m venv --clear "$(VENV)"; \
	fi
	@echo "Installing the pinned packages of constraints.txt and composeprob itself into $(VENV): about a minute, once."
	"$(PY)" -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling hatch-fancy-pypi-readme
	"$(PY)" -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[$(EXTRAS)]'
	@touch "$@" && echo "Installed. Further commands start at once."

# What XLA compiled is kept for the next run: most of what tests and tutorials take is compilation.
test test-all coverage snapshots docs: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.jax_cache
test test-all coverage snapshots docs: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0.1
# Of each worker: on cores that are all busy the threads of NumPy's LAPACK wait for one another.
test test-all coverage snapshots docs: export OPENBLAS_NUM_THREADS = 1

# Once for all programs: JAX's own bound reads the whole folder for each one that it writes.
test test-all coverage snapshots docs: cut
cut: env
	@"$(PY)" -c "from pathlib import Path; from composeprob.settings import cut; cut(Path('.jax_cache'))"

# What `make test` runs: the core, and the families that are named.
QUICK := not slow and (core$(foreach family,$(FAMILIES), or $(family)))

demo: env
	"$(PY)" examples/demo.py

# A family that is left out does not use its snapshots: `make test-all` and `make coverage` find those that no test uses.
test: env
	"$(PY)" -m pytest -n $(WORKERS) --dist loadfile -m "$(QUICK)" --snapshot-disable-unused $(PYTEST_ARGS)

test-all: env
	"$(PY)" -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

coverage: env
	@mkdir -p out
	"$(PY)" -m pytest -n $(WORKERS) --dist loadfile -m "not slow" --cov=composeprob --cov-report=term:skip-covered --cov-report=xml:out/coverage.xml $(PYTEST_ARGS)

# Rewrites the wording that tests hold messages against; its diff is to be read before it is committed.
snapshots: env
	"$(PY)" -m pytest -n $(WORKERS) --dist loadfile -m "not slow" --snapshot-update $(PYTEST_ARGS)

lint: env
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy
	"$(VENV)/bin/lint-imports"
	"$(PY)" tools/style.py
	"$(PY)" tools/promises.py
	"$(PY)" tools/ledger.py

format: env
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

docs: env
	"$(PY)" -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "The site: docs/_build/html/index.html"

train: env
	"$(VENV)/bin/composeprob" train $(MODEL) $(TRAIN_ARGS)

dist: env
	"$(PY)" -m build --no-isolation
	"$(PY)" -m build --no-isolation --wheel --outdir dist models

release-check: env
	PATH="$(abspath $(VENV))/bin:$$PATH" "$(PY)" tools/check_release.py $(CHECK_ARGS)

# Beside the environment's packages: where JAX can import libtpu, it looks for a TPU in every process, and says so.
tpu: env
	"$(PY)" -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --upgrade --target "$(VENV)/libtpu" libtpu

clean:
	rm -rf build dist out docs/_build docs/gallery docs/tutorials/pictures docs/reference/generated .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .jax_cache
