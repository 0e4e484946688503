PYTHON ?= python

.PHONY: help install test lint types fuzz notebooks demo paper docs benchmark coverage matrix dist ci

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install:  ## the package, editable, with everything that developing it needs
	$(PYTHON) -m pip install -e ".[test]"

test:  ## unit tests, doctests, the README's code
	$(PYTHON) -m pytest

lint:  ## ruff: rules and formatting
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check

types:  ## mypy
	$(PYTHON) -m mypy

fuzz:  ## the property tests with 10,000 examples each
	HYPOTHESIS_PROFILE=fuzz $(PYTHON) -m pytest tests -m hypothesis

notebooks:  ## run every notebook
	$(PYTHON) -m pytest --nbmake examples/*.ipynb

demo:  ## the paper's Table 4(a) on the embedded world
	maft-adapter demo

paper:  ## the paper's tables on the embedded world, as docs/paper shows them; hours on two cores
	maft-adapter paper all --seeds 3 --out docs/paper

docs:  ## the documentation site, into site/
	$(PYTHON) -m mkdocs build --strict

benchmark:  ## the encoder against plain CLIP, the dense form and crops
	$(PYTHON) -m benchmarks.encoder

coverage:  ## every configuration of open_clip's image towers
	$(PYTHON) -m benchmarks.coverage

matrix:  ## the tests with the oldest and the newest of everything, on every Python that is here
	$(PYTHON) -m nox

dist:  ## sdist and wheel, as an index takes them
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*

ci:  ## all of the above that a change has to pass, in a fresh environment
	.ci/run
