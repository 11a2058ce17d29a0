#![expect(clippy::disallowed_methods, reason = "SIM_SEED and SIM_TIMES choose the networks")]

use super::stopping_rule::failure_probability;
use super::*;
use crate::schedule::mix;

/// Seeds to try: `SIM_SEED=n` replays one, `SIM_TIMES=x` multiplies their number.
fn seeds(count: u32) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<f64>().ok());
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates")]
    let whole = |number: f64| number.ceil() as u64;
    match number("SIM_SEED").map(whole) {
        Some(seed) => seed..seed + 1,
        None => 0..whole(f64::from(count) * number("SIM_TIMES").unwrap_or(1.0)),
    }
}

/// A sequence of random numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(mix(self.0)) % bound
    }

    fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most - least + 1)
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// A network of routers that balance by flow. Node 0 is the source.
struct Network {
    nodes: Vec<Node>,
    random: Random,
    seed: u64,
}

#[derive(Clone)]
struct Node {
    next: Vec<Next>,
    /// Percentage of the expired packets that it answers.
    answers: u64,
    /// Whether each packet takes another link.
    is_per_packet: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Next {
    Node(usize),
    Destination,
}

impl Network {
    fn new(seed: u64) -> Self {
        let source = Node { next: Vec::new(), answers: 100, is_per_packet: false };
        Self { nodes: vec![source], random: Random(seed << 32), seed }
    }

    /// Adds a router behind these.
    fn router(&mut self, before: &[usize]) -> usize {
        let added = self.nodes.len();
        self.nodes.push(Node { next: Vec::new(), answers: 100, is_per_packet: false });
        for node in before {
            self.nodes[*node].next.push(Next::Node(added));
        }
        added
    }

    /// Adds `width` routers behind one.
    fn branches(&mut self, before: usize, width: usize) -> Vec<usize> {
        (0..width).map(|_| self.router(&[before])).collect()
    }

    /// Puts the destination behind all routers that have no successor yet.
    fn close(mut self) -> Self {
        for node in self.nodes.iter_mut().filter(|node| node.next.is_empty()) {
            node.next.push(Next::Destination);
        }
        self
    }

    /// A chain of `before` routers, a router with `width` successors, and one behind these.
    fn diamond(seed: u64, before: usize, width: usize) -> Self {
        let mut network = Self::new(seed);
        let last = (0..before).fold(0, |last, _| network.router(&[last]));
        let branches = network.branches(last, width);
        network.router(&branches);
        network.close()
    }

    /// Routers and diamonds in a row. Branches of narrow diamonds contain further diamonds, and branches can
    /// have different lengths.
    fn random(seed: u64) -> Self {
        let mut network = Self::new(seed);
        let mut last = network.router(&[0]);
        for _ in 0..network.random.between(1, 3) {
            let width = network.random.between(2, 16);
            last = network.part(last, width, width <= 4);
        }
        network.close()
    }

    /// Adds a diamond, or a router if the width is below 2, behind a router. Returns its last router.
    fn part(&mut self, before: usize, width: u64, has_parts: bool) -> usize {
        let head = self.router(&[before]);
        if width < 2 {
            return head;
        }
        let ends: Vec<usize> = (0..width)
            .map(|_| {
                let has_width = has_parts && self.random.chance(50);
                let width = if has_width { self.random.between(2, 4) } else { 1 };
                self.part(head, width, false)
            })
            .collect();
        self.router(&ends)
    }

    fn address(node: usize) -> IpAddr {
        std::net::Ipv4Addr::from_bits(0x0a00_0000 + u32::try_from(node).unwrap()).into()
    }

    fn reached(next: Next) -> Reached {
        match next {
            Next::Node(node) => Reached::Router(Self::address(node)),
            Next::Destination => Reached::Destination,
        }
    }

    /// Who answers a probe.
    fn probe(&mut self, probe: PathProbe) -> Option<Reached> {
        let mut at = 0;
        for _ in 0..probe.ttl {
            let next = &self.nodes[at].next;
            let count = next.len() as u64;
            let choice = match self.nodes[at].is_per_packet {
                true => self.random.below(count),
                false => mix(mix(self.seed << 20 | at as u64) ^ u64::from(probe.flow)) % count,
            };
            match self.nodes[at].next[usize::try_from(choice).unwrap()] {
                Next::Destination => return Some(Reached::Destination),
                Next::Node(node) => at = node,
            }
        }
        let answers = self.nodes[at].answers;
        self.random.chance(answers).then(|| Self::reached(Next::Node(at)))
    }

