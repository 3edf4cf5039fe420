# make demo     fine-tune, evaluate and picture a small Mask2Former
# make test     run the tests
# make test-fast run those that take no training (a minute and a half on two cores)
# make lint     run ruff and mypy
# make docs     build the documentation's site in build/site
# make gpu-kit  fill gpu_kit/ with what tools/check_gpu.sh needs on a machine with a GPU and no network
# make wheels   build dist/: a wheel for every Python, and the source archive
# make setup    only make the environment that the others need
#
# The environment is .venv; PYTHON=python3.12 chooses the interpreter that makes it. Each step of the setup leaves a stamp
# named by the checksum of what it depends on, so an interrupted setup goes on where it stopped, and a finished one is free.

PYTHON ?= python3
# Processes that run the tests; 0: none but the one.
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
PIP := PIP_CONSTRAINT=constraints.txt $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation

ifneq ($(origin PYTHON),file) # somebody chose one: the environment that is there must be of that version
  made := $(shell test -x $(PY) && $(PY) -V 2>&1)
  chosen := $(shell $(PYTHON) -V 2>&1)
  ifneq ($(made),$(if $(made),$(chosen)))
    $(error $(VENV) was made with $(made), and $(PYTHON) is $(chosen). Leave PYTHON= out, or delete $(VENV) first)
  endif
endif

checksum = $(shell { cat $(1); echo "$(2)"; } 2>/dev/null | cksum | cut -d' ' -f1)
operator := $(shell find csrc -type f 2>/dev/null | LC_ALL=C sort)
compilers := $(shell command -v $${CXX:-c++} g++ clang++ nvcc; echo $$CUDA_HOME $$PEFT_D2_CUDA $$TORCH_CUDA_ARCH_LIST)

STAMPS := $(VENV)/.stamps
venv := $(STAMPS)/venv
torch := $(STAMPS)/torch-$(call checksum,constraints.txt)
detectron2 := $(STAMPS)/detectron2-$(call checksum,constraints.txt tools/build_detectron2.py)
package := $(STAMPS)/package-$(call checksum,constraints.txt pyproject.toml setup.py $(operator),$(compilers))
extras := $(STAMPS)/extras-$(call checksum,constraints.txt pyproject.toml)
timm := $(STAMPS)/timm-$(call checksum,constraints.txt pyproject.toml)
site := $(STAMPS)/site-$(call checksum,constraints.txt pyproject.toml)
packing := $(STAMPS)/packing-$(call checksum,constraints.txt pyproject.toml)

.PHONY: demo test test-fast lint docs gpu-kit wheels setup
.NOTPARALLEL:

demo: $(timm)
	$(PY) tools/run_demo.py

test: $(extras)
	$(PY) -m pytest -n $(WORKERS) $(ARGS)

test-fast: $(extras)
	$(PY) -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

lint: $(extras)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(site)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

gpu-kit: $(package)
	PIP_CONSTRAINT=constraints.txt $(PY) tools/make_gpu_kit.py $(ARGS)

# The CUDA library is in it where there is an nvcc of torch's CUDA. torch brings libtorch and the CUDA runtime.
wheels: $(packing)
	rm -rf build/lib build/bdist.* build/wheel dist
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-7.5;8.0;8.6;8.9;9.0}" $(PIP:install=wheel) --no-deps --wheel-dir build/wheel .
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH $(PY) -m auditwheel repair --wheel-dir dist \
	    --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' build/wheel/*.whl
	$(PY) -m build --sdist --no-isolation --outdir dist .
	@ls -l dist

setup: $(extras)
	@echo "The environment $(VENV) is ready. What it has: $(PY) -m peft_d2.doctor"

$(venv):
	@command -v $(PYTHON) >/dev/null || { echo "No interpreter '$(PYTHON)'. Choose another: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), and 3.10 or newer is needed. Choose another: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) lacks venv or pip. Install them (Debian, Ubuntu: apt install python3-venv python3-pip)"; exit 1; }
	@echo "== environment in $(VENV), with $$($(PYTHON) -V)"
	@# One that works stays as it is: somebody may have made it, with their own Detectron2 in it.
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(torch): | $(venv)
	@echo "== torch and torchvision (some gigabytes, a minute or more)"
	@$(PIP) setuptools wheel torch torchvision
	@touch $@

$(detectron2): | $(torch)
	@echo "== Detectron2"
	@PIP_CONSTRAINT=constraints.txt PIP_QUIET=1 $(PY) tools/build_detectron2.py --install
	@touch $@

$(package): | $(detectron2)
	@echo "== peft_d2 and its operator (a minute or two where there is a compiler)"
	@$(PIP) --editable .
	@$(PY) -c 'from peft_d2.ops import backends; \
	    [print(f"   operator for {name}:", why or "ready") for name, why in backends().items()]'
	@touch $@

# The names of the extras stand in pyproject.toml; the installed package knows them.
extra = $$($(PY) -c 'from importlib.metadata import requires; import re; \
    print(*(r.partition(";")[0].replace(" ", "") for r in requires("peft_d2") if re.search("extra == .($(1))", r)))')

$(extras): | $(package)
	@echo "== tools for tests and lint"
	@$(PIP) $(call extra,test|lint)
	@# An oracle of tests; what it requires would put a second OpenCV over the first.
	@$(PIP) --no-deps lvis
	@touch $@

$(timm): | $(package)
	@echo "== timm, which has the demo's backbone"
	@$(PIP) $(call extra,timm)
	@touch $@

$(site): | $(package)
	@echo "== tools for the documentation"
	@$(PIP) $(call extra,docs)
	@touch $@

$(packing): | $(package)
	@echo "== tools for wheels"
	@$(PIP) $(call extra,wheels)
	@touch $@
