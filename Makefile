# make demo       set up .venv, then run the whole story on real digits (minutes on a laptop)
# make test       the same set-up, then the tests
# make test-slow  the long tests too
# make compare    all objectives side by side on the digits, for an equal budget (hours on two cores); ARGS=--data=photos: on color crops of photographs (longer)
# make results    measure what docs/results.md gives of all objectives, and write the page (ten hours and more on two cores; resumes; ARGS=--only=digits)
# make bench      time the training step, sampling, start-up, data, loading and saving, evaluation (an hour on two cores); writes benchmarks/RESULTS.md
# make gpu-check  what only a GPU can show, in ten minutes on one: correctness, runs of the scripts, speeds; ARGS=--list names the checks

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo compare results test test-slow bench gpu-check lint setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python demo.py $(ARGS)

compare: $(STAMP)
	$(BIN)/python compare.py $(ARGS)

results: $(STAMP)
	$(BIN)/python -m experiments.evidence $(ARGS)
	$(BIN)/python -m docs.generate_results

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist=loadfile $(ARGS)

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m 'slow or not slow' $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

gpu-check: $(STAMP)
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)
