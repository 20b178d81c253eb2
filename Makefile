# Every target sets up what it needs in .venv. Requires Python 3.10 or later with venv, a C++17
# compiler and make; CMake and Ninja come from PyPI where they are missing.
#
# The package is compiled once into a wheel, again when a source is newer; each target then adds the
# extras it needs. Tests import the installed package, never src/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WHEEL = $$(echo $(VENV)/wheel/batchnorm-*.whl)
# `make test TORCH=` runs without PyTorch; the comparisons with it are skipped.
TORCH ?= torch

SOURCES := $(shell find csrc src -type f ! -name '*.pyc') pyproject.toml CMakeLists.txt

SANITIZE_VENV := .venv-sanitize
SANITIZE_TESTS := $(wildcard $(foreach name,kernels layer_core layout numerics moments scattered,tests/test_$(name).py))

.PHONY: help demo test check bench docs sanitize wheel wheel-test clean
.DELETE_ON_ERROR:

help:
	@echo "make demo        set up, train the demo networks, write demo.html"
	@echo "make test        set up and run all tests"
	@echo "make check       ruff and mypy"
	@echo "make bench       measure speed and accuracy into benchmarks/results, and update README.md"
	@echo "make docs        build the site into site/; its tests then run with make test"
	@echo "make sanitize    run the kernel tests under AddressSanitizer and UBSan (GCC)"
	@echo "make wheel       an sdist, and a wheel for each Python at hand, into dist"
	@echo "make wheel-test  try each wheel on each Python, in environments without a compiler"
	@echo "make clean       remove what the other targets made"

demo: $(VENV)/.demo
	$(BIN)/batchnorm demo --out demo.html
	@echo "Open demo.html in a browser."

test: $(VENV)/.dev $(if $(TORCH),$(VENV)/.torch)
	$(BIN)/python -m pytest

check: $(VENV)/.dev $(if $(TORCH),$(VENV)/.torch)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench $(VENV)/.torch
	$(BIN)/batchnorm bench --out benchmarks/results
	$(BIN)/python benchmarks/tables.py

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --clean
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python docs/site/slides.py site/learn

# GCC's runtimes must be there before Python starts, for Python itself is not instrumented.
sanitize: $(SANITIZE_VENV)/.installed
	@test -n "$(SANITIZE_TESTS)" || { echo "sanitize: no kernel tests found in tests/" >&2; exit 1; }
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONMALLOC=malloc \
	$(SANITIZE_VENV)/bin/python -m pytest $(SANITIZE_TESTS)

wheel:
	$(PYTHON) .ci/wheels build

wheel-test:
	$(PYTHON) .ci/wheels test

clean:
	rm -rf $(VENV) $(SANITIZE_VENV) build dist site demo.html .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up -------------------------------------------------------------------------------------

CREATE_VENV = $(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, this is " + sys.version.split()[0] + "; name one with make PYTHON=..." if sys.version_info < (3, 10) else 0)' && $(PYTHON) -m venv

$(VENV)/.created:
	$(CREATE_VENV) $(VENV)
	touch $@

$(VENV)/.built: $(VENV)/.created $(SOURCES)
	rm -rf $(VENV)/wheel
	$(PIP) wheel --no-deps --wheel-dir $(VENV)/wheel .
	$(PIP) install --force-reinstall --no-deps "$(WHEEL)"
	touch $@

# pip leaves a wheel of the installed version alone, and installs what its extras lack.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.bench: $(VENV)/.%: $(VENV)/.built constraints.txt
	$(PIP) install -c constraints.txt "$(WHEEL)[$*$(if $(filter bench,$*),$(comma)jax)]"
	touch $@

$(VENV)/.torch: $(VENV)/.built constraints.txt
	$(PIP) install -c constraints.txt "$(WHEEL)[$(TORCH),interop,passage,study]"
	touch $@

# Playwright drives a browser in the site's tests; the browser is the system's.
$(VENV)/.docs: $(VENV)/.built constraints.txt
	$(PIP) install -c constraints.txt "$(WHEEL)[docs]" playwright
	touch $@

comma := ,

$(SANITIZE_VENV)/.installed: $(SOURCES) constraints.txt
	test -x $(SANITIZE_VENV)/bin/python || $(CREATE_VENV) $(SANITIZE_VENV)
	$(SANITIZE_VENV)/bin/python -m pip --disable-pip-version-check install -c constraints.txt \
		--config-settings=cmake.define.BATCHNORM_SANITIZE=ON \
		--config-settings=build-dir=build/sanitize --config-settings=install.strip=false . \
		'pytest>=8' 'hypothesis>=6.100' 'ml_dtypes>=0.4'
	touch $@