    /// The nodes that can be reached with each TTL, from TTL 0 on.
    fn hops(&self) -> Vec<BTreeSet<usize>> {
        let mut hops = vec![BTreeSet::from([0])];
        while let Some(last) = hops.last().filter(|last| !last.is_empty() && hops.len() < 64) {
            let next = last.iter().flat_map(|node| &self.nodes[*node].next);
            let nodes = next.filter_map(|next| match next {
                Next::Node(node) => Some(*node),
                Next::Destination => None,
            });
            hops.push(nodes.collect());
        }
        hops
    }

    /// The sum of the probabilities that the stopping rule misses a successor, over all routers that were
    /// found, except those of the last hop.
    fn failure_bound(&self, paths: &EqualCostPaths) -> f64 {
        let hops = paths.hops.iter().take(paths.hops.len() - 1);
        let widths = hops.flat_map(routers).map(|node| self.nodes[node].next.len());
        widths.filter(|width| *width > 1).map(failure_probability).sum()
    }

    /// Whether a successor of a found router was missed at a hop that is said to be complete.
    fn has_false_claim(&self, paths: &EqualCostPaths) -> bool {
        let complete = paths.hops.iter().filter(|hop| hop.completeness == Completeness::Complete);
        let mut missed = complete.flat_map(|hop| {
            let before = match hop.ttl {
                1 => vec![0],
                ttl => routers(&paths.hops[usize::from(ttl) - 2]),
            };
            before
                .into_iter()
                .flat_map(|node| self.nodes[node].next.iter().map(move |next| (node, *next)))
                .map(|(node, next)| {
                    let to = Self::reached(next);
                    let is_found = match to {
                        Reached::Router(router) => hop.routers.iter().any(|found| found.address == router),
                        Reached::Destination => !hop.destination_flows.is_empty(),
                    };
                    let link = Link { ttl: hop.ttl - 1, from: Self::address(node), to };
                    !is_found || (node > 0 && !paths.links.contains(&link))
                })
        });
        missed.any(|is_missed| is_missed)
    }

