# gpuswitch: `make` lists what can be done.

PYTHON ?= python3
PREFIX ?= /usr/local
RELEASE ?= bookworm
BUS ?= dbus-daemon
LIBRARY ?= dbus-next
VM ?= 1
CAMPAIGNS ?= 1
BESIDE ?= 1
SEEDS ?= 10000
FAULTS ?= 5000
TARGET ?=
SECONDS ?= 60
WORKERS ?= auto
JSON ?=
PROFILE ?=
SELECT ?=
TESTS ?=

# The service runs with the system's own python3, not with a developer's that comes first on the PATH.
SYSTEM_PYTHON := $(if $(filter file,$(origin PYTHON)),/usr/bin/python3,$(PYTHON))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-from-pyproject
STAMP_FAST := $(VENV)/.has-dbus-fast

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The tests to run, by their marks (pyproject.toml).
LEFT_OUT := $(strip $(if $(CAMPAIGNS),,campaign) $(if $(BESIDE),,beside))
CHOSEN := $(if $(LEFT_OUT),-m '$(subst ~, ,$(subst $() ,~and~,$(LEFT_OUT:%=not~%)))')

.PHONY: help venv need-develop need-test need-bus need-library need-system need-cockpit need-vm demo test lint format types ansible-check system-test test-python vm-test release-test vm-shell bench simulate kubernetes fuzz docs cockpit deb stage lock install uninstall clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: venv ## switch GPUs of a simulated host, step by step (no hardware, no root)
	@$(BIN)/gpuswitchctl demo

test: need-test need-bus need-library lint types ## lint, types and the fast tests (no hardware, no root; BUS=dbus-broker: once as root; LIBRARY=dbus-fast; TESTS=FOLDER: some; WORKERS=auto)
	@BUS=$(BUS) $(BIN)/python -m tests.harness.buses
	BUS=$(BUS) DBUS_LIBRARY=$(LIBRARY) $(BIN)/pytest -n $(WORKERS) $(TESTS)

lint: venv ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: venv ## mypy, strict
	$(BIN)/mypy

format: venv ## let ruff put things in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

ansible-check: venv ## Ansible's own checks of the collection: ansible-test sanity and ansible-lint, from PyPI (Python 3.11)
	@$(BIN)/python -m tests.harness.ansible_checks

system-test: venv need-system need-cockpit ## the tests on a real systemd and bus, in containers (RELEASE=bookworm, BUS=dbus-daemon, CAMPAIGNS=: without the long ones, BESIDE=: without what stands beside the service; WORKERS=auto)
	@RELEASE=$(RELEASE) BUS=$(BUS) $(BIN)/python -m tests.harness.containers
	RELEASE=$(RELEASE) BUS=$(BUS) $(BIN)/pytest --timeout=600 -n $(WORKERS) $(CHOSEN) tests/real_system

test-python: venv need-system ## the fast tests with another release's Python, in a system of it (RELEASE=trixie or forky; TESTS=FOLDER: some; WORKERS=auto)
	@RELEASE=$(RELEASE) $(BIN)/python -m tests.harness.debian.fast_tests -n $(WORKERS) $(TESTS)

vm-test: venv need-vm ## the tests on a real kernel in virtual machines (RELEASE=bookworm; SELECT=smoke: a few; CAMPAIGNS=, BESIDE=: as above; WORKERS=auto)
	@RELEASE=$(RELEASE) $(BIN)/python -m tests.harness.virtual_machines build
	RELEASE=$(RELEASE) $(BIN)/pytest --timeout=1800 --durations=20 -n $(WORKERS) --maxschedchunk=1 $(if $(SELECT),-m $(SELECT),$(CHOSEN)) tests/real_kernel

release-test: ## all of it on all releases, with long campaigns: hours, before a release
	@.ci/steps test 'test BUS=dbus-broker' \
	    $(foreach bus,dbus-daemon dbus-broker,'test BUS=$(bus) LIBRARY=dbus-fast TESTS=tests/real_bus') \
	    $(foreach bus,dbus-daemon dbus-broker,$(foreach release,bookworm trixie forky,'system-test RELEASE=$(release) BUS=$(bus)')) \
	    $(foreach release,trixie forky,'test-python RELEASE=$(release)') \
	    $(foreach release,bookworm trixie forky,'vm-test RELEASE=$(release)') \
	    ansible-check 'simulate SEEDS=100000' kubernetes

