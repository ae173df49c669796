# `make run` serves on http://127.0.0.1:8000; it needs Python 3.11 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run install test test-slow test-postgresql soak mutants check audit lock clean

# Installs only what the server needs, and builds GraphiQL once the server has started.
run: .venv/running
	@$(BIN)/python -m job_registry_api.first_minute

install: .venv/installed api/web/dist/index.html

test: install tests/frontend/node_modules
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

# What starts and ends many processes: shutdown, crashes, upgrades, every command's errors.
test-slow: install tests/frontend/node_modules
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup --slow -m slow

# The queue's tests once more, on the system's PostgreSQL: with LLVM, unlike the one from PyPI.
test-postgresql: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup --postgresql=debian \
		-k "not sqlite" tests/queue

# Races and storms, for so many minutes.
SOAK_MINUTES ?= 10
soak: install
	$(BIN)/python -m benchmarks.soak --minutes $(SOAK_MINUTES)

# Mutation testing: small faults in the core, and whether a test notices. SAMPLE limits their number.
SAMPLE ?=
mutants: install
	$(BIN)/python -m tests.mutants $(if $(SAMPLE),--sample $(SAMPLE))

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.docs
	$(BIN)/lint-imports

# Known vulnerabilities of the dependencies. Says so where no database of them can be reached.
audit: install
	$(BIN)/python -m tests.audit

# Hashes and no addresses: the locks serve any index.
lock: install
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-header --no-annotate \
		pyproject.toml -o requirements.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-header --no-annotate \
		pyproject.toml --group dev -o requirements-dev.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-header --no-annotate \
		--constraints requirements-dev.txt pyproject.toml --extra otel -o requirements-otel.txt

clean:
	rm -rf .venv build dist api/web/dist api/web/node_modules tests/frontend/node_modules

# What Node makes: GraphiQL, and the client that the tests generate. Where there is no Node 20 or
# newer, or it cannot fetch its packages, the page and the tests say so, and all else works.
HAS_NODE := node -e 'const [a, b] = process.versions.node.split(".").map(Number); process.exit(a > 20 || (a === 20 && b >= 19) ? 0 : 1)' 2>/dev/null

# While `api/web/building` exists, the page says that it is being built.
api/web/dist/index.html: $(wildcard api/web/*.* api/web/src/* api/web/src/tabs/*)
	@if ! $(HAS_NODE); then \
		echo "GraphiQL is not built: it needs Node 20.19 or newer. The API works without it." >&2; \
	else \
		trap 'rm -f "$(CURDIR)/api/web/building"' EXIT; trap 'exit 1' INT TERM; \
		touch api/web/building; cd api/web && npm ci --loglevel error >/dev/null && npm run --silent build -- --logLevel error || \
		echo "GraphiQL is not built: see above. The API works without it." >&2; \
	fi

tests/frontend/node_modules: tests/frontend/package-lock.json
	@if $(HAS_NODE) && (cd tests/frontend && npm ci --loglevel error >/dev/null); then touch $@; fi

# uv installs in a fraction of pip's time. It does not read pip's configuration, so where it cannot
# reach an index, pip tries.
UV_PIP = UV_HTTP_TIMEOUT=15 $(BIN)/uv pip install --quiet --python $(BIN)/python
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.venv/running: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Job Registry needs Python 3.11 or newer. $(PYTHON) is:" \
			"$$($(PYTHON) --version 2>/dev/null || echo not there)." \
			"Name another with: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating .venv ..." >&2
	@$(PYTHON) -m venv .venv
	@echo "Installing the $$(grep -c == requirements.txt) packages that the server needs ..." >&2
	@sed -n '/^uv==/,/[^\\]$$/p' requirements-dev.txt >.venv/uv.txt
	@$(PIP) --require-hashes -r .venv/uv.txt
	@$(UV_PIP) --require-hashes -r requirements.txt || $(PIP) --require-hashes -r requirements.txt
	@$(UV_PIP) --no-deps --build-constraints requirements-dev.txt --editable . || \
		$(PIP) --no-deps --editable .
	@touch $@

# Compiled here: the tests start hundreds of processes, and where Python may write no bytecode, each
# would compile all that it imports.
.venv/installed: .venv/running
	@echo "Installing the development tools ..." >&2
	@$(UV_PIP) --compile-bytecode --require-hashes -r requirements-dev.txt || \
		$(PIP) --require-hashes -r requirements-dev.txt
	@touch $@