    /// Whether all routers were found at all hops.
    fn is_found(&self, paths: &EqualCostPaths) -> bool {
        let found: Vec<BTreeSet<usize>> =
            paths.hops.iter().map(|hop| routers(hop).into_iter().collect()).collect();
        (1..).zip(&found).all(|(ttl, found)| self.hops().get(ttl) == Some(found))
    }
}

fn routers(hop: &EnumeratedHop) -> Vec<usize> {
    let nodes = hop.routers.iter().map(|router| match router.address {
        IpAddr::V4(address) => (address.to_bits() - 0x0a00_0000) as usize,
        IpAddr::V6(_) => unreachable!("all routers have an IPv4 address"),
    });
    nodes.collect()
}

fn completeness(paths: &EqualCostPaths) -> Vec<Completeness> {
    paths.hops.iter().map(|hop| hop.completeness).collect()
}

/// Runs an enumeration whose probes are answered in random order.
fn enumerate(enumeration: Enumeration, network: &mut Network) -> EqualCostPaths {
    run(enumeration, network, |_, network, probe| network.probe(probe))
}

fn run(
    mut enumeration: Enumeration,
    network: &mut Network,
    mut answer: impl FnMut(&mut Enumeration, &mut Network, PathProbe) -> Option<Reached>,
) -> EqualCostPaths {
    let mut outstanding = Vec::new();
    let mut answered = BTreeSet::new();
    loop {
        match enumeration.step() {
            EnumerationStep::Probe(probe) => {
                assert!(!outstanding.contains(&probe), "it is outstanding: {probe:?}");
                outstanding.push(probe);
            }
            EnumerationStep::Wait => {
                assert!(!outstanding.is_empty(), "there is something to wait for");
                let chosen = network.random.below(outstanding.len() as u64);
                let probe = outstanding.swap_remove(usize::try_from(chosen).unwrap());
                match answer(&mut enumeration, network, probe) {
                    Some(reached) => {
                        answered.insert((probe.ttl, probe.flow, reached));
                        enumeration.answered(probe, reached);
                    }
                    None => enumeration.unanswered(probe),
                }
            }
            EnumerationStep::Finished(paths) => {
                assert!(outstanding.is_empty());
                check(&paths, &answered);
                return *paths;
            }
        }
    }
}

/// The limits are kept, and everything that is recorded was answered.
fn check(paths: &EqualCostPaths, answered: &BTreeSet<(u8, u8, Reached)>) {
    let purposes = |probes: HopProbes| probes.enumerating + probes.steering + probes.repeats + probes.retries;
    assert_eq!(paths.hops.iter().map(|hop| purposes(hop.probes)).sum::<u32>(), paths.probes);
    assert!(paths.probes <= Enumeration::PROBES_MAX);
    assert!(paths.hops.iter().map(|hop| hop.ttl).eq((1..).take(paths.hops.len())));
    for hop in &paths.hops {
        assert!(hop.routers.len() <= Enumeration::ROUTERS_MAX);
        for router in &hop.routers {
            let reached = Reached::Router(router.address);
            assert!(!router.flows.is_empty());
            assert!(router.flows.iter().all(|flow| answered.contains(&(hop.ttl, *flow, reached))));
        }
        assert!(hop.destination_flows.iter().all(|flow| answered.contains(&(
            hop.ttl,
            *flow,
            Reached::Destination
        ))));
        assert!(hop.completeness != Completeness::Complete || hop.unanswered_flows.is_empty());
    }
    for link in &paths.links {
        let has =
            |ttl: u8, reached: Reached| answered.iter().any(|(at, _, found)| *at == ttl && *found == reached);
        assert!(has(link.ttl, Reached::Router(link.from)) && has(link.ttl + 1, link.to), "{link:?}");
    }
}

/// The largest count that is likely, of events whose probabilities have this sum: four standard deviations
/// above the mean.
fn likely_most(mean: f64) -> f64 {
    mean + 4.0 * mean.sqrt()
}

#[test]
fn successors_of_one_router_are_missed_as_rarely_as_the_rule_says_with_as_few_probes() {
    let (mut missed, mut mean) = (0.0, 0.0);
    let seeds = seeds(1_000);
    let count = seeds.end - seeds.start;
    for seed in seeds {
        let width = 2 + usize::try_from(seed % 15).unwrap();
        let before = 1 + usize::try_from(mix(seed) % 4).unwrap();
        let mut network = Network::diamond(seed, before, width);
        let last = u8::try_from(before).unwrap() + 1;
        // It ends at the hop of the successors, because the flows for the hop behind it may show more.
        let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, last), &mut network);
        let hop = paths.hops.last().unwrap();
        assert_eq!((hop.ttl, hop.completeness), (last, Completeness::Complete), "SIM_SEED={seed}");
        assert!(hop.probes.enumerating as usize <= probes_required(width).unwrap(), "SIM_SEED={seed}");
        assert!(hop.probes.repeats <= 5 && hop.probes.steering == 0, "SIM_SEED={seed}: {:?}", hop.probes);
        missed += f64::from(u8::from(hop.routers.len() < width));
        mean += failure_probability(width);
    }
    eprintln!("missed a successor in {missed} of {count} networks, expected in {mean:.1}");
    assert!(missed <= likely_most(mean), "{missed} missed, {mean} expected");
}

#[test]
fn complete_hops_of_random_networks_lack_a_successor_as_rarely_as_the_sum_of_the_rules_says() {
    for (flows, count) in [(Enumeration::FLOWS_MAX, 1_000), (250, 200)] {
        let (mut false_claims, mut unfound, mut bound, mut complete, mut hops, mut probes) =
            (0.0, 0, 0.0, 0, 0, 0);
        let seeds = seeds(count);
        let count = seeds.end - seeds.start;
        for seed in seeds {
            let mut network = Network::random(seed);
            let mut enumeration = Enumeration::new(Enumeration::FLOWS_MAX, 30);
            enumeration.flows = flows;
            let paths = enumerate(enumeration, &mut network);
            false_claims += f64::from(u8::from(network.has_false_claim(&paths)));
            unfound += u32::from(!network.is_found(&paths));
            bound += network.failure_bound(&paths).min(1.0);
            complete += paths.hops.iter().filter(|hop| hop.completeness == Completeness::Complete).count();
            hops += paths.hops.len();
            probes += paths.probes;
        }
        eprintln!(
            "{flows} flows, {count} networks: {false_claims} with a wrong claim, at most {bound:.1} expected; \
             {unfound} not found completely; {complete} of {hops} hops complete; {} probes each",
            u64::from(probes) / count
        );
        assert!(false_claims <= likely_most(bound), "{false_claims} wrong, {bound} expected");
    }
}

