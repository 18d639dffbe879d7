# Needs python3 >= 3.10 with pip and venv, and for the native library a C++ compiler; the rest comes with
# the first call of any of these targets. README.md explains them.
#
#   make train ARGS="--loss all_negatives"     make test ARGS="-k hinge"     make bench
#   make lint    make format    make install (the set-up alone)    make clean
#
# PYTHON  the Python to make the environment with       VENV      where it is
# TORCH   the torch to install: TORCH=torch==2.13.0     EXTRAS    of pyproject.toml, to install
#         the smaller one without CUDA: TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
# MAX_JOBS  compilations, or processes of tests, at a time

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
EXTRAS ?= train,test,dev
MAX_JOBS ?= 2
export MAX_JOBS

.DELETE_ON_ERROR:
.PHONY: train test bench lint format install clean FORCE

python := $(VENV)/bin/python
installed := $(VENV)/fused_vse.installed
native_sources := $(shell find csrc -type f)
formatted := $(native_sources) $(wildcard tests/*/*.cpp tests/emulator/*/*.cpp tests/emulator/*/*.h)

train: $(installed)
	$(python) train_reference.py $(ARGS)

# Threads that wait leave their processor to the other process.
test: export OMP_WAIT_POLICY = passive
test: $(installed)
	$(python) -m pytest -n $(MAX_JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(installed)
	$(python) -m benchmarks.cpu $(ARGS)

lint: $(installed)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(formatted)

format: $(installed)
	$(VENV)/bin/ruff check --fix --exit-zero .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(formatted)

install: $(installed)

# An editable installation: Python sources are used in place, so only these files call for a new one, or
# a native library that is not there, perhaps because there was no compiler the last time.
missing := $(if $(wildcard fused_vse/_cpu.abi3.so),,FORCE)
$(installed): pyproject.toml setup.py build_backend.py $(native_sources) $(VENV)/fused_vse.choices $(missing)
	$(python) -m pip install $(foreach word,$(TORCH),"$(word)")
	$(python) -m pip install ninja "setuptools>=77"
	@$(python) -c 'import setup; print(setup.cuda_choice())'
	$(python) -m pip install --no-build-isolation --editable ".[$(EXTRAS)]"
	@$(python) -c 'import fused_vse; print(*map(": ".join, fused_vse.backends().items()), sep="\n")'
	@touch $@

# Rewritten, and therefore newer than what depends on it, only when the choices are not those of last time.
$(VENV)/fused_vse.choices: FORCE
	@$(python) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "$(TORCH) $(EXTRAS)" | cmp --silent - $@ || echo "$(TORCH) $(EXTRAS)" > $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f fused_vse/*.so fused_vse/*.not_built.txt $(installed)
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
