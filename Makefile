# make test: everything CI runs. make chat: talk to the model that ships here. Both set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test chat lint clean

$(VENV)/.ready: requirements.txt
	@echo 'setting up $(VENV): a few minutes the first time' >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -r requirements.txt >&2
	@touch $@

chat: $(VENV)/.ready
	@$(BIN)/python inference/generate.py --ckpt-path tiny/checkpoint --interactive

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -m "not gpu" -n auto

lint: $(VENV)/.ready
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV)
