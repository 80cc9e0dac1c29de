# Everything happens in .venv, which the first target that needs it creates. PYTHON and PIP_ARGS may be given.
PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
SEED ?= 0
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: help demo test coverage soak lint types wheel bench examples clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' Makefile

# torch goes first, from the constraints, so that nothing else decides which build of it is installed.
$(READY): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,demo,tvm,recipes]'
	touch $(READY)

demo: $(READY)  ## prune a real encoder, compile it, and compare speed and embeddings
	$(PY) examples/encoder.py

test: $(READY)  ## all tests but the soak
	$(PY) -m pytest -n $(WORKERS) -m "not soak"

coverage: $(READY)  ## branch coverage of the tests, in one process; slow
	mkdir -p out
	$(PY) -m coverage run --rcfile=tests/coverage.ini -m pytest -n 0 -m "not soak"
	$(PY) -m coverage report --rcfile=tests/coverage.ini

soak: $(READY)  ## the long batteries, for hours; totals add up in out/ and a stopped run goes on (SEED=0)
	$(PY) -m sparsec.testing_kernels --seed $(SEED) --problems 200000
	$(PY) -m sparsec.testing_kernels --op conv --seed $(SEED) --problems 20000
	$(PY) -m sparsec.testing_graphs --seed $(SEED) --graphs 20000
	$(PY) -m sparsec.testing_peers --seed $(SEED) --problems 20000
	$(PY) tests/hostile.py --seed $(SEED) --cases 1000000
	$(PY) tests/cache_soak.py --seed $(SEED) --processes 16 --rounds 3200
	$(PY) tests/mutants.py --seed $(SEED) --count 220
	$(PY) -m pytest -n 0 -m soak

lint: $(READY)  ## ruff
	$(PY) -m ruff check .

wheel: $(READY)  ## source distribution and wheel in dist/
	rm -rf build/lib build/bdist.* dist
	$(PY) -m build --outdir dist . > /dev/null

# The source tree maps passes/, codegen/ and templates/ into the package, which mypy cannot follow: it reads the wheel.
types: wheel  ## mypy on the installed wheel
	rm -rf build/types
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target build/types dist/*.whl
	cd build/types && $(abspath $(PY)) -m mypy --config-file ../../pyproject.toml -p sparsec

examples: $(READY)  ## every example in its quick form
	for f in examples/*.py; do echo "== $$f"; $(PY) $$f --quick > /dev/null || exit 1; done

bench: $(READY)  ## layers and the encoder against dense, as tables and JSON in out/
	mkdir -p out
	$(PY) benchmarks/limits.py --json out/limits.json
	$(PY) benchmarks/linear.py --json out/linear.json
	$(PY) benchmarks/encoder.py --json out/encoder.json

clean:  ## remove what builds left behind, but not .venv
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
