//! Hosts, routers and the cables between them.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::namespace::Namespace;
use crate::offload;
use crate::wire::Wire;

/// The plan of a network to build.
#[derive(Debug, Clone, Default)]
pub struct NetPlan {
    nodes: Vec<(String, NodeRole)>,
    cables: Vec<(Cable, Option<u32>)>,
    has_icmp_limits: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NodeRole {
    Host,
    Router,
}

/// The names of two neighbouring nodes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cable(pub String, pub String);

impl Cable {
    /// The cable between two nodes.
    #[must_use]
    pub fn between(first: &str, second: &str) -> Self {
        Self(first.to_owned(), second.to_owned())
    }
}

/// A running network.
#[derive(Debug)]
pub struct Net {
    // Wires first: their threads hold sockets of the namespace behind them.
    wires: BTreeMap<Cable, Wire>,
    nodes: BTreeMap<String, Arc<Namespace>>,
    addresses: BTreeMap<String, [IpAddr; 2]>,
    _wire_namespace: Namespace,
}

/// Routers choose among equal-cost paths by addresses, protocol and ports, and compute that hash themselves:
/// a veth passes on the hash of the sender, which policies 0 to 2 would use instead.
const ROUTING: [(&str, &str); 6] = [
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv4/fib_multipath_hash_policy", "3"),
    ("ipv6/fib_multipath_hash_policy", "3"),
    ("ipv4/fib_multipath_hash_fields", "55"),
    ("ipv6/fib_multipath_hash_fields", "55"),
];

/// No rate limits for ICMP errors: they would look like loss on a link.
const UNLIMITED_ICMP: [(&str, &str); 3] =
    [("ipv4/icmp_ratelimit", "0"), ("ipv6/icmp/ratelimit", "0"), ("ipv4/icmp_msgs_per_sec", "100000")];

impl NetPlan {
    /// Two hosts, `a` and `b`, and a wire between them.
    #[must_use]
    pub fn pair() -> Self {
        let mut plan = Self::default();
        plan.host("a").host("b").wire("a", "b");
        plan
    }

    /// Hosts `a` and `b` with routers `r1` to `rN` between them. Wires at both ends, cables in between.
    #[must_use]
    pub fn chain(routers: usize) -> Self {
        let mut plan = Self::default();
        plan.host("a").host("b");
        let names: Vec<String> = (1..=routers).map(|number| format!("r{number}")).collect();
        for name in &names {
            plan.router(name);
        }
        let (Some(first), Some(last)) = (names.first(), names.last()) else { return Self::pair() };
        plan.wire("a", first);
        for pair in names.windows(2) {
            plan.cable(&pair[0], &pair[1]);
        }
        plan.wire(last, "b");
        plan
    }

    /// Hosts `a` and `b` behind routers `left` and `right`, with `ways` equal-cost paths between them through
    /// `m1` to `mN`. A wire leads from `left` to each of these.
    #[must_use]
    pub fn diamond(ways: usize) -> Self {
        let mut plan = Self::default();
        plan.host("a").host("b").router("left").router("right").cable("a", "left");
        for number in 1..=ways {
            let name = format!("m{number}");
            plan.router(&name).wire("left", &name).cable(&name, "right");
        }
        plan.cable("right", "b");
        plan
    }

    /// Hosts `a`, `b`, `c` and so on, each with a wire to the router `core`. At most 26 hosts.
    #[must_use]
    pub fn mesh(hosts: usize) -> Self {
        let mut plan = Self::default();
        plan.router("core");
        for name in ('a'..='z').take(hosts).map(String::from) {
            plan.host(&name).wire(&name, "core");
        }
        plan
    }

    /// Adds a host, which does not forward.
    pub fn host(&mut self, name: &str) -> &mut Self {
        self.nodes.push((name.to_owned(), NodeRole::Host));
        self
    }

    /// Adds a router.
    pub fn router(&mut self, name: &str) -> &mut Self {
        self.nodes.push((name.to_owned(), NodeRole::Router));
        self
    }

    /// Joins two nodes by a plain veth pair with an MTU of 1500 bytes.
    pub fn cable(&mut self, first: &str, second: &str) -> &mut Self {
        self.cables.push((Cable::between(first, second), None));
        self
    }

    /// Joins two nodes by a wire that carries jumbo frames.
    pub fn wire(&mut self, first: &str, second: &str) -> &mut Self {
        self.cables.push((Cable::between(first, second), Some(JUMBO)));
        self
    }

    /// Routers limit their ICMP errors as the kernel does by default. Otherwise they do not limit them.
    pub fn keep_icmp_limits(&mut self) -> &mut Self {
        self.has_icmp_limits = true;
        self
    }

