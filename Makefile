# Everything here runs in .venv, which is made when it is first needed and again when pyproject.toml changes.
# The wheels of Open MPI and MPICH overwrite each other: .venv has the first; .venv-mpich, for tests and benchmarks,
# has the second and shares all else.
# Variables: PYTHON (the interpreter that makes .venv), TORCH_INDEX_URL (where to take torch from),
# PYTEST_ARGS (for `make test`), SOAK_ARGS (for `make soak`: rows, --cases N, --seed S).

PYTHON ?= python3
PYTEST_ARGS ?=
SOAK_ARGS ?=
export TORCH_INDEX_URL
export PIP_USER := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

python := .venv/bin/python
mpich_python := .venv-mpich/bin/python

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo demo-text test check bench soak sweeps branches clean

help:
	@echo 'make demo        train on handwritten digits with two ranks; ends with a report'
	@echo 'make demo-text   the same with a byte-level language model'
	@echo 'make test        the whole test suite (PYTEST_ARGS="tests/test_job.py -k name" for a part, "-n 2 --dist loadfile" for two files at a time)'
	@echo 'make check       formatting, lint, types and import layers'
	@echo 'make bench       the tables of the README, measured here'
	@echo 'make soak        every fault that a run has to survive, injected for real, and the table of them; an hour or two'
	@echo 'make sweeps      critical batch sizes measured by running, beside what the noise scale predicts; 45 minutes'
	@echo 'make branches    the same from branches of one run, compared with those sweeps on the same stretch of training'
	@echo 'make clean       remove .venv, .venv-mpich and everything that was built; runs/ stays'

demo: .venv/.demo
	@$(python) -m launch torchrun --nproc-per-node 2 examples/digits.toml

demo-text: .venv/.demo
	@$(python) -m launch torchrun --nproc-per-node 2 examples/text.toml

test: .venv/.test .venv-mpich/.made
	@$(python) -m pytest $(PYTEST_ARGS)

check: .venv/.dev
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m pyright
	$(python) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

bench: .venv/.test .venv-mpich/.made
	@$(python) benchmarks/all_reduce.py
	@$(python) benchmarks/all_reduce.py --ranks 4 8 --sizes 4KiB 25MiB
	@$(python) benchmarks/all_reduce.py --busy-neighbour --sizes 4KiB 1MiB 25MiB
	@$(python) benchmarks/train_step.py
	@$(python) benchmarks/nodes.py
	@$(python) benchmarks/scaling_model.py
	@$(python) benchmarks/noise_scale_coverage.py
	@$(python) benchmarks/adaptive_batch.py
	@$(python) benchmarks/watching.py
	@$(python) benchmarks/images.py
	@$(python) benchmarks/letters.py

soak: .venv/.test
	@$(python) benchmarks/soak.py $(SOAK_ARGS)
	@$(python) benchmarks/goodput.py

