# The private part needs Python 3.10 or 3.11 (SPU publishes no wheel for others); training runs on any newer one too.
PYTHON ?= $(shell for p in python3.11 python3.10 python3; do command -v $$p >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test check slow docs format lock clean install
install: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "found no Python; need 3.10 or 3.11; install it (Debian: apt-get install python3 python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v < (3, 10))' || { echo "found $$($(PYTHON) -V); need 3.10 or 3.11; run make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=23.2"
	$(BIN)/python -m pip install --quiet "torch>=2.6,<2.14"
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))'; \
	then $(BIN)/python -m pip install --quiet -e '.[private,dev]'; \
	else echo "found $$($(BIN)/python -V); private inference needs 3.10 or 3.11 (make PYTHON=python3.11); installing training only"; \
	     $(BIN)/python -m pip install --quiet -e '.[dev]'; fi
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/shoal demo --out runs/demo --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# PyTorch's build depends on the machine, and brings its own CUDA packages on some.
UNPINNED = torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc \
  cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

lock: $(STAMP)
	$(BIN)/python -m pip install --quiet uv
	{ head -2 requirements/private.txt; $(BIN)/uv pip compile pyproject.toml --extra private --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header --quiet $(addprefix --no-emit-package ,$(UNPINNED)); } > requirements/new
	mv requirements/new requirements/private.txt

clean:
	rm -rf $(VENV) runs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
