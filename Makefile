# Every target sets up what it needs first; the second time that takes a second or two.
# `make train` is the whole way: data, training, plots. On a CPU it is a short real run of a fast network, with CUDA a report's
# full recipe.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
ARCH ?=
RUN ?=
# Two cores train speed94_half by its recipe in about three minutes. They train a report's network on about 300 images a second:
# 4 epochs of 8,000 leave room within five minutes, and so short a run is better off without mixing and cutout.
CPU_OPTIONS ?= $(if $(filter-out speed94_half,$(ARCH)), \
	--epochs 4 --limit-train 8000 --limit-test 2000 --batch-size 64 --mixup-alpha 0 --cutout 0)
# What FFCV builds with.
DEBIAN := pkg-config libopencv-dev libturbojpeg0-dev build-essential
BIN := .venv/bin
# One process a logical core with one thread each (tests/conftest.py): two threads in each would slow each other twenty-fold.
PARALLEL ?= --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: help setup data train demo test test-slow soak fuzz mistakes endurance audit gpu-check augmentation-grid bench bench-quick bench-pipeline lint format docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready  ## prepare the environment: Debian packages FFCV builds with, uv, the locked Python packages

.venv/.ready: pyproject.toml uv.lock setup.sh
	@PYTHON=$(PYTHON) DEBIAN="$(DEBIAN)" bash setup.sh
	@touch $@

data: setup  ## write data/beton from CIFAR_DIR, data/, a download, or a synthetic dataset
	@$(BIN)/python data_prep/write_beton.py

train: data  ## train (ARCH=..., RUN=..., OPTIONS='--seed 1'): a real run that ends with plots in runs/
	@arch=$(or $(ARCH),se_resnet18); options=; if ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	arch=$(or $(ARCH),speed94_half); for word in $(CPU_OPTIONS); do \
	case $$word in --*) case ' $(OPTIONS) ' in *" $$word "*|*" $$word="*) own= ;; *) own=1 ;; esac ;; esac; \
	if [ "$$own" ]; then options="$$options $$word"; fi; done; fi; \
	$(BIN)/python -m fastcifar.train --arch $$arch --out $(or $(RUN),runs/$$arch-$$(date +%Y%m%d-%H%M%S)) $$options $(OPTIONS)

demo: data  ## a minute of training on two CPU cores, and one picture of what came of it: demo.png
	@$(BIN)/python -m fastcifar.demo

test: setup  ## lint, types, import contracts and the tests, in a few minutes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest $(PARALLEL) --durations=10

test-slow: setup  ## the tests that take minutes
	@$(BIN)/python -m pytest $(PARALLEL) --durations=10 -m slow

gpu-check: setup  ## on a machine with CUDA: every test that needs one
	@$(BIN)/python -m pytest -m gpu

augmentation-grid: data  ## draw what training sees by ARCH's recipe into docs/augmentation-ARCH.png
	@$(BIN)/python -m fastcifar.augmentation --arch $(or $(ARCH),se_resnet18) --out docs/augmentation-$(or $(ARCH),se_resnet18).png

bench: data  ## speed and accuracy of every architecture beside other training loops, with a report (BENCH='--seeds 0 1'): long, resumable
	@$(BIN)/python bench/run.py $(BENCH)

bench-quick: data  ## the same in small: a complete report within ten minutes on two CPU cores
	@$(BIN)/python bench/run.py --quick $(BENCH)

bench-pipeline: data  ## input pipelines, training step and time to the first step, measured on this machine
	@$(BIN)/python bench/input_pipelines.py

soak: setup  ## kill training and the writing of betons at 200 random moments, go on, compare every bit (15 minutes)
	@$(BIN)/python -m tests.reliability.soak --kills 200 $(SOAK)

fuzz: setup  ## 3,000 damaged or hostile files for each of eight readers (15 minutes)
	@$(BIN)/python -m tests.reliability.fuzz --target all --cases 3000 $(FUZZ)

mistakes: setup  ## 500 wrong command lines over every command (2 minutes)
	@$(BIN)/python -m tests.reliability.mistakes --count 650 $(MISTAKES)

endurance: setup  ## an hour of training, resuming and evaluating in one process: does anything grow?
	@$(BIN)/python -m tests.reliability.endurance --minutes 60 $(ENDURANCE)

audit: setup  ## ask the public advisories about every locked package; needs a network
	@export PATH="$$PWD/.uv/bin:$$PATH"; list=$$(mktemp); trap 'rm -f "$$list"' EXIT; \
	uv export --locked --all-extras --all-groups --no-emit-project --quiet > "$$list"; \
	uv tool run pip-audit --requirement "$$list" --disable-pip --require-hashes

lint: setup  ## ruff, mypy and the import contracts only
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup  ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: data  ## build the site into site/ and run its notebook, a minute of training
	@export PATH="$$PWD/.uv/bin:$$PATH"; uv run --locked --quiet --group docs mkdocs build

clean:  ## remove the environment and caches; data and runs stay
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
