//! Which way the data of a connection takes through a diamond.

use std::net::IpAddr;

use pathmeter_lab::{Net, NetPlan};
use pathmeter_proto::sim::Link;

/// A diamond whose routers `m1` to `mN` remember the ports of connections whose data they forward. `server`
/// and `client` are fields of a TCP header in nft's words, the first with its value.
pub(crate) fn diamond(ways: usize, seed: u64, server: &str, client: &str) -> Net {
    let net = NetPlan::diamond(ways).build(seed);
    let link = Link::perfect(2_000_000);
    for way in 1..=ways {
        let name = format!("m{way}");
        net.wire("left", &name).set_links(&link, &link);
        net.node(&name).nft(&format!(
            "add table ip seen\n\
             add set ip seen ports {{ type inet_service; flags dynamic; size 1024; }}\n\
             add chain ip seen forward {{ type filter hook forward priority 0; }}\n\
             add rule ip seen forward tcp {server} tcp flags & psh == psh add @ports {{ tcp {client} }}\n",
        ));
    }
    net
}

/// Whether a way has forwarded data of a connection whose client has this port.
pub(crate) fn has_seen(net: &Net, way: usize, port: u16) -> bool {
    let mut list = net.node(&format!("m{way}")).command("nft");
    let listed = list.args(["list", "set", "ip", "seen", "ports"]).output().unwrap().stdout;
    let listed = String::from_utf8(listed).unwrap();
    let elements = listed.split_once("elements = {").map_or("", |(_, elements)| elements);
    elements.split([',', '}', ' ', '\n']).any(|element| element.trim() == port.to_string())
}

/// Whether the router of a way has this address.
pub(crate) fn is_address_of(net: &Net, way: usize, router: IpAddr) -> bool {
    let addresses = net.node(&format!("m{way}")).command("ip").args(["-4", "-o", "addr"]).output();
    String::from_utf8(addresses.unwrap().stdout).unwrap().contains(&format!("inet {router}/"))
}