    /// Builds the network with addresses, routes and neighbour entries. `seed` determines the behaviour of
    /// the wires.
    ///
    /// # Panics
    /// When the kernel refuses an operation, with its error.
    #[must_use]
    pub fn build(&self, seed: u64) -> Net {
        let nodes: BTreeMap<String, Namespace> =
            self.nodes.iter().map(|(name, _)| (name.clone(), Namespace::new(name))).collect();
        for (name, _) in self.nodes.iter().filter(|(_, role)| *role == NodeRole::Router) {
            let limits = UNLIMITED_ICMP.iter().filter(|_| !self.has_icmp_limits);
            ROUTING.iter().chain(limits).for_each(|(key, value)| nodes[name].set_sysctl(key, value));
        }
        let wire_namespace = Namespace::new("wires");
        // Frames that two processors send into a veth one after the other come out in that order, as on a
        // cable. Routers forward at once: a queue at each router would add delay that no wire logs, and much
        // of it on a busy machine.
        let hosts =
            self.nodes.iter().filter(|(_, role)| *role == NodeRole::Host).map(|(name, _)| &nodes[name]);
        for namespace in hosts.chain([&wire_namespace]) {
            namespace.set_sysctl("core/rps_default_mask", "1");
        }
        // The kernel must not send packets of its own in this namespace.
        wire_namespace.set_sysctl("ipv6/conf/default/disable_ipv6", "1");
        wire_namespace.ip(&self.interfaces(&nodes));
        for (name, _) in &self.nodes {
            nodes[name].ip(&self.addressing(name));
        }
        let mut wires = BTreeMap::new();
        for (index, (cable, wire_mtu)) in self.cables.iter().enumerate() {
            if wire_mtu.is_some() {
                for node in [&cable.0, &cable.1] {
                    nodes[node].within(|| offload::disable(&format!("e{index}")));
                }
                let ends = [format!("w{index}l"), format!("w{index}r")];
                let wire = Wire::new(&wire_namespace, [&ends[0], &ends[1]], seed ^ index as u64);
                wires.insert(cable.clone(), wire);
            }
        }
        let addresses = self.nodes.iter().map(|(name, _)| (name.clone(), self.first_addresses(name)));
        let addresses = addresses.collect();
        let nodes = nodes.into_iter().map(|(name, namespace)| (name, Arc::new(namespace))).collect();
        Net { wires, addresses, nodes, _wire_namespace: wire_namespace }
    }

    /// `ip` commands that create all interfaces, run in the namespace of the wires.
    fn interfaces(&self, nodes: &BTreeMap<String, Namespace>) -> String {
        let mut lines = String::new();
        for (index, (cable, wire_mtu)) in self.cables.iter().enumerate() {
            let ends = [(&cable.0, 'l', 1), (&cable.1, 'r', 2)];
            let of = |(node, _, side): (&String, char, u8)| {
                format!("e{index} netns {} address {}", nodes[node].path(), hardware(index, side))
            };
            if let Some(mtu) = wire_mtu {
                for end in ends {
                    let inner = format!("w{index}{}", end.1);
                    let outer = of(end);
                    writeln!(lines, "link add {inner} mtu {mtu} type veth peer name {outer} mtu {mtu}")
                        .unwrap();
                    writeln!(lines, "link set {inner} up").unwrap();
                }
            } else {
                writeln!(lines, "link add {} type veth peer name {}", of(ends[0]), of(ends[1])).unwrap();
            }
        }
        lines
    }

    /// `ip` commands that give a node its addresses, neighbours and routes.
    fn addressing(&self, node: &str) -> String {
        let mut lines = String::new();
        for (index, own, other) in self.ports(node) {
            let interface = format!("e{index}");
            writeln!(lines, "link set {interface} up").unwrap();
            for (own_address, neighbour_address) in
                addresses(index, own).into_iter().zip(addresses(index, other))
            {
                let (bits, nodad) = if own_address.is_ipv4() { (24, "") } else { (64, " nodad") };
                writeln!(lines, "addr add {own_address}/{bits} dev {interface}{nodad}").unwrap();
                let hardware = hardware(index, other);
                writeln!(
                    lines,
                    "neigh add {neighbour_address} lladdr {hardware} dev {interface} nud permanent"
                )
                .unwrap();
            }
        }
        for subnet in 0..self.cables.len() {
            for family in 0..2 {
                lines.push_str(&self.route(node, subnet, family));
            }
        }
        lines
    }

