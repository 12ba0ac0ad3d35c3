# make test: everything CI runs. make chat: talk to the model that ships here. Both set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test chat lint clean

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -r requirements.txt
	touch $@

test: $(VENV)/.ready lint
	$(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/.ready
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV)
