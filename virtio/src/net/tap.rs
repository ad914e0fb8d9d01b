//! A tap interface of the host, with virtio-net headers before every frame.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::error::{Error, Result};

/// Bytes of `struct virtio_net_hdr_v1` (VIRTIO 1.2, section 5.1.6).
pub const HEADER_LEN: usize = 12;

/// Offloads that the reader of a tap can take (`TUN_F_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames without a finished checksum.
    pub checksum: bool,
    /// TCP segments over IPv4 larger than the MTU; needs `checksum`.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// TCP segments with ECN; needs a TSO.
    pub ecn: bool,
}

/// An open tap interface, not blocking.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Opens the existing (or, with CAP_NET_ADMIN, a new) tap interface `name`.
    ///
    /// # Errors
    /// [`Error::TapName`], [`Error::Tap`].
    pub fn open(name: &str) -> Result<Self> {
        let mut request = interface_request(name)?;
        let error = |step| {
            move |source| Error::Tap {
                name: name.into(),
                step,
                source,
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(error("cannot open /dev/net/tun"))?;
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`; `request` is one, initialised
        // in full and exclusively borrowed for the call. The descriptor is open.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
        check(done).map_err(error("cannot attach (TUNSETIFF)"))?;
        let len = HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which `len` is. The descriptor is open.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &len) };
        check(done).map_err(error("cannot set the header length (TUNSETVNETHDRSZ)"))?;
        let tap = Tap {
            file,
            name: name.into(),
        };
        tap.set_offloads(Offloads::default())?;
        Ok(tap)
    }

    /// Says which unfinished frames the guest takes.
    ///
    /// # Errors
    /// [`Error::Tap`].
    pub fn set_offloads(&self, offloads: Offloads) -> Result<()> {
        let flags = [
            (offloads.checksum, libc::TUN_F_CSUM),
            (offloads.tso4, libc::TUN_F_TSO4),
            (offloads.tso6, libc::TUN_F_TSO6),
            (offloads.ecn, libc::TUN_F_TSO_ECN),
        ]
        .iter()
        .filter(|(on, _)| *on)
        .fold(0, |flags, (_, flag)| flags | flag);
        // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours. The
        // descriptor is open.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        check(done).map_err(|source| Error::Tap {
            name: self.name.clone(),
            step: "cannot set offloads (TUNSETOFFLOAD)",
            source,
        })
    }

    /// Another descriptor of the same interface queue.
    ///
    /// # Errors
    /// [`Error::Tap`].
    pub fn try_clone(&self) -> Result<Self> {
        let file = self.file.try_clone().map_err(|source| Error::Tap {
            name: self.name.clone(),
            step: "cannot duplicate its descriptor",
            source,
        })?;
        Ok(Tap {
            file,
            name: self.name.clone(),
        })
    }

    /// Interface name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// Where a network device's frames, each with its header, come from and go to. Not blocking.
pub trait Frames: Send + 'static {
    /// Reads one frame.
    ///
    /// # Errors
    /// `WouldBlock` if none is there.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes one frame.
    ///
    /// # Errors
    /// `WouldBlock` if there is no room.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;

    /// Readable when a frame is there.
    fn descriptor(&self) -> RawFd;

    /// Says which unfinished frames the guest takes.
    ///
    /// # Errors
    /// If the host refuses them.
    fn offloads(&mut self, offloads: Offloads) -> Result<()>;
}

impl Frames for Tap {
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        // The kernel takes a frame as a whole or not at all.
        self.file.write(frame).map(|_| ())
    }

    fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn offloads(&mut self, offloads: Offloads) -> Result<()> {
        self.set_offloads(offloads)
    }
}

fn interface_request(name: &str) -> Result<libc::ifreq> {
    let bytes = name.as_bytes();
    let valid = !bytes.is_empty()
        && bytes.len() < libc::IFNAMSIZ
        && bytes.iter().all(|b| b.is_ascii_graphic() && *b != b'/' && *b != b'%');
    if !valid {
        return Err(Error::TapName(name.into()));
    }
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok(libc::ifreq {
        ifr_name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_map: libc::__c_anonymous_ifru_map {
                mem_start: 0,
                mem_end: 0,
                base_addr: 0,
                irq: 0,
                dma: 0,
                port: 0,
            },
        },
    })
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_before_the_kernel_sees_them() {
        for name in ["", "a/b", "a b", "tap%d", "0123456789abcdef", "t\0p"] {
            assert!(matches!(Tap::open(name), Err(Error::TapName(_))), "{name:?}");
        }
        assert!(interface_request("0123456789abcde").is_ok());
    }
}
