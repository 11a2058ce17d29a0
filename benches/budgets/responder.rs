//! Cost of a reply.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use super::agent::{BenchAgent, NO_PATHS};
use super::bare::{BareResponder, per_echo};
use super::load::{self, RequestRate};
use super::report::{Row, median};

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(2);

/// Highest ratio of the cost of a reply to that of the bare loop.
const RATIO_MAX: f64 = 1.3;

pub(crate) fn measure() -> io::Result<Vec<Row>> {
    let mut rows = at("at 10,000/s", RequestRate::PerSecond(10_000), 12.0)?;
    rows.extend(at("saturated", RequestRate::Saturated, 2.5)?);
    Ok(rows)
}

fn at(name: &str, rate_limit: RequestRate, budget: f64) -> io::Result<Vec<Row>> {
    let agent = BenchAgent::start(NO_PATHS)?;
    let agent_address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, agent.stamp_port);
    let (mut ours, mut bare, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let before = agent.cpu()?;
        let answered = load::generate(agent_address, rate_limit, ROUND)?;
        ours.push(per_echo(agent.cpu()? - before, answered.replies));
        rates.push(answered.per_second / 1e3);
        let echo = BareResponder::start()?;
        load::generate(echo.address, rate_limit, ROUND)?;
        bare.push(echo.finish());
    }
    let (ours, bare) = (median(ours), median(bare));
    Ok(vec![
        Row::new(format!("CPU per answer, {name}"), ours, "µs").bare(bare).budget(budget),
        Row::new(format!("the same in bare loops, {name}"), ours / bare, "×").budget(RATIO_MAX),
        Row::new(format!("answers a second, {name}"), median(rates), "k"),
    ])
}
