//! Constructors that create and register metrics of the `prometheus` crate.

use prometheus::{Counter, CounterVec, Gauge, GaugeVec, IntCounter, Opts, Registry};

/// Why creating or registering a metric cannot fail.
pub(super) const VALID: &str = "names and help texts are constants, and each is registered once";

pub(super) fn gauge(registry: &Registry, name: &str, help: &str) -> Gauge {
    let gauge = Gauge::new(name, help).expect(VALID);
    registry.register(Box::new(gauge.clone())).expect(VALID);
    gauge
}

pub(super) fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
    let gauges = GaugeVec::new(Opts::new(name, help), labels).expect(VALID);
    registry.register(Box::new(gauges.clone())).expect(VALID);
    gauges
}

pub(super) fn counter(registry: &Registry, name: &str, help: &str) -> Counter {
    let counter = Counter::new(name, help).expect(VALID);
    registry.register(Box::new(counter.clone())).expect(VALID);
    counter
}

pub(super) fn integer(registry: &Registry, name: &str, help: &str) -> IntCounter {
    let counter = IntCounter::new(name, help).expect(VALID);
    registry.register(Box::new(counter.clone())).expect(VALID);
    counter
}

pub(super) fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> CounterVec {
    let counters = CounterVec::new(Opts::new(name, help), labels).expect(VALID);
    registry.register(Box::new(counters.clone())).expect(VALID);
    counters
}
