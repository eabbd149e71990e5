# The same commands on a laptop and in CI. Each does its own set-up in .venv; PYTHON names the interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: $(shell sed -nE 's/^([a-z-]+):.*##.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install the package with everything its development needs

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; set PYTHON=python3.x"'
	@echo "setting up $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## run the demo: a support desk, bare and then wrapped (DEMO='--details' for options)
	$(BIN)/orla-lg demo $(DEMO)

# More processes than the usual two cores: some tests wait for a clock or another process.
WORKERS := 3

test: $(STAMP) ## run the tests, in three processes (TESTS='tests/core -x': some of them, in one)
	$(BIN)/python -m pytest $(or $(TESTS),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)

test-random: $(STAMP) ## the tests by Hypothesis with other examples at each of ten runs (half an hour)
	for run in 1 2 3 4 5 6 7 8 9 10; do ORLA_HYPOTHESIS=random $(BIN)/python -m pytest -q -m hypothesis $(TESTS) || exit 1; done

test-engines: $(STAMP) ## the tests on real engines: vLLM and llama.cpp on the CPU (installs 3.4 GB the first time)
	$(BIN)/python -m pytest -o timeout=1500 -m engines tests/engines tests/adapters $(TESTS)

test-kills: $(STAMP) ## kill llama.cpp 300 times and vLLM 20 times under sixteen streams (half an hour; run it alone)
	ORLA_ALL_KILLS=1 $(BIN)/python -m pytest -s -m engines tests/engines/test_kills.py $(TESTS)

test-langgraph: $(STAMP) ## LangGraph's own tests, bare and with every graph wrapped (SUITE='--help'; ten minutes)
	$(BIN)/python tests/langgraph_suite/run.py $(SUITE)

test-agents-suite: $(STAMP) ## LangChain's own tests of agents, bare and wrapped (SUITE=--tools: with tools that start early; three minutes)
	$(BIN)/python tests/langgraph_suite/run.py --agents $(SUITE)

test-storm: $(STAMP) ## 2,000 runs that end in every way while tools run that started early; nothing may be left (two minutes)
	ORLA_ALL_STORMS=1 $(BIN)/python -m pytest -s tests/tools/test_storm.py $(TESTS)

test-clients: $(STAMP) ## all clients of docs/clients.md, also those that ask for other versions than ours, in .venv-clients
	$(BIN)/uv venv --quiet --clear .venv-clients
	$(BIN)/uv pip install --quiet --python .venv-clients --group clients --editable '.[dev]'
	.venv-clients/bin/python -m pytest tests/clients $(TESTS)

test-serve-kills: $(STAMP) ## kill and freeze cores and replicas of orla-lg serve 108 times under load (half an hour; KILLS=one: three minutes)
	ORLA_ALL_KILLS=$(if $(filter one,$(KILLS)),0,1) $(BIN)/python -m pytest -s -m kills tests/serve_kills $(TESTS)

test-ray: $(STAMP) ## cores on a Ray cluster of several raylets, killed with process, node and head; and examples/ray (installs 500 MB; two minutes)
	$(BIN)/uv pip install --quiet --python $(VENV) --editable '.[dev,ray]' 'ray[serve]>=2.60,<3'
	$(BIN)/python -m tests.serve.ray.run $(TESTS)
	$(BIN)/python examples/ray/run.py

test-scale-faults: $(STAMP) ## kill and freeze cores, standbys, replicas, gateways and Redis 241 times under load, at two sites at once (26 minutes; FAULTS=one: six, few: two)
	$(BIN)/python -m tests.scale_faults $(if $(filter one few,$(FAULTS)),--$(FAULTS),$(FAULTS))

test-agent-server: $(STAMP) ## two of LangGraph's Agent Servers (langgraph dev) on one orla-lg serve; installs langgraph-cli[inmem] if it is missing
	$(BIN)/python -c 'import langgraph_api' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'langgraph-cli[inmem]>=0.4'
	$(BIN)/python -m pytest -m agent_server tests/agent_server $(TESTS)

test-coding-agents: $(STAMP) ## Codex and Claude Code, from npm, a turn with a tool each at the gateway, without a network (installs 800 MB)
	$(BIN)/python -m tests.coding_agents.run $(TESTS)

check: $(STAMP) ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-overhead: $(STAMP) ## added time per call against plain ChatOpenAI (a few minutes; run it alone)
	$(BIN)/python -m bench.overhead $(BENCH)

check-overhead: $(STAMP) ## fail if a wrapped call takes more CPU than the goal, as a ratio to plain (three minutes; run it alone)
	$(BIN)/python -m bench.overhead --check $(BENCH)

bench-streaming: $(STAMP) ## CPU and memory of a stream against plain ChatOpenAI (two minutes; run it alone)
	$(BIN)/python -m bench.streaming $(BENCH)

bench-sim: $(STAMP) ## the simulated engine against a live vLLM (BENCH='--sessions FILE'; run it alone)
	$(BIN)/python -m bench.fidelity $(BENCH)

