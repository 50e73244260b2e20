# What developers and CI type. `make help` lists it.

# What a target takes after its own arguments: make serve ARGS="--port 9000", make test ARGS="-k resume".
ARGS ?=
# make test PYTHONASYNCIODEBUG=1 has asyncio name slow callbacks and coroutines that nobody awaited.
PYTHONASYNCIODEBUG ?=
export PYTHONASYNCIODEBUG
# Bytecode is kept: a run starts hundreds of processes, and each would compile the package, or the tests, anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Folders and files whose tests start a process or a server, or take their time.
IMPURE_TESTS := client conformance contract end_to_end faults support responders \
	$(addprefix access/test_,addresses.py bodies.py headers.py jwks.py keeper.py ledger.py origins.py rates.py rules.py till.py tokens.py) \
	$(addprefix tasks/test_,desk.py endpoints.py local.py reporter.py run.py saq_queue.py splitting.py stream.py summarise.py tools.py worker.py) \
	$(addprefix test_,check.py comparison.py compose.py conftest.py dashboard.py decoding.py docs.py drain.py engine.py extras.py instances.py journal.py live.py \
	logs.py loop_watch.py metrics.py offload.py oneshot.py pages.py redis_access.py redis_health.py redis_store.py repository.py \
	schemas.py sealing.py server.py site.py transcript_identity.py turn.py upkeep.py wheel.py workers.py)
PURE_TESTS := tests $(addprefix --ignore=tests/,$(IMPURE_TESTS))

# A step of a gate: its name, its command. What fails says so by name and stops the gate.
step = @printf '\n== %s\n' '$(1)'; $(2) || { printf '\n== FAILED: %s\n' '$(1)' >&2; exit 1; }

.DELETE_ON_ERROR:
.PHONY: help serve test test-full test-pure compiled chaos lint format check javascript test-packages bench docs types schemas pins clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1|/' | column -t -s '|'

serve: .venv/runtime.stamp ## the server on http://127.0.0.1:8000 (ARGS are passed on)
	@exec $(BIN)/realtime serve $(ARGS)

# pytest comes last, so that its own summary ends the output.
test: .venv/dev.stamp ## everything that CI checks (ARGS go to pytest)
	$(call step,system packages,scripts/install-test-packages)
	@$(MAKE) --no-print-directory --jobs 2 --output-sync check lint javascript compiled
	@printf '\n== pytest\n'
	@exec scripts/run-tests $(ARGS)

test-full: ## the same, each thing as often as it is promised, where the gate does less (five minutes more)
	@REALTIME_TEST_FULL=1 $(MAKE) --no-print-directory test

# While the types are checked on one core: the test processes would each compile all tests anew, at once.
compiled: .venv/dev.stamp
	@$(BIN)/python -m pytest --collect-only --quiet >/dev/null 2>&1 || true

test-pure: .venv/dev.stamp ## the tests that start nothing, in five seconds (ARGS go to pytest)
	@exec $(BIN)/python -m pytest $(PURE_TESTS) $(ARGS)

chaos: .venv/dev.stamp ## several instances under random faults (ARGS="--seconds 300 --seed 7 --sessions 50")
	@exec $(BIN)/python -m tests.chaos $(ARGS)

lint: .venv/dev.stamp ## style and likely mistakes
	$(call step,ruff format --check,$(BIN)/ruff format --check .)
	$(call step,ruff check,$(BIN)/ruff check .)

format: .venv/dev.stamp ## lay out the code, mend what can be mended safely
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: .venv/dev.stamp ## types
	$(call step,mypy,$(BIN)/mypy)

javascript: ## parse and test the page's scripts
	$(call step,javascript,scripts/check-javascript)

test-packages: ## install the programs that the tests run (nginx, Chromium, Redis, Node, …), where it may
	scripts/install-test-packages

bench: .venv/dev.stamp ## the measurements (ARGS go to the relay's)
	$(BIN)/python -m bench.relay $(ARGS)
	$(BIN)/python -m bench.cancel
	$(BIN)/python -m bench.remote
	$(BIN)/python -m bench.attach
	$(BIN)/python -m bench.storm
	$(BIN)/python -m bench.offload
	$(BIN)/python -m bench.floods
	$(BIN)/python -m bench.tasks

docs: .venv/dev.stamp ## the documentation as a site, in site/
	@$(BIN)/python -m scripts.site site
	@echo "Open site/index.html, or with search: python3 -m http.server --directory site"

types: .venv/dev.stamp ## write the types of the JavaScript client anew
	cd tests/node && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	$(BIN)/python scripts/update_types.py

pins: ## write requirements/ anew, with the newest versions that pyproject.toml allows
	$$(scripts/find-python) scripts/update_pins.py

schemas: .venv/dev.stamp ## write docs/asyncapi.json and docs/openapi.json anew, out of the code
	$(BIN)/python -m scripts.schemas

clean: ## remove the environment and all caches
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

.venv/runtime.stamp: pyproject.toml requirements/runtime.txt
	@scripts/make-venv
	@echo "Installing what the server runs on ..."
	@$(PIP) install --quiet -r requirements/runtime.txt
	@$(PIP) install --quiet --no-deps --editable .
	@touch $@

.venv/dev.stamp: .venv/runtime.stamp requirements/dev.txt
	@echo "Installing what the checks run on ..."
	@$(PIP) install --quiet -r requirements/dev.txt
	@touch $@