vm-shell: venv need-vm ## a shell in such a machine, to play in
	@RELEASE=$(RELEASE) $(BIN)/python -m tests.harness.virtual_machines shell

bench: venv $(if $(PROFILE),,$(if $(VM),need-vm)) ## measure speed and size, and print them (BASE=REV: beside that revision; VM=: without the virtual machine; JSON=FILE; PROFILE=1: one switch)
	@RELEASE=$(RELEASE) $(BIN)/python -m tests.bench $(if $(VM),--vm) $(if $(BASE),--base '$(BASE)') $(if $(JSON),--json '$(JSON)') $(if $(PROFILE),--profile)

simulate: venv ## the service on machines in memory, with all that can go wrong, on every core (SEEDS=10000)
	@$(BIN)/python -m tests.harness.simulation --seeds $(SEEDS)

kubernetes: venv ## the agent of contrib/kubernetes with something wrong at any request and step (FAULTS=5000)
	@PYTHONPATH=contrib/kubernetes $(BIN)/python -m tests.harness.kubernetes --faults $(FAULTS)

fuzz: venv ## look for bytes that a reader of others' bytes does not take (TARGET=: all in turn, SECONDS=60 each)
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(TARGET)

docs: venv ## write the generated documents anew
	$(BIN)/python docs/generate_states.py
	$(BIN)/python docs/generate_dbus.py
	$(BIN)/python docs/generate_metrics.py
	$(BIN)/python docs/generate_doctor.py
	$(BIN)/python docs/generate_configuration.py
	$(BIN)/python docs/generate_man.py
	$(BIN)/python docs/generate_messages.py
	$(BIN)/python docs/generate_catalog.py
	$(BIN)/python -m docs.generate_picture

cockpit: need-cockpit ## build the page for Cockpit, into dist/cockpit/gpuswitch; `make install` and `make deb` take it from there
	@contrib/cockpit/build.sh dist/cockpit/gpuswitch

deb: ## make the Debian package, into dist/, for this system's release (RELEASE=trixie: for that one, in a system of it, as root)
ifeq ($(origin RELEASE),command line)
	@$(MAKE) venv need-system
	@RELEASE=$(RELEASE) $(BIN)/python -m tests.harness.debian.package
else
	@contrib/debian/build.sh
endif

stage: ## for who makes a package: all files but the Python ones, into DESTDIR (PREFIX=/usr; HOOK=PATH of gpuswitch/hook.py; COCKPIT=dist/cockpit/gpuswitch)
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' HOOK='$(HOOK)' COCKPIT='$(COCKPIT)' contrib/install.sh stage

lock: ## look for new versions of what an installation brings along, and write their hashes down: contrib/*.lock
	@contrib/lock.sh '$(PYTHON)'

install: ## install on this system (root; PREFIX=/usr/local, PYTHON=/usr/bin/python3)
	@PREFIX='$(PREFIX)' PYTHON='$(SYSTEM_PYTHON)' contrib/install.sh install

uninstall: ## take away what install brought, once the GPUs are home; /etc/gpuswitch stays
	@PREFIX='$(PREFIX)' contrib/install.sh uninstall

clean: ## remove what the other targets made here
	rm -rf $(VENV) dist htmlcov .coverage .coverage.* .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(STAMP)

$(STAMP): pyproject.toml | need-develop
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(STAMP_FAST): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,dbus-fast]'
	@touch $@

need-develop:
	@contrib/need.sh '$(PYTHON)' develop

need-test:
	@contrib/need.sh '$(PYTHON)' test

need-bus:
	$(if $(filter dbus-daemon dbus-broker,$(BUS)),,$(error cannot test on BUS=$(BUS): it is one of dbus-daemon, dbus-broker))
	@contrib/need.sh '$(PYTHON)' '$(BUS)'

need-library: $(if $(filter dbus-fast,$(LIBRARY)),$(STAMP_FAST))
	$(if $(filter dbus-next dbus-fast,$(LIBRARY)),,$(error cannot test with LIBRARY=$(LIBRARY): it is one of dbus-next, dbus-fast))

need-system:
	@contrib/need.sh '$(PYTHON)' system

need-cockpit:
	@contrib/need.sh '$(PYTHON)' cockpit

need-vm:
	@contrib/need.sh '$(PYTHON)' vm
