# make lesson_05   install, show digits from the published weights, train, sample again, print the scores
# make test        install and run the tests

PYTHON ?= python3
BIN := .venv/bin
# lesson_05a is the folder lesson_05/sublesson_a
folder = $(shell echo $(1) | sed -E 's/^(lesson_[0-9]+)([a-z])$$/\1\/sublesson_\2/')

.PHONY: help test install FORCE
help:
	@sed -n 's/^# //p' Makefile | head -2

install: .venv/.reader
.venv/.reader: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: this takes minutes, once"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.dev: .venv/.reader
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# FORCE, because the lesson's folder has the target's name and make would find it up to date.
lesson_%: .venv/.reader FORCE
	@test -f $(call folder,$@)/train.py || { echo "error: there is no $(call folder,$@); the lessons are listed in README.md" >&2; exit 2; }
	cd $(call folder,$@) && "$(CURDIR)/$(BIN)/python" sample.py weights=published
	cd $(call folder,$@) && "$(CURDIR)/$(BIN)/python" train.py
	cd $(call folder,$@) && "$(CURDIR)/$(BIN)/python" sample.py n=2048 metrics=true

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

FORCE:
