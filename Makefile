# make demo   the four phases on phantoms, minutes on two cores; ends with the path of the report, which shows the heatmaps
# make test   the tests
# make lint   the linter and the formatter, as checks
# Each makes .venv and installs what it needs. PYTHON=python3.12 chooses the interpreter, SEED=1 another demo, DEMO=folder another
# place for it, ARGS="--runtime.resume False" more flags for every phase. A second make demo draws the same phantoms, goes on
# training where the first stopped, and examines anew; each phase says so.

PYTHON ?= python3
SEED ?= 0
DEMO ?= outputs/demo$(if $(filter-out 0,$(SEED)),-seed$(SEED))
BIN := .venv/bin
RUN := NO_ALBUMENTATIONS_UPDATE=1 $(BIN)/python
PHANTOMS := --train 240 --val 30 --test-normal 30 --test-per-lesion 15 --height 128 --width 256
DEMO_ARGS := --preset demo --outputs $(DEMO) --data.root $(DEMO)/phantoms --runtime.seed $(SEED) $(ARGS)

.PHONY: demo test lint clean

demo: .venv/installed
	$(RUN) -m phantoms.phantom --out $(DEMO)/phantoms $(PHANTOMS) --seed $(SEED)
	$(RUN) train_vae.py $(DEMO_ARGS)
	$(RUN) extract_latents.py $(DEMO_ARGS)
	$(RUN) train_flowdiff.py $(DEMO_ARGS)
	$(RUN) inference.py $(DEMO_ARGS)

test: .venv/installed-dev
	$(RUN) -m pytest -n 2

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf outputs .venv