bench-mapping: $(STAMP) ## mapped stages against all-heavy, on two real engines (BENCH='--help'; run it alone)
	$(BIN)/python -m bench.mapping $(BENCH)

bench-mapping-decision: $(STAMP) ## microseconds of a mapping decision, for each mapper
	$(BIN)/python -m bench.mapping.decision $(BENCH)

bench-router: $(STAMP) ## the learned mapper on labelled prompts, beside ways that need no learning (BENCH='FILE')
	$(BIN)/python -m bench.router $(BENCH)

bench-scale: $(STAMP) ## 130,000 calls waiting in the core, on one core without an engine (some minutes; run it alone)
	$(BIN)/python -m bench.scale $(BENCH)

bench-scale-paper: $(STAMP) ## up to 64 pools in virtual time, and what 10,000 workflows a second need (ten minutes; run it alone)
	$(BIN)/python -m bench.scale.paper $(BENCH)

bench-policies: $(STAMP) ## completion under each policy, simulated in virtual time (BENCH='--quick' for a minute)
	$(BIN)/python -m bench.policies $(BENCH)

bench-pressure: $(STAMP) ## twelve agents and a cache for five, on a real vLLM (half an hour; BENCH='--help'; run it alone)
	$(BIN)/python -m bench.pressure $(BENCH)

bench-cache: $(STAMP) ## flush per request, per workflow or by LRU, on real llama.cpp and vLLM (a quarter of an hour; run it alone)
	$(BIN)/python -m bench.cache $(BENCH)

bench-fanout: $(STAMP) ## eight Send branches with a prefix in common, on real llama.cpp (ten minutes; run it alone)
	$(BIN)/python -m bench.fanout $(BENCH)

bench-ledger: $(STAMP) ## memory and microseconds of the account of a cache, for 10,000 workflows (a minute)
	$(BIN)/python -m bench.ledger $(BENCH)

bench-slots: $(STAMP) ## sixteen workflows on four slots of a real llama.cpp, against its RAM cache (ten minutes; run it alone)
	$(BIN)/python -m bench.slots $(BENCH)

bench-move: $(STAMP) ## a workflow that is moved between two real llama.cpp servers: restored, warmed or cold (three minutes; run it alone)
	$(BIN)/python -m bench.move $(BENCH)

bench-warm: $(STAMP) ## warm-ups after tool waits, before a next stage, after a night, on real llama.cpp and vLLM (half an hour; run it alone)
	$(BIN)/python -m bench.warm $(BENCH)

bench-serve: $(STAMP) ## what orla-lg serve adds by link and as a gateway, beside LiteLLM's proxy (ten minutes; installs 600 MB once; run it alone)
	$(BIN)/python -m bench.serve $(BENCH)

bench-scale-out: $(STAMP) ## 1, 2 and 4 cores with 4 to 16 replicas: wait, calls a second, a core's CPU per call (BENCH='--quick'; run it alone)
	$(BIN)/python -m bench.scale_out $(BENCH)

bench-threads: $(STAMP) ## microseconds that a lease on its thread adds to a run and to a checkpoint (half a minute; run it alone)
	$(BIN)/python -m bench.threads $(BENCH)

bench-page: $(STAMP) ## the live page under 2,000 waiting calls: frames, event to picture, the server's CPU (BENCH=--write draws it, too; run it alone)
	$(BIN)/python -m bench.page $(BENCH)

bench-tools: $(STAMP) ## early tools and split prompts: FTR and end to end beside the law, and under load (BENCH='--quick' for two minutes)
	$(BIN)/python -m bench.tools $(BENCH)

bench-observe: $(STAMP) ## CPU that metrics and a span add to a call, and what sending spans takes (a minute; run it alone)
	$(BIN)/python -m bench.observe $(BENCH)

house: $(STAMP) ## how the code stands: what one call passes, circles, large classes, prose, lines, locks
	$(BIN)/python -m bench.house $(HOUSE)

soak: $(STAMP) ## ten minutes of 80 calls a second under faults and cancellations; nothing may be lost (SOAK='--help'; run it alone)
	$(BIN)/python -m bench.soak $(SOAK)

bench-replay: $(STAMP) ## agents recorded under three policies on a real vLLM, and what a replay says of them (five minutes; run it alone)
	$(BIN)/python -m bench.replay $(BENCH)

picture-top: $(STAMP) ## docs/top.svg: orla-lg top beside a run on simulated engines
	$(BIN)/python -m bench.top

picture-trace: $(STAMP) ## docs/trace.svg: what LangSmith gets of a run on an embedded engine
	$(BIN)/python -m bench.trace $(BENCH)

page-tutorial: $(STAMP) ## docs/tutorial.md: what its commands and its code print today (a minute; starts two engines)
	$(BIN)/python -m bench.tutorial

clean: ## remove the environment and all caches in the tree
	rm -rf $(VENV) .venv-clients dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