# A search that was interrupted goes on where it stood.
sweeps: .venv/.test
	@$(call sweep,digits,adam,8e-3)
	@$(call sweep,digits,sgd,0.1)
	@$(call sweep,text,adam,8e-3)
	@$(call sweep,text,sgd,0.5)
	@$(call sweep,quadratic,adam,0.03)
	@$(call sweep,quadratic,sgd,0.5)
	@$(python) benchmarks/critical_batches.py sweeps/*

define sweep
$(python) -m ddp critical-batch examples/critical_batch_$(1).toml --resume --set sweep.directory=sweeps/$(1)-$(2) \
    --set optimizer.name=$(2) --set optimizer.learning_rate=$(3)
endef

# Presumes the sweeps; the last number is the step of the run at which its branches begin: later the stretch is short, its interval wide.
branches: .venv/.test
	@$(call branch,digits,adam,8e-3,20)
	@$(call branch,digits,sgd,0.1,20)
	@$(call branch,text,adam,8e-3,20)

define branch
$(python) -m ddp train examples/critical_batch_$(1)_run.toml --resume auto --set run.id=critical-batch-$(1)-$(2) \
    --set optimizer.name=$(2) --set optimizer.learning_rate=$(3) && \
$(python) -m ddp critical-batch examples/critical_batch_$(1).toml --resume \
    --set sweep.directory=sweeps/$(1)-$(2)-branches --set optimizer.name=$(2) --set optimizer.learning_rate=$(3) \
    --method branched --from runs/critical-batch-$(1)-$(2)/checkpoints/step-000000$(4) --against sweeps/$(1)-$(2)
endef

clean:
	rm -rf .venv .venv-mpich build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find ddp launch tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# --- the environment ------------------------------------------------------------------------------------------

# A larger set of extras holds the smaller ones, so that `make demo` after `make test` installs nothing.
.venv/.demo: .venv/.made pyproject.toml
	$(call install,examples$(comma)report)
	@touch $@

.venv/.test: .venv/.made pyproject.toml
	$(call install,test)
	@touch .venv/.demo $@

.venv/.dev: .venv/.made pyproject.toml
	$(call install,dev)
	@touch .venv/.demo .venv/.test $@

comma := ,
define install
@echo 'Installing the extra "$(1)" into .venv: torch alone is 200 MB for CPU and some GB for CUDA (TORCH_INDEX_URL=$(if $(TORCH_INDEX_URL),$(TORCH_INDEX_URL),is not set: from the default index)). This can take minutes.'
@if [ -n "$$TORCH_INDEX_URL" ]; then \
    $(python) -m pip install --quiet --index-url "$$TORCH_INDEX_URL" "$$($(python) -c "$$TORCH_REQUIREMENT")"; \
fi
@$(python) -m pip install --quiet --editable '.[$(1)]'
endef

define TORCH_REQUIREMENT
import tomllib
project = tomllib.load(open('pyproject.toml', 'rb'))['project']
print(next(line for line in project['dependencies'] if line.startswith('torch')))
endef
export TORCH_REQUIREMENT

# Always from nothing, which takes seconds: pip would take what .venv shares for installed here.
.venv-mpich/.made: .venv/.made pyproject.toml | .venv/.test
	@echo 'Making .venv-mpich: MPICH (13 MB) and mpi4py; all else comes from .venv.'
	@$(python) -m venv --without-pip --clear .venv-mpich
	@$(python) -c "$$MPICH_REQUIREMENTS" | \
	    $(python) -m pip --python $(mpich_python) install --quiet --no-deps --requirement /dev/stdin
	@$(python) -c "$$SHARED_PACKAGES" >"$$($(mpich_python) -c "$$SITE_PACKAGES")/shared.pth"
	@touch $@

define MPICH_REQUIREMENTS
import tomllib
print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['mpich'], sep='\n')
endef
define SITE_PACKAGES
import sysconfig
print(sysconfig.get_path('purelib'))
endef
define SHARED_PACKAGES
import sysconfig
print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))
endef
export MPICH_REQUIREMENTS
export SITE_PACKAGES
export SHARED_PACKAGES

# An environment that lacks pip was interrupted, or its Python has been removed: it is made anew.
.venv/.made:
	@command -v '$(PYTHON)' >/dev/null || \
	    { echo '$(PYTHON) was not found: install Python 3.11 to 3.14, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	@'$(PYTHON)' -c "$$CHECK_PYTHON"
	@$(python) -m pip --version >/dev/null 2>&1 || '$(PYTHON)' -m venv --clear .venv
	@touch $@

define CHECK_PYTHON
import sys
have = '%d.%d' % sys.version_info[:2]
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    sys.exit('$(PYTHON) is Python ' + have + '; torch and this project need 3.11 to 3.14: make PYTHON=/path/to/python3')
try:
    import ensurepip, venv
except ImportError:
    sys.exit('$(PYTHON) cannot make environments: install the package python' + have + '-venv (Debian, Ubuntu) and try again')
endef
export CHECK_PYTHON