/// A chain of three routers, of which the second one has this share of answers, in percent.
fn chain(seed: u64, answers: u64) -> Network {
    let mut network = Network::diamond(seed, 2, 1);
    network.nodes[2].answers = answers;
    network
}

#[test]
fn chain_takes_six_probes_for_each_hop_and_all_flows_share_its_links() {
    let mut network = chain(1, 100);
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    assert_eq!(completeness(&paths), [Completeness::Complete; 5]);
    assert_eq!((paths.end, paths.flows, paths.probes), (EnumerationEnd::Destination, 6, 30));
    let link = |ttl: u8| {
        let to = if ttl == 4 { Next::Destination } else { Next::Node(usize::from(ttl) + 1) };
        Link { ttl, from: Network::address(ttl.into()), to: Network::reached(to) }
    };
    assert_eq!(paths.links, [1, 2, 3, 4].map(link));
    assert_eq!(paths.hops[4].destination_flows, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn silent_hop_is_marked_and_the_hop_behind_it_is_only_complete_if_flows_are_spread_evenly() {
    let mut network = chain(1, 0);
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    let expected = [
        Completeness::Complete,
        Completeness::Silent,
        Completeness::CompleteIfUniform,
        Completeness::Complete,
        Completeness::Complete,
    ];
    assert_eq!(completeness(&paths), expected);
    assert_eq!(paths.hops[1].unanswered_flows, [0, 1, 2, 3, 4, 5]);
    assert_eq!(paths.hops[1].probes, HopProbes { enumerating: 6, retries: 18, ..HopProbes::default() });
    assert_eq!(paths.end, EnumerationEnd::Destination);
}

#[test]
fn path_ends_behind_five_silent_hops() {
    let mut network = Network::diamond(1, 9, 1);
    network.nodes[3..].iter_mut().for_each(|node| node.answers = 0);
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    assert_eq!((paths.end, paths.hops.len()), (EnumerationEnd::Silent, 7));
    assert_eq!(completeness(&paths)[2..], [Completeness::Silent; 5]);
}

#[test]
fn flows_that_were_never_answered_are_counted_too() {
    let mut network = Network::diamond(1, 9, 1);
    network.nodes[1..].iter_mut().for_each(|node| node.answers = 0);
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    assert_eq!((paths.end, paths.hops.len(), paths.flows), (EnumerationEnd::Silent, 5, 6));
}

#[test]
fn repeats_without_an_answer_end_after_a_few_and_the_hop_is_not_complete() {
    let mut network = Network::diamond(1, 1, 2);
    let mut seen = BTreeSet::new();
    let paths = run(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network, |_, network, probe| {
        network.probe(probe).filter(|_| seen.insert(probe))
    });
    let hop = &paths.hops[1];
    assert!(hop.probes.repeats < 10, "five, and those that were outstanding then: {:?}", hop.probes);
    assert_eq!(hop.completeness, Completeness::PartlySilent);
    assert_eq!(paths.end, EnumerationEnd::Destination);
}

#[test]
fn flows_of_each_router_are_looked_for_where_there_are_several() {
    let mut network = Network::diamond(1, 1, 4);
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    assert_eq!(completeness(&paths), [Completeness::Complete; 4]);
    let steering: Vec<u32> = paths.hops.iter().map(|hop| hop.probes.steering).collect();
    assert!(matches!(steering[..], [0, sought, 0, 0] if sought > 0), "{steering:?}");
    assert_eq!(paths.hops[0].probes, HopProbes { enumerating: 6, ..HopProbes::default() });
}

#[test]
fn all_routers_behind_a_silent_one_are_found_without_more_probes_to_it() {
    let mut network = Network::diamond(1, 2, 4);
    network.nodes[2].answers = 0;
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    assert_eq!(paths.hops[1].probes, HopProbes { enumerating: 6, retries: 18, ..HopProbes::default() });
    let hop = &paths.hops[2];
    assert_eq!((routers(hop), hop.completeness), (vec![3, 4, 5, 6], Completeness::CompleteIfUniform));
}

#[test]
fn each_router_is_enumerated_although_flows_of_others_stay_unanswered() {
    let mut network = Network::new(1);
    let head = network.router(&[0]);
    for router in network.branches(head, 8) {
        let silent = network.router(&[router]);
        network.nodes[silent].answers = 0;
        network.router(&[router]);
    }
    let mut network = network.close();
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    let hop = &paths.hops[2];
    assert_eq!((hop.routers.len(), hop.completeness), (8, Completeness::PartlySilent));
    assert!(hop.unanswered_flows.len() > 12, "two of each router: {:?}", hop.unanswered_flows);
    assert!(hop.probes.steering < hop.probes.enumerating, "it is not left before: {:?}", hop.probes);
}

#[test]
fn late_answer_of_another_router_makes_its_hop_and_those_behind_it_incomplete() {
    let mut network = chain(1, 100);
    let (mut enumeration, mut outstanding) = (Enumeration::new(Enumeration::FLOWS_MAX, 30), Vec::new());
    loop {
        match enumeration.step() {
            EnumerationStep::Probe(probe) if probe.ttl == 3 => break enumeration.withdrawn(probe),
            EnumerationStep::Probe(probe) => outstanding.push(probe),
            EnumerationStep::Wait => {
                let probe = outstanding.pop().expect("there is something to wait for");
                enumeration.answered(probe, network.probe(probe).expect("all routers answer"));
            }
            EnumerationStep::Finished(paths) => panic!("{paths:?}"),
        }
    }
    let other = Reached::Router(Network::address(99));
    enumeration.answered(PathProbe { flow: 90, ttl: 1 }, other);
    let paths = loop {
        match enumeration.step() {
            EnumerationStep::Probe(probe) => enumeration.not_sent(probe),
            EnumerationStep::Wait => panic!("nothing is outstanding"),
            EnumerationStep::Finished(paths) => break paths,
        }
    };
    assert_eq!(completeness(&paths), [Completeness::Limited(EnumerationLimit::NotSent); 3]);
}

#[test]
fn router_of_a_flow_is_expected_if_it_has_answered_or_is_the_only_one_of_the_hop() {
    let [one, other] = [1, 2].map(|node| IpAddr::from([10, 0, 0, node]));
    let mut enumeration = Enumeration::new(8, 30);
    let mut probe = || {
        let EnumerationStep::Probe(probe) = enumeration.step() else { panic!("six flows are probed") };
        probe
    };
    let [first, second, third] = [probe(), probe(), probe()];
    let expected =
        |enumeration: &Enumeration| [first, second, third].map(|probe| enumeration.expected(probe));
    assert_eq!(expected(&enumeration), [None; 3]);
    enumeration.answered(first, Reached::Router(one));
    assert_eq!(expected(&enumeration), [Some(one); 3]);
    enumeration.answered(second, Reached::Router(other));
    assert_eq!(expected(&enumeration), [Some(one), Some(other), None]);
    enumeration.answered(third, Reached::Destination);
    assert_eq!(expected(&enumeration), [Some(one), Some(other), None]);
    for ttl in [0, 2] {
        assert_eq!(enumeration.expected(PathProbe { ttl, ..first }), None);
    }
}

#[test]
fn hop_with_one_silent_router_among_several_is_not_complete() {
    let (mut missed, mut mean) = (0.0, 0.0);
    for seed in seeds(200) {
        let width = 2 + usize::try_from(seed % 5).unwrap();
        let mut network = Network::diamond(seed, 1, width);
        network.nodes[2].answers = 0;
        let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
        let hop = &paths.hops[1];
        match hop.unanswered_flows.is_empty() {
            // The stopping rule was satisfied before a flow came to the silent router.
            true => missed += 1.0,
            false if hop.routers.is_empty() => assert_eq!(hop.completeness, Completeness::Silent),
            false => assert_eq!(hop.completeness, Completeness::PartlySilent, "SIM_SEED={seed}"),
        }
        mean += failure_probability(width);
        assert!(!routers(hop).contains(&2), "SIM_SEED={seed}");
    }
    assert!(missed <= likely_most(mean), "{missed} missed, at most {mean} expected");
}

#[test]
fn router_that_limits_its_answers_is_found_and_its_hop_is_not_complete_if_flows_stay_unanswered() {
    let (mut complete, mut partly) = (0, 0);
    for seed in seeds(200) {
        let mut network = chain(seed, 40);
        let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
        let hop = &paths.hops[1];
        assert_eq!(routers(hop), [2], "SIM_SEED={seed}");
        match (hop.completeness, hop.unanswered_flows.is_empty()) {
            (Completeness::Complete, true) => complete += 1,
            (Completeness::PartlySilent, false) => partly += 1,
            found => panic!("SIM_SEED={seed}: {found:?}"),
        }
        assert_eq!(completeness(&paths)[3..], [Completeness::Complete; 2], "SIM_SEED={seed}");
    }
    assert!(
        seeds(200).end < 200 || (complete > 0 && partly > 0),
        "{complete} complete, {partly} partly silent"
    );
}

#[test]
fn packets_of_a_flow_that_alternate_are_recognised_after_a_few_probes() {
    let (mut missed, mut mean) = (0.0, 0.0);
    for seed in seeds(200) {
        let width = 2 + usize::try_from(seed % 15).unwrap();
        let mut network = Network::diamond(seed, 2, width);
        network.nodes[2].is_per_packet = true;
        let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
        let hop = &paths.hops[2];
        let is_recognised = hop.completeness == Completeness::PerPacket;
        missed += f64::from(u8::from(!is_recognised));
        // All of six flows, or all of five repeats, are answered by the same router.
        let same = 1.0 / f64::from(u32::try_from(width).unwrap());
        mean += 2.0 * same.powi(5);
        if is_recognised {
            assert!(
                hop.probes.enumerating <= 6 && hop.probes.repeats <= 5,
                "SIM_SEED={seed}: {:?}",
                hop.probes
            );
            assert!(paths.links.iter().all(|link| link.ttl != 2 && link.ttl != 3), "SIM_SEED={seed}");
            let expected = [Completeness::CompleteIfUniform, Completeness::Complete];
            assert_eq!(completeness(&paths)[3..], expected, "SIM_SEED={seed}");
        }
    }
    assert!(missed <= likely_most(mean), "{missed} missed, {mean} expected");
}

#[test]
fn loop_ends_the_enumeration_when_routers_answer_a_flow_the_third_time() {
    let mut network = Network::diamond(1, 5, 1);
    network.nodes[4].next = vec![Next::Node(3)];
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    assert_eq!((paths.end, paths.hops.len()), (EnumerationEnd::Loop, 7));
    assert_eq!(paths.hops.iter().flat_map(routers).collect::<Vec<_>>(), [1, 2, 3, 4, 3, 4, 3]);
}

#[test]
fn hop_with_more_routers_than_the_limit_is_marked_and_the_path_goes_on() {
    let mut network = Network::diamond(1, 1, 30);
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    assert_eq!(paths.hops[1].completeness, Completeness::Limited(EnumerationLimit::Routers));
    assert_eq!(paths.hops[1].routers.len(), Enumeration::ROUTERS_MAX);
    assert_eq!(paths.end, EnumerationEnd::Destination);
}

#[test]
fn hop_behind_sixteen_routers_is_known_as_far_as_the_flows_suffice() {
    let mut network = Network::diamond(4, 1, 16);
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    let expected = [
        Completeness::Complete,
        Completeness::Complete,
        Completeness::CompleteIfUniform,
        Completeness::Complete,
    ];
    assert_eq!(completeness(&paths), expected);
    // One of the sixteen has another successor, which would be missed if only the hop were looked at.
    let mut network = Network::diamond(4, 1, 16);
    let aside = network.router(&[5]);
    network.nodes[aside].next.push(Next::Destination);
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 30), &mut network);
    assert_eq!(paths.hops[2].completeness, Completeness::Limited(EnumerationLimit::Flows));
}

