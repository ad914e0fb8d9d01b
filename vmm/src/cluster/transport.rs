//! What the nodes talk over: what was asked for, what every host has, and why it was chosen.

use std::net::IpAddr;

use krg_dsm::transport::rdma::RdmaPort;

use super::offer::Offer;
use crate::node::NodeTransport;

/// `--transport`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The best that all hosts have.
    Auto,
    /// RDMA, or nothing.
    Rdma,
    /// TCP.
    Tcp,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// For every node.
    pub transport: NodeTransport,
    /// For people: the transport, and in brackets why.
    pub line: String,
}

/// A host that keeps the nodes from RDMA.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("node {node}: {reason}")]
pub struct Lacking {
    /// Node number.
    pub node: usize,
    /// One line.
    pub reason: String,
}

/// Chooses for hosts with these offers, whose nodes have these addresses.
///
/// # Errors
/// RDMA is asked for, and a host does not have it.
pub fn choose(wish: Wish, hosts: &[(&Offer, IpAddr)]) -> Result<Choice, Lacking> {
    let tcp = |why: &str| Choice {
        transport: NodeTransport::Tcp,
        line: format!("transport: tcp ({why})"),
    };
    if wish == Wish::Tcp {
        return Ok(tcp("as asked"));
    }
    let ports = match ports(hosts) {
        Ok(ports) => ports,
        Err(lacking) if wish == Wish::Rdma => return Err(lacking),
        Err(lacking) => return Ok(tcp(&format!("auto: {lacking}"))),
    };
    let names: Vec<_> = ports
        .iter()
        .zip(0..)
        .map(|(port, node)| format!("node {node} {}", port.device))
        .collect();
    let names = names.join(", ");
    let software = ports.iter().any(|port| port.software);
    match wish {
        Wish::Auto if software => Ok(tcp(&format!("auto: RDMA is there, but in software: {names}"))),
        _ => {
            let how = if wish == Wish::Auto { "auto" } else { "as asked" };
            Ok(Choice {
                transport: NodeTransport::Rdma,
                line: format!("transport: rdma ({how}: {names})"),
            })
        }
    }
}

/// Each host's port at its node's address, or the first host that has none.
fn ports<'a>(hosts: &[(&'a Offer, IpAddr)]) -> Result<Vec<&'a RdmaPort>, Lacking> {
    let port = |(node, (offer, address)): (usize, &(&'a Offer, IpAddr))| {
        let found = match &offer.rdma {
            Ok(ports) => RdmaPort::at(ports, *address).ok_or_else(|| format!("no RDMA device at {address}")),
            Err(reason) => Err(reason.clone()),
        };
        found.map_err(|reason| Lacking { node, reason })
    };
    hosts.iter().enumerate().map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(devices: &[(&str, &str, bool)]) -> Offer {
        let port = |&(device, address, software): &(&str, &str, bool)| RdmaPort {
            device: device.into(),
            port: 1,
            gid_index: 1,
            address: address.parse().unwrap(),
            software,
        };
        Offer {
            rdma: Ok(devices.iter().map(port).collect()),
            ..Offer::of_this_host()
        }
    }

    fn line(wish: Wish, offers: [&Offer; 2]) -> Result<(NodeTransport, String), String> {
        let hosts = [
            (offers[0], "10.0.0.1".parse().unwrap()),
            (offers[1], "10.0.0.2".parse().unwrap()),
        ];
        choose(wish, &hosts)
            .map(|choice| (choice.transport, choice.line))
            .map_err(|lacking| lacking.to_string())
    }

    #[test]
    fn rdma_where_all_have_it() {
        let (one, two) = (
            offer(&[("mlx5_0", "10.0.0.1", false)]),
            offer(&[("mlx5_1", "10.0.0.2", false)]),
        );
        let rdma = |how: &str| {
            Ok((
                NodeTransport::Rdma,
                format!("transport: rdma ({how}: node 0 mlx5_0, node 1 mlx5_1)"),
            ))
        };
        assert_eq!(line(Wish::Auto, [&one, &two]), rdma("auto"));
        assert_eq!(line(Wish::Rdma, [&one, &two]), rdma("as asked"));
        let tcp = (NodeTransport::Tcp, "transport: tcp (as asked)".to_owned());
        assert_eq!(line(Wish::Tcp, [&one, &two]), Ok(tcp));
    }

    #[test]
    fn a_host_that_lacks_it_decides() {
        let one = offer(&[("mlx5_0", "10.0.0.1", false)]);
        let elsewhere = offer(&[("mlx5_1", "10.9.0.2", false)]);
        let tcp = (
            NodeTransport::Tcp,
            "transport: tcp (auto: node 1: no RDMA device at 10.0.0.2)".to_owned(),
        );
        assert_eq!(line(Wish::Auto, [&one, &elsewhere]), Ok(tcp));
        assert_eq!(
            line(Wish::Rdma, [&one, &elsewhere]),
            Err("node 1: no RDMA device at 10.0.0.2".into())
        );
        let without = Offer {
            rdma: Err("libibverbs.so.1: not found".into()),
            ..offer(&[])
        };
        assert_eq!(
            line(Wish::Rdma, [&without, &one]),
            Err("node 0: libibverbs.so.1: not found".into())
        );
    }

    #[test]
    fn software_only_when_asked_for() {
        let (one, two) = (
            offer(&[("rxe0", "10.0.0.1", true)]),
            offer(&[("mlx5_1", "10.0.0.2", false)]),
        );
        let why = "transport: tcp (auto: RDMA is there, but in software: node 0 rxe0, node 1 mlx5_1)".to_owned();
        assert_eq!(line(Wish::Auto, [&one, &two]), Ok((NodeTransport::Tcp, why)));
        let asked = "transport: rdma (as asked: node 0 rxe0, node 1 mlx5_1)".to_owned();
        assert_eq!(line(Wish::Rdma, [&one, &two]), Ok((NodeTransport::Rdma, asked)));
    }
}
