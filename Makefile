# Targets for people and CI. Every target that needs .venv sets it up once.
SHELL := /bin/bash
PYTHON ?= python3
RECIPE ?= demo
BIN := .venv/bin
# Test processes: each needs one core and up to 3 GiB.
WORKERS ?= 2
# Images: their registry, version and build arguments. PODMAN_FLAGS is for any other option of podman.
REGISTRY ?= localhost/tune16
VERSION := $(shell sed -n 's/^VERSION = "\(.*\)"/\1/p' components/images.py)
IMAGE_ARGS = --build-arg VERSION=$(VERSION) $(foreach name,BASE_IMAGE ACCELERATOR TORCH_INDEX,$(if $($(name)),--build-arg $(name)=$($(name))))
# The fault scripts, described in tests/faults/README.md.
FAULTS := kill_training damage_checkpoints kill_pipeline kill_uploads s3_faults champion_races bad_data seeded_defects \
  canary tampering full_disk
# Processes that share the cores wait for each other instead of spinning.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: $(BIN)/ready llama  ## Run a recipe on this machine from end to end: RECIPE=demo, another name, or a path
	@$(BIN)/tune16 run $(RECIPE)

test: $(BIN)/ready llama .venv/checkov/ready lint  ## Run lint, type checks and all tests, in WORKERS processes
	@$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile

llama: $(BIN)/ready  ## Build llama.cpp for GGUF files, once; report it if that is not possible
	@if ! command -v c++ > /dev/null; then \
	  echo "There is no C++ compiler: runs make no GGUF files. Install one (Debian: apt install g++) and run \`make llama\`."; \
	elif ! $(MAKE) --no-print-directory $(BIN)/llama; then \
	  echo "llama.cpp could not be built (see above): runs make no GGUF files until \`make llama\` works."; fi

lint: $(BIN)/ready  ## Run lint and type checks only
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

quick: $(BIN)/ready  ## Run only the tests that take seconds
	@$(BIN)/pytest -m "not slow"

compile: $(BIN)/ready  ## Write manifests/base/pipeline.yaml and the page of settings
	@$(BIN)/tune16 compile
	@$(BIN)/python -m components knobs > components/KNOBS.md

manifests: $(BIN)/ready .venv/checkov/ready  ## Build every overlay, validate every object, check security
	@$(BIN)/pytest tests/manifests

images:  ## Build the images with podman: TARGET=tools, BASE_IMAGE=…, REGISTRY=…, ACCELERATOR=cpu
	@for target in $(or $(TARGET),tools trainer gguf chat); do \
	  podman build $(PODMAN_FLAGS) --file images/Containerfile --build-arg TARGET=$$target $(IMAGE_ARGS) \
	    --tag $(REGISTRY)/$$target:$(VERSION) . || exit 1; done

check-images: $(BIN)/ready  ## Run the demo's steps in the images, as any user, read-only, without network (root)
	@rm -rf build/containers && TUNE16_REGISTRY=$(REGISTRY) PYTHONPATH=. unshare --net \
	  $(BIN)/python tests/images/containers.py build/containers

check-cluster: $(BIN)/ready  ## Run acceptance checks on the cluster of the `oc` login: NAMESPACE=…, CPU=1 without GPUs
	@$(BIN)/tune16 doctor --run --output build/check-cluster.json $(if $(NAMESPACE),--namespace $(NAMESPACE)) $(if $(CPU),--cpu)

sbom: .venv/sbom/ready  ## Write each image's bill of materials (CycloneDX) from its lock to build/
	@mkdir -p build && for lock in images/locks/*.txt; do \
	  .venv/sbom/bin/cyclonedx-py requirements --output-reproducible $$lock -o build/$$(basename $$lock .txt).cdx.json || exit 1; done

locks: $(BIN)/ready  ## Resolve the images' packages again, within constraints.txt: images/locks/
	@$(BIN)/python images/locks.py

faults: $(BIN)/ready llama  ## Run the fault scripts: kills, damage, hostile input (over an hour); NAME=one script
	@for name in $(or $(NAME),$(FAULTS)); do echo "== $$name"; PYTHONPATH=. $(BIN)/python tests/faults/$$name.py \
	  --output tests/faults/results/$$name.json || failed="$$failed $$name"; done; \
	  if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

bench: $(BIN)/ready  ## Run the benchmarks that need no GPU
	@for script in tests/bench/bench_*.py; do $(BIN)/python $$script || exit 1; done

bench-gpu: $(BIN)/ready  ## Run the benchmarks that need a GPU
	@for script in tests/bench/gpu_*.py; do PYTHONPATH=. $(BIN)/python $$script || exit 1; done

clean:  ## Remove what the targets created
	rm -rf .venv runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[trainer,pipelines,serve,chat,dev]'
	@touch $@

# llama-cpp-python has no wheel for this platform, and compiling it takes some minutes.
$(BIN)/llama: images/llama.py images/locks/gguf.txt $(BIN)/ready
	@echo "Building llama.cpp; this takes some minutes, once."
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF $(CMAKE_ARGS)" $(BIN)/python images/llama.py images/locks/gguf.txt
	@touch $@

# checkov pins a boto3 that is older than ours.
.venv/checkov/ready: tests/manifests/checkov.txt
	$(PYTHON) -m venv .venv/checkov
	.venv/checkov/bin/pip install --quiet -r $<
	@touch $@

# Its dependencies would make `import kubernetes` a second slower.
.venv/sbom/ready: constraints.txt
	$(PYTHON) -m venv .venv/sbom
	.venv/sbom/bin/pip install --quiet --constraint constraints.txt cyclonedx-bom
	@touch $@

.PHONY: help run test llama lint quick faults compile manifests images check-images check-cluster sbom locks bench bench-gpu clean