#[test]
fn flows_beyond_the_limit_are_not_used() {
    let mut network = Network::diamond(4, 1, 16);
    let paths = enumerate(Enumeration::new(148, 30), &mut network);
    assert_eq!(paths.flows, Enumeration::FLOWS_MAX);
}

#[test]
fn enumeration_ends_at_the_limit_of_probes() {
    let mut network = Network::new(1);
    let mut last = vec![0];
    for _ in 0..40 {
        let head = network.router(&last);
        last = network.branches(head, 16);
    }
    let mut network = network.close();
    let paths = enumerate(Enumeration::new(Enumeration::FLOWS_MAX, 64), &mut network);
    assert_eq!(paths.end, EnumerationEnd::Limited(EnumerationLimit::Probes));
    assert_eq!(paths.probes, Enumeration::PROBES_MAX);
    let last = paths.hops.last().unwrap();
    assert_eq!(last.completeness, Completeness::Limited(EnumerationLimit::Probes));
}

#[test]
fn host_that_refuses_to_send_ends_the_enumeration_without_a_silent_hop() {
    let mut enumeration = Enumeration::new(Enumeration::FLOWS_MAX, 30);
    let paths = loop {
        match enumeration.step() {
            EnumerationStep::Probe(probe) => enumeration.not_sent(probe),
            EnumerationStep::Wait => panic!("nothing is outstanding"),
            EnumerationStep::Finished(paths) => break paths,
        }
    };
    assert_eq!(paths.end, EnumerationEnd::Limited(EnumerationLimit::NotSent));
    assert_eq!((paths.probes, paths.flows), (Enumeration::NOT_SENT_MAX, 0));
    assert_eq!(completeness(&paths), [Completeness::Limited(EnumerationLimit::NotSent)]);
}

