# make demo, make test and make bench need nothing before them but Debian or Ubuntu with Rust: what is missing is
# installed, or named.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# To build; promtool, which Debian has in its package prometheus, to check what is exported; ip, for the lab; curl and
# openssl, to ask over HTTPS as others do.
BUILD_PACKAGES := build-essential pkg-config libsystemd-dev
TEST_PACKAGES := prometheus prometheus-alertmanager python3-yaml iproute2 curl openssl dnsmasq-base systemd
# To try the package, in a root of its own.
PACKAGE_PACKAGES := dpkg-dev binutils lintian mmdebstrap systemd-container
# To make the image's Debian, and to look into the binary.
IMAGE_PACKAGES := mmdebstrap binutils
# Made of the program that the tests build anyway; make deb packs the release.
TRIED := target/debian/tried
# Whom make compare measures beside us, and what makes networks.
RIVAL_PACKAGES := iproute2 irtt fping prometheus-smokeping-prober prometheus-blackbox-exporter

.PHONY: help
help: ## Show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: deps
deps: ## Install the Debian packages that building needs
	@./scripts/install-packages.sh $(BUILD_PACKAGES)

.PHONY: test-deps
test-deps: deps
	@./scripts/install-packages.sh $(TEST_PACKAGES)

.PHONY: build
build: deps ## Build the release binary: target/release/pathmeter
	cargo build --release --locked

.PHONY: demo
demo: build ## Three agents on loopback that measure each other, for 20 seconds
	./target/release/pathmeter demo --seconds $${SECONDS_TO_RUN:-20}

.PHONY: deb
deb: build ## A Debian package: target/debian/pathmeter_VERSION_ARCHITECTURE.deb
	./scripts/build-deb.sh

.PHONY: boot
boot: deb ## Boot a Debian in a container, and try unit, socket, watchdog and package there, in two minutes
	@./scripts/install-packages.sh $(PACKAGE_PACKAGES)
	./scripts/boot-under-systemd.sh

.PHONY: units
units: test-deps
	set -o pipefail; systemd-analyze security --offline=true --threshold=15 --no-pager deploy/systemd/pathmeter.service | tail -n 1
	./scripts/check-units.sh

.PHONY: packaging
packaging: units ## The units and the package: rated, verified, linted, installed and purged in a root of its own
	@./scripts/install-packages.sh $(PACKAGE_PACKAGES)
	cargo test --locked --workspace --all-features --no-run --test it
	OUT=$(TRIED) ./scripts/build-deb.sh $(or $(CARGO_TARGET_DIR),target)/debug/pathmeter
	lintian --allow-root --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs $(TRIED)/*.deb
	./scripts/check-deb.sh $(TRIED)/*.deb

.PHONY: kubernetes
kubernetes: test-deps ## deploy/kubernetes: what kustomize makes of it, and its pods without a cluster, with planted mistakes
	./scripts/install-test-peers.sh --only kubernetes kubectl
	cargo test --locked --workspace --all-features --no-run --test it
	./scripts/check-kubernetes.py
	./scripts/check-kubernetes.py --self-test
	./scripts/check-kubernetes.py --run

.PHONY: compose
compose: test-deps ## deploy/docker/compose.yaml: what it says, and its services without Docker, with planted mistakes
	./scripts/install-test-peers.sh --only kubernetes
	cargo test --locked --workspace --all-features --no-run --test it
	./scripts/check-compose.py
	./scripts/check-compose.py --self-test
	./scripts/check-compose.py --run

.PHONY: image
image: test-deps ## Build deploy/docker/Dockerfile without Docker and try what comes out, in seven minutes
	@./scripts/install-packages.sh $(IMAGE_PACKAGES)
	./scripts/check-image.py

.PHONY: test
test: test-deps peers lint rules packaging dashboards kubernetes compose ## Everything that must hold but make image and make boot: format, lints, tests, docs, rules, package, dashboards, manifests
	cargo test --locked --workspace --all-features --doc
	./scripts/run-tests.sh

.PHONY: lab
lab: test-deps ## The real program on networks whose truth is known; a part of make test
	./scripts/run-tests.sh lab

.PHONY: lab-long
lab-long: test-deps ## The same for hours
	./scripts/run-tests.sh lab-long

.PHONY: lint
lint: deps
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings
	cargo clippy --locked --no-default-features --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --all-features --no-deps --document-private-items

.PHONY: rules
rules: test-deps
	promtool check config deploy/prometheus/prometheus.yml
	promtool check config --syntax-only deploy/prometheus/remote_write.example.yaml deploy/prometheus/federation.example.yaml
	amtool check-config deploy/prometheus/alertmanager.yml
	./scripts/check-inhibitions.py
	./scripts/check-rules.py
	./scripts/check-rules.py --test

.PHONY: dashboards
dashboards: test-deps
	./scripts/install-test-peers.sh --only grafana
	./scripts/check-dashboards.py
	target/peers/grafana/bin/python3 scripts/check-dashboards.py --schema
	target/peers/grafana/bin/python3 scripts/test_check_dashboards.py

.PHONY: peers
peers: deps
	./scripts/install-test-peers.sh

.PHONY: bench
bench: deps ## Measure against the bare loops and the budgets; prints tables, in a quarter of an hour
	cargo bench --locked --bench budgets

.PHONY: scale
scale: deps ## How many paths and how many requests a second one agent stands; prints tables, in a quarter of an hour
	cargo bench --locked --bench budgets -- scale

.PHONY: compare
compare: deps ## Measure us and others on links whose truth is known; prints tables
	@./scripts/install-packages.sh $(RIVAL_PACKAGES)
	@./scripts/install-test-peers.sh >/dev/null
	@cargo bench --locked --bench compare -- $(SECTIONS)

.PHONY: clean
clean: ## Remove everything that was built
	cargo clean
