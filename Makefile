# `make help` lists the targets. On Debian or Ubuntu only Rust has to be installed first: targets install
# missing packages, or name them in an error message. Times are for 2 cores and an empty target folder,
# including what a target builds first.

SHELL := /bin/bash
.DEFAULT_GOAL := help

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
PROGRAM := $(TARGET_DIR)/release/pathmeter

# Debian packages. prometheus is needed for promtool.
BUILD_PACKAGES := build-essential pkg-config libsystemd-dev
TEST_PACKAGES := prometheus prometheus-alertmanager python3-yaml python3-jsonschema iproute2 nftables curl openssl dnsmasq-base systemd
PACKAGE_PACKAGES := dpkg-dev binutils lintian mmdebstrap systemd-container
CONTAINER_PACKAGES := docker.io docker-compose iptables mmdebstrap busybox-static binutils python3-yaml iproute2 dnsmasq-base
COMPARE_PACKAGES := iproute2 irtt fping prometheus-smokeping-prober prometheus-blackbox-exporter traceroute mtr-tiny scamper util-linux iperf3 nuttcp

# Files on which a self-test depends besides the checker itself.
KUBERNETES_FILES := scripts/check-kubernetes.py scripts/trial.py scripts/install-test-peers.sh deploy/kubernetes deploy/docker/Dockerfile \
	deploy/prometheus/rules grafana/kustomization.yaml grafana/dashboards
DASHBOARD_FILES := scripts/check-dashboards.py scripts/test_check_dashboards.py scripts/install-test-peers.sh

.PHONY: help
help: ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: deps
deps: ## Install the Debian packages that building needs
	@./scripts/install-packages.sh $(BUILD_PACKAGES)

.PHONY: test-deps
test-deps: deps
	@./scripts/install-packages.sh $(TEST_PACKAGES)

# --- Building

.PHONY: build
build: deps ## Build the release binary, target/release/pathmeter: 2½ min
	cargo build --release --locked --package pathmeter --bin pathmeter

.PHONY: demo
demo: build ## Run three agents on loopback that measure each other for 20 seconds: 3 min
	$(PROGRAM) demo --seconds $${SECONDS_TO_RUN:-20}

.PHONY: deb
deb: build ## Build a Debian package, target/debian/pathmeter_VERSION_ARCHITECTURE.deb: 2½ min
	./scripts/build-deb.sh $(PROGRAM)

# --- Checks that must pass before every change: make test and its parts

.PHONY: test
test: test-deps peers lint release rules dashboards compose packaging kubernetes tests ## Run all checks of CI: 15 min

.PHONY: lint
lint: deps ## Check format, lints, documentation and Rust versions: 3 min
	cargo fmt --all --check
	./scripts/check-rust-version.py
	./scripts/check-links.py
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings
	cargo clippy --locked --package pathmeter --lib --bins --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --all-features --no-deps --document-private-items

.PHONY: release
release: build test-deps ## Check the release binary: version, example configuration, HTTP API and demo: 3 min
	$(PROGRAM) --version
	$(PROGRAM) check config.example.yaml
	./scripts/check-api.py $(PROGRAM)
	$(PROGRAM) demo --seconds 3

.PHONY: tests
tests: test-deps peers ## Run all Rust tests, including the lab: 7 min
	cargo test --locked --workspace --all-features --doc
	./scripts/run-tests.sh

.PHONY: lab
lab: test-deps ## Run only the lab, the real program on test networks with known loss and delay: 4 min
	./scripts/run-tests.sh lab

.PHONY: rules
rules: test-deps ## Check Prometheus rules and configuration and Alertmanager inhibitions: 1 min
	promtool check config deploy/prometheus/prometheus.yml
	promtool check config --syntax-only deploy/prometheus/remote_write.example.yaml deploy/prometheus/federation.example.yaml \
	  deploy/docker/prometheus.yml
	amtool check-config deploy/prometheus/alertmanager.yml
	./scripts/check-inhibitions.py
	./scripts/check-rules.py
	./scripts/check-rules.py --test