#[test]
fn arbitrary_outcomes_end_within_the_limits_and_add_no_router() {
    for seed in seeds(2_000) {
        let mut random = Random(seed << 32);
        let mut byte = |most: u64| u8::try_from(random.between(0, most)).unwrap();
        let (flows, hops_max, routers) = (byte(130), byte(20), 1 + byte(40));
        let [silent, refused, withdrawn, destination, late] = [0; 5].map(|_| byte(30));
        let reached = |byte: &mut dyn FnMut(u64) -> u8| match byte(99) < destination {
            true => Reached::Destination,
            false => Network::reached(Next::Node(byte(u64::from(routers)).into())),
        };
        let mut enumeration = Enumeration::new(flows, hops_max);
        let (mut outstanding, mut decided, mut answered) = (Vec::new(), Vec::new(), BTreeSet::new());
        let paths = loop {
            match enumeration.step() {
                EnumerationStep::Probe(probe) => {
                    assert!(probe.flow < flows.clamp(1, Enumeration::FLOWS_MAX), "SIM_SEED={seed}");
                    assert!((1..=hops_max.max(1)).contains(&probe.ttl), "SIM_SEED={seed}");
                    assert!(!outstanding.contains(&probe), "SIM_SEED={seed}: {probe:?} is outstanding");
                    outstanding.push(probe);
                }
                EnumerationStep::Wait => {
                    assert!(!outstanding.is_empty(), "SIM_SEED={seed}: there is something to wait for");
                    let chosen = usize::from(byte(255)) % outstanding.len();
                    let probe: PathProbe = outstanding.swap_remove(chosen);
                    decided.push(probe);
                    match byte(99) {
                        choice if choice < silent => enumeration.unanswered(probe),
                        choice if choice < silent + refused => enumeration.not_sent(probe),
                        choice if choice < silent + refused + withdrawn => enumeration.withdrawn(probe),
                        _ => {
                            let reached = reached(&mut byte);
                            answered.insert((probe.ttl, probe.flow, reached));
                            enumeration.answered(probe, reached);
                        }
                    }
                    // Outcomes can be reported twice, and answers late.
                    let again = decided[usize::from(byte(255)) % decided.len()];
                    if byte(99) < late && !outstanding.contains(&again) {
                        enumeration.unanswered(again);
                        let reached = reached(&mut byte);
                        answered.insert((again.ttl, again.flow, reached));
                        enumeration.answered(again, reached);
                    }
                }
                EnumerationStep::Finished(paths) => break paths,
            }
        };
        assert!(outstanding.is_empty(), "SIM_SEED={seed}");
        check(&paths, &answered);
    }
}