    /// The `ip` command for a node's route to the subnet of a cable over all shortest paths; empty if
    /// directly connected.
    fn route(&self, node: &str, subnet: usize, family: usize) -> String {
        let distances = self.distances(subnet);
        let Some(own) = distances.get(node).copied().filter(|distance| *distance > 0) else {
            return String::new();
        };
        let prefix = ["10.77.{}.0/24", "fd77:{}::/64"][family].replace("{}", &subnet.to_string());
        let mut line = format!("route add {prefix}");
        for (index, _, other) in self.ports(node) {
            let Cable(left, right) = &self.cables[index].0;
            let neighbour = if other == 1 { left } else { right };
            if distances.get(neighbour.as_str()) == Some(&(own - 1)) {
                write!(line, " nexthop via {}", addresses(index, other)[family]).unwrap();
            }
        }
        line + "\n"
    }

    /// The number of hops from each node to a cable; hosts do not forward.
    fn distances(&self, subnet: usize) -> BTreeMap<&str, usize> {
        let Cable(left, right) = &self.cables[subnet].0;
        let mut distances = BTreeMap::from([(left.as_str(), 0), (right.as_str(), 0)]);
        let mut queue = VecDeque::from([left.as_str(), right.as_str()]);
        while let Some(node) = queue.pop_front() {
            if self.nodes.iter().any(|(name, role)| name == node && *role == NodeRole::Host) {
                continue;
            }
            let further = distances[node] + 1;
            for (Cable(left, right), _) in &self.cables {
                let neighbour = if left == node {
                    right
                } else if right == node {
                    left
                } else {
                    continue;
                };
                if !distances.contains_key(neighbour.as_str()) {
                    distances.insert(neighbour, further);
                    queue.push_back(neighbour);
                }
            }
        }
        distances
    }

    /// The cables of a node: index, own side, other side.
    fn ports<'a>(&'a self, node: &'a str) -> impl Iterator<Item = (usize, u8, u8)> + 'a {
        self.cables.iter().enumerate().filter_map(move |(index, (Cable(left, right), _))| {
            if left == node { Some((index, 1, 2)) } else { (right == node).then_some((index, 2, 1)) }
        })
    }

    fn first_addresses(&self, node: &str) -> [IpAddr; 2] {
        let (index, side, _) = self.ports(node).next().expect("every node has a cable");
        addresses(index, side)
    }
}

/// Most hosts in a mesh: each is named by one letter.
pub(crate) const MESH_MAX: usize = 26;

/// The MTU of wires: slightly more than the longest datagram of a probe.
const JUMBO: u32 = 9_200;

/// The IPv4 and the IPv6 address of one side of a cable.
fn addresses(cable: usize, side: u8) -> [IpAddr; 2] {
    let third = u8::try_from(cable).expect("a network has fewer than 256 cables");
    let hextet = u16::from_str_radix(&cable.to_string(), 16).expect("digits");
    [
        Ipv4Addr::new(10, 77, third, side).into(),
        Ipv6Addr::new(0xfd77, hextet, 0, 0, 0, 0, 0, side.into()).into(),
    ]
}

fn hardware(cable: usize, side: u8) -> String {
    format!("02:00:00:00:{cable:02x}:{side:02x}")
}

impl Net {
    /// The namespace of a node.
    ///
    /// # Panics
    /// When there is no node of this name.
    #[must_use]
    pub fn node(&self, name: &str) -> &Namespace {
        self.nodes.get(name).unwrap_or_else(|| panic!("no node {name}"))
    }

    /// The namespace of a node, for users that may outlive the network.
    ///
    /// # Panics
    /// When there is no node of this name.
    #[must_use]
    pub fn share(&self, name: &str) -> Arc<Namespace> {
        Arc::clone(self.nodes.get(name).unwrap_or_else(|| panic!("no node {name}")))
    }

    /// The IPv4 address of a node.
    #[must_use]
    pub fn v4(&self, name: &str) -> IpAddr {
        self.addresses[name][0]
    }

    /// The IPv6 address of a node.
    #[must_use]
    pub fn v6(&self, name: &str) -> IpAddr {
        self.addresses[name][1]
    }

    /// The wire between two nodes, named in the order of the plan.
    ///
    /// # Panics
    /// When there is no wire between them.
    #[must_use]
    pub fn wire(&self, first: &str, second: &str) -> &Wire {
        let found = self.wires.get(&Cable::between(first, second));
        found.unwrap_or_else(|| panic!("no wire from {first} to {second}"))
    }

    /// All wires.
    pub fn wires(&self) -> impl Iterator<Item = (&Cable, &Wire)> {
        self.wires.iter()
    }

    /// Makes the kernel of `from` refuse to send to `to`. Datagrams in flight still arrive.
    pub fn add_unreachable_route(&self, from: &str, to: &str) {
        let [v4, v6] = self.addresses[to];
        self.node(from).ip(&format!("route add unreachable {v4}/32\nroute add unreachable {v6}/128\n"));
    }
}