.PHONY: dashboards
dashboards: test-deps ## Check dashboards against the metrics and against Grafana's schema: 10 s
	./scripts/install-test-peers.sh --only grafana
	./scripts/check-dashboards.py
	target/peers/grafana/bin/python3 scripts/check-dashboards.py --schema
	./scripts/run-if-changed.sh $(DASHBOARD_FILES) -- target/peers/grafana/bin/python3 scripts/test_check_dashboards.py

.PHONY: compose
compose: ## Check that docker-compose can read deploy/docker/compose.yaml: 1 s
	@./scripts/install-packages.sh docker-compose python3-yaml
	./scripts/check-containers.py --config

.PHONY: units
units: test-deps
	set -o pipefail; systemd-analyze security --offline=true --threshold=15 --no-pager deploy/systemd/pathmeter.service | tail -n 1
	./scripts/check-units.sh

.PHONY: packaging
packaging: units deb ## Check the units, and install, run and purge the Debian package in a clean root: 3 min
	@./scripts/install-packages.sh $(PACKAGE_PACKAGES)
	lintian --allow-root --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs target/debian/*.deb
	./scripts/check-deb.sh target/debian/*.deb

.PHONY: kubernetes
kubernetes: test-deps build ## Check deploy/kubernetes against the schemas, and run four of its pods without a cluster: 3 min
	./scripts/install-test-peers.sh --only kubernetes kubectl
	PATHMETER=$(PROGRAM) ./scripts/check-kubernetes.py
	PATHMETER=$(PROGRAM) ./scripts/run-if-changed.sh $(KUBERNETES_FILES) -- ./scripts/check-kubernetes.py --self-test
	PATHMETER=$(PROGRAM) ./scripts/check-kubernetes.py --run

.PHONY: peers
peers: deps ## Install the programs for interoperability tests in ~/.cache/pathmeter: 2 min once
	./scripts/install-test-peers.sh

# --- Checks to run before a larger change is finished

.PHONY: long
long: containers boot seeds mutants lab-long ## Run the five targets below: 6 h

.PHONY: containers
containers: ## Build the image and run the compose file with Docker until an alert fires: 12 min, then 7
	@./scripts/install-packages.sh $(CONTAINER_PACKAGES)
	./scripts/check-containers.py

.PHONY: boot
boot: deb ## Boot Debian in a container and test unit, socket, watchdog and package there: 5 min
	@./scripts/install-packages.sh $(PACKAGE_PACKAGES)
	./scripts/boot-under-systemd.sh

.PHONY: seeds
seeds: deps ## Run the simulations with ten times the seeds: 3 min
	SIM_TIMES=$(or $(SIM_TIMES),10) cargo test --locked --package pathmeter-proto --all-features

.PHONY: mutants
mutants: deps ## Mutation tests of the code that decides verdicts: hours; FILE=proto/src/echo/flow/mod.rs or SHARD=0/20 for a part
	./scripts/mutants.py $(FILE) $(if $(SHARD),--shard $(SHARD))

.PHONY: lab-long
lab-long: test-deps ## Run the trials of the lab that take ten minutes or an hour each: 2 h
	./scripts/run-tests.sh lab-long

# --- Measurements

.PHONY: bench
bench: deps ## Compare with bare loops and budgets; prints tables: 23 min
	cargo bench --locked --bench budgets

.PHONY: scale
scale: deps ## Measure how many paths and requests per second one agent handles; prints tables: 15 min
	cargo bench --locked --bench budgets -- scale

.PHONY: compare
compare: deps ## Compare with other tools on links with known loss and delay; prints tables: 32 min
	@./scripts/install-packages.sh $(COMPARE_PACKAGES)
	@./scripts/install-test-peers.sh >/dev/null
	@for peer in trippy ftr; do ./scripts/install-test-peers.sh --only $$peer >/dev/null \
	  || echo "$$peer cannot be installed from crates.io: it is left out" >&2; done
	@cargo bench --locked --bench compare -- $(SECTIONS)

.PHONY: clean
clean: ## Remove all build output
	cargo clean
