//! RDMA devices of this host, as sysfs tells of them: nothing has to be loaded for that.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// GIDs looked at per port; devices have up to a few hundred, most of them empty.
const MOST_GIDS: usize = 1024;

/// A port that can be reached at an IP address: RoCE version 2.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdmaPort {
    /// The device, like `mlx5_0`.
    pub device: String,
    /// Number of the port, from 1.
    pub port: u8,
    /// Place of the address in the port's table.
    pub gid_index: u8,
    /// The address.
    pub address: IpAddr,
    /// There is no such hardware: the kernel does its work (`rdma_rxe`).
    pub software: bool,
}

impl RdmaPort {
    /// All of this host: none where there is no RDMA.
    pub fn of_this_host() -> Vec<Self> {
        Self::below(Path::new("/sys/class/infiniband"))
    }

    /// The one of `ports` that is reached at `address`. Hardware goes before software.
    pub fn at(ports: &[Self], address: IpAddr) -> Option<&Self> {
        let mut found: Vec<_> = ports.iter().filter(|port| port.address == canonical(address)).collect();
        found.sort_by_key(|port| port.software);
        found.first().copied()
    }

    fn below(root: &Path) -> Vec<Self> {
        let mut found = Vec::new();
        for device in names(root) {
            // rxe has no bus device behind it, and siw neither.
            let software = !root.join(&device).join("device").exists();
            let ports = root.join(&device).join("ports");
            for number in names(&ports) {
                let Ok(port) = number.parse() else { continue };
                let port_folder = ports.join(&number);
                let line = |path: &str| fs::read_to_string(port_folder.join(path)).unwrap_or_default();
                if !line("state").contains("ACTIVE") {
                    continue;
                }
                for index in names(&port_folder.join("gids")).iter().take(MOST_GIDS) {
                    let Ok(gid_index) = index.parse() else { continue };
                    let Ok(gid) = line(&format!("gids/{index}")).trim().parse::<Ipv6Addr>() else {
                        continue;
                    };
                    if gid.is_unspecified() || line(&format!("gid_attrs/types/{index}")).trim() != "RoCE v2" {
                        continue;
                    }
                    let address = canonical(IpAddr::V6(gid));
                    found.push(Self {
                        device: device.clone(),
                        port,
                        gid_index,
                        address,
                        software,
                    });
                }
            }
        }
        found
    }

    /// The GID that stands for the address.
    pub fn gid(&self) -> [u8; 16] {
        match self.address {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        }
    }
}

fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Names of what is in a folder, sorted; none if there is no such folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    fn put(root: &Path, file: &str, text: &str) {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn ports_by_address() {
        let root = TempDir::new_with_prefix("/tmp/krg-rdma").unwrap();
        let root = root.as_path();
        put(root, "rxe0/ports/1/state", "4: ACTIVE\n");
        put(root, "rxe0/ports/1/gids/0", "fe80:0000:0000:0000:5054:00ff:fe12:3456\n");
        put(root, "rxe0/ports/1/gid_attrs/types/0", "RoCE v2\n");
        put(root, "rxe0/ports/1/gids/1", "0000:0000:0000:0000:0000:ffff:0a07:0001\n");
        put(root, "rxe0/ports/1/gid_attrs/types/1", "RoCE v2\n");
        put(root, "rxe0/ports/1/gids/2", "0000:0000:0000:0000:0000:0000:0000:0000\n");
        let address: IpAddr = "10.7.0.1".parse().unwrap();
        let found = RdmaPort::below(root);
        assert_eq!(found.len(), 2);
        let port = RdmaPort::at(&found, address).unwrap();
        assert_eq!(
            (port.device.as_str(), port.port, port.gid_index, port.software),
            ("rxe0", 1, 1, true)
        );
        assert_eq!(port.gid()[10..], [0xff, 0xff, 10, 7, 0, 1]);
        assert!(RdmaPort::at(&found, "::ffff:10.7.0.1".parse().unwrap()).is_some());
        assert!(RdmaPort::at(&found, "10.7.0.2".parse().unwrap()).is_none());
        // Hardware at the same address is taken first, RoCE version 1 and ports that are down are not.
        put(root, "zlx5_0/device/vendor", "0x15b3\n");
        put(root, "zlx5_0/ports/1/state", "4: ACTIVE\n");
        put(
            root,
            "zlx5_0/ports/1/gids/2",
            "0000:0000:0000:0000:0000:ffff:0a07:0001\n",
        );
        put(root, "zlx5_0/ports/1/gid_attrs/types/2", "IB/RoCE v1\n");
        assert_eq!(RdmaPort::at(&RdmaPort::below(root), address).unwrap().device, "rxe0");
        put(root, "zlx5_0/ports/1/gid_attrs/types/2", "RoCE v2\n");
        let found = RdmaPort::below(root);
        let port = RdmaPort::at(&found, address).unwrap();
        assert_eq!(
            (port.device.as_str(), port.gid_index, port.software),
            ("zlx5_0", 2, false)
        );
        put(root, "zlx5_0/ports/1/state", "1: DOWN\n");
        assert_eq!(RdmaPort::at(&RdmaPort::below(root), address).unwrap().device, "rxe0");
        assert!(RdmaPort::below(&root.join("nothing")).is_empty());
    }
}
