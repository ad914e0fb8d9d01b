//! One end of a reliable connection, over libibverbs, which is loaded when it is first needed.
//!
//! All calls into the library are here.

use std::ffi::{CStr, c_int};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

use super::abi::{self, *};
use super::credits::SLOT;
use super::device::RdmaPort;
use super::exchange::Description;
use super::ring::Ring;
use crate::errno::Errno;

/// Its name says its version; Debian has it in the package libibverbs1.
const LIBRARY: &str = "libibverbs.so.1";
/// Sizes of messages that are handed to the device with the request, largest first: devices differ.
const INLINE: [u32; 4] = [512, 220, 64, 0];

/// A packet that is not acknowledged is sent again after 4.096 us times 2 to this power, half a second, ...
const TIMEOUT: u8 = 17;
/// ... as often as this. Together 3.8 s: a link that fails for 2 s only stalls, a host that is gone is an
/// error before five. 7 would be for ever on rxe.
const RETRIES: u8 = 6;
/// How often a message waits for a receive request of the peer's. A peer that keeps to its credits
/// always has one.
const NOT_READY_RETRIES: u8 = 3;
/// How long a peer whom we have no receive request for waits before it tries again: 0.64 ms.
const NOT_READY_TIMER: u8 = 12;

/// What failed, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerbsError {
    /// No library.
    #[error("{0}; install libibverbs1 and ibverbs-providers, or use --transport tcp")]
    Library(String),
    /// A device that sysfs knows and the library does not: its provider is not installed.
    #[error("{LIBRARY} has no provider for the RDMA device {0}; install ibverbs-providers, or use --transport tcp")]
    Device(String),
    /// The kernel or the device refused something.
    #[error("RDMA: {call} failed with {errno}{}", advice(call, *errno))]
    Call {
        /// The function.
        call: &'static str,
        /// Why.
        errno: Errno,
    },
}

fn advice(call: &str, errno: Errno) -> &'static str {
    match (call, errno.0) {
        ("ibv_reg_mr", libc::ENOMEM | libc::EAGAIN) => "; raise the limit of locked memory (ulimit -l)",
        ("ibv_open_device", libc::EACCES | libc::EPERM) => "; give this user access to /dev/infiniband",
        _ => "",
    }
}

/// The functions of the library.
struct Verbs {
    get_device_list: function::GetDeviceList,
    free_device_list: function::FreeDeviceList,
    get_device_name: function::GetDeviceName,
    open_device: function::OpenDevice,
    close_device: function::CloseDevice,
    query_port: function::QueryPort,
    alloc_pd: function::AllocPd,
    dealloc_pd: function::DeallocPd,
    reg_mr: function::RegMr,
    dereg_mr: function::DeregMr,
    create_comp_channel: function::CreateCompChannel,
    destroy_comp_channel: function::DestroyCompChannel,
    create_cq: function::CreateCq,
    destroy_cq: function::DestroyCq,
    get_cq_event: function::GetCqEvent,
    ack_cq_events: function::AckCqEvents,
    create_qp: function::CreateQp,
    modify_qp: function::ModifyQp,
    destroy_qp: function::DestroyQp,
    /// Last, and never dropped: the functions are inside.
    _library: Library,
}

static VERBS: OnceLock<Result<Verbs, String>> = OnceLock::new();

/// Says why the library can't be used; loads it.
///
/// # Errors
/// One line.
pub fn available() -> Result<(), VerbsError> {
    verbs().map(drop)
}

fn verbs() -> Result<&'static Verbs, VerbsError> {
    VERBS
        .get_or_init(load)
        .as_ref()
        .map_err(|reason| VerbsError::Library(reason.clone()))
}

fn load() -> Result<Verbs, String> {
    // SAFETY: the library's initialisation does no more than look for devices and their providers.
    let library = unsafe { Library::new(LIBRARY) }.map_err(|error| error.to_string())?;
    macro_rules! find {
        ($name:literal) => {
            // SAFETY: the function has the type that `abi::function` gives it, by the library's manual.
            *unsafe { library.get($name) }.map_err(|error| error.to_string())?
        };
    }
    Ok(Verbs {
        get_device_list: find!(b"ibv_get_device_list\0"),
        free_device_list: find!(b"ibv_free_device_list\0"),
        get_device_name: find!(b"ibv_get_device_name\0"),
        open_device: find!(b"ibv_open_device\0"),
        close_device: find!(b"ibv_close_device\0"),
        query_port: find!(b"ibv_query_port\0"),
        alloc_pd: find!(b"ibv_alloc_pd\0"),
        dealloc_pd: find!(b"ibv_dealloc_pd\0"),
        reg_mr: find!(b"ibv_reg_mr\0"),
        dereg_mr: find!(b"ibv_dereg_mr\0"),
        create_comp_channel: find!(b"ibv_create_comp_channel\0"),
        destroy_comp_channel: find!(b"ibv_destroy_comp_channel\0"),
        create_cq: find!(b"ibv_create_cq\0"),
        destroy_cq: find!(b"ibv_destroy_cq\0"),
        get_cq_event: find!(b"ibv_get_cq_event\0"),
        ack_cq_events: find!(b"ibv_ack_cq_events\0"),
        create_qp: find!(b"ibv_create_qp\0"),
        modify_qp: find!(b"ibv_modify_qp\0"),
        destroy_qp: find!(b"ibv_destroy_qp\0"),
        _library: library,
    })
}

/// What came of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// For a write that came: its immediate.
    pub immediate: Option<u32>,
    /// What went wrong, if something did.
    pub failure: Option<Failure>,
}

/// How a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The peer did not acknowledge it, however often it was sent.
    Unanswered,
    /// The connection was broken already.
    Flushed,
    /// Anything else, by its number.
    Other(u32),
}

/// A queue pair with its rings, queues and registrations.
///
/// Made before the peer is known ([`Endpoint::open`]), then connected. Everything the device may touch is
/// registered when it is made.
pub struct Endpoint {
    verbs: &'static Verbs,
    context: *mut ibv_context,
    pd: *mut ibv_pd,
    landing: Ring,
    landing_mr: *mut ibv_mr,
    staging: Ring,
    staging_mr: *mut ibv_mr,
    channel: *mut ibv_comp_channel,
    sent: *mut ibv_cq,
    received: *mut ibv_cq,
    pair: *mut ibv_qp,
    inline: u32,
    /// Of either ring.
    slots: u16,
    port: RdmaPort,
    mtu: u8,
    packet: u32,
    /// Where the peer's landing ring is, and the key to it.
    remote: (u64, u32),
}

// SAFETY: the library's objects may be used from any thread, and by several at the same time; it locks.
unsafe impl Send for Endpoint {}
// SAFETY: as above. Everything else is not changed once it is shared.
unsafe impl Sync for Endpoint {}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

/// A pointer that the library gave, or why it gave none.
fn given<T>(call: &'static str, pointer: *mut T) -> Result<*mut T, VerbsError> {
    if pointer.is_null() {
        Err(VerbsError::Call {
            call,
            errno: Errno::last(),
        })
    } else {
        Ok(pointer)
    }
}

/// A call that returns an error number, or -1 and errno.
fn done(call: &'static str, result: c_int) -> Result<(), VerbsError> {
    match result {
        0 => Ok(()),
        -1 => Err(VerbsError::Call {
            call,
            errno: Errno::last(),
        }),
        number => Err(VerbsError::Call {
            call,
            errno: Errno(number.abs()),
        }),
    }
}

impl Endpoint {
    /// An end at `port` with rings of `slots`, ready to be described to the peer. `packet` is random.
    ///
    /// # Errors
    /// No library, no device, or no resources.
    pub fn open(port: &RdmaPort, slots: u16, packet: u32) -> Result<Self, VerbsError> {
        let verbs = verbs()?;
        let no_memory = |errno| VerbsError::Call { call: "mmap", errno };
        let mut end = Self {
            verbs,
            context: ptr::null_mut(),
            pd: ptr::null_mut(),
            landing: Ring::new(slots).map_err(no_memory)?,
            landing_mr: ptr::null_mut(),
            staging: Ring::new(slots).map_err(no_memory)?,
            staging_mr: ptr::null_mut(),
            channel: ptr::null_mut(),
            sent: ptr::null_mut(),
            received: ptr::null_mut(),
            pair: ptr::null_mut(),
            inline: 0,
            slots,
            port: port.clone(),
            mtu: 1,
            packet: packet & 0xff_ffff,
            remote: (0, 0),
        };
        end.context = open_device(verbs, &port.device)?;
        let mut attributes = ibv_port_attr::default();
        // Completions in either queue are at most one for each request, of which there are as many as slots.
        let depth = c_int::from(slots) + 8;
        // SAFETY: every pointer handed on was given by the library just before and is not given back
        // before `drop`; rings and attributes outlive the calls, and the rings their registrations.
        unsafe {
            done(
                "ibv_query_port",
                (verbs.query_port)(end.context, port.port, &raw mut attributes),
            )?;
            end.pd = given("ibv_alloc_pd", (verbs.alloc_pd)(end.context))?;
            let access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
            let mr = (verbs.reg_mr)(end.pd, end.landing.start().cast(), end.landing.size(), access);
            end.landing_mr = given("ibv_reg_mr", mr)?;
            let mr = (verbs.reg_mr)(end.pd, end.staging.start().cast(), end.staging.size(), 0);
            end.staging_mr = given("ibv_reg_mr", mr)?;
            end.channel = given("ibv_create_comp_channel", (verbs.create_comp_channel)(end.context))?;
            let none = ptr::null_mut();
            end.sent = given(
                "ibv_create_cq",
                (verbs.create_cq)(end.context, depth, none, ptr::null_mut(), 0),
            )?;
            end.received = given(
                "ibv_create_cq",
                (verbs.create_cq)(end.context, depth, none, end.channel, 0),
            )?;
        }
        if attributes.state != IBV_PORT_ACTIVE {
            return Err(VerbsError::Call {
                call: "the port",
                errno: Errno(libc::ENETDOWN),
            });
        }
        end.mtu = attributes.active_mtu.clamp(1, 5) as u8;
        set_nonblocking(end.event_fd()).map_err(|errno| VerbsError::Call { call: "fcntl", errno })?;
        end.create_pair()?;
        end.initialise()?;
        for _ in 0..slots {
            end.post_receive().map_err(|errno| VerbsError::Call {
                call: "ibv_post_recv",
                errno,
            })?;
        }
        Ok(end)
    }

    fn create_pair(&mut self) -> Result<(), VerbsError> {
        let mut failure = VerbsError::Call {
            call: "ibv_create_qp",
            errno: Errno(libc::EINVAL),
        };
        for max_inline_data in INLINE {
            let mut attributes = ibv_qp_init_attr {
                qp_context: ptr::null_mut(),
                send_cq: self.sent,
                recv_cq: self.received,
                srq: ptr::null_mut(),
                cap: ibv_qp_cap {
                    max_send_wr: u32::from(self.slots),
                    max_recv_wr: u32::from(self.slots),
                    max_send_sge: 1,
                    max_recv_sge: 1,
                    max_inline_data,
                },
                qp_type: IBV_QPT_RC,
                sq_sig_all: 0,
            };
            // SAFETY: domain and queues were made in `open`; the attributes outlive the call.
            let pair = unsafe { (self.verbs.create_qp)(self.pd, &raw mut attributes) };
            match given("ibv_create_qp", pair) {
                Ok(pair) => {
                    self.pair = pair;
                    // Some devices grant more than they were asked for; more is of no use.
                    self.inline = max_inline_data;
                    return Ok(());
                }
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    fn initialise(&self) -> Result<(), VerbsError> {
        let attributes = ibv_qp_attr {
            qp_state: IBV_QPS_INIT,
            port_num: self.port.port,
            qp_access_flags: IBV_ACCESS_REMOTE_WRITE as u32,
            ..Default::default()
        };
        self.modify(
            attributes,
            mask::STATE | mask::PKEY_INDEX | mask::PORT | mask::ACCESS_FLAGS,
        )
    }

    /// What the peer has to know of this end.
    pub fn describe(&self) -> Description {
        // SAFETY: the queue pair and the registration exist until `drop`.
        let (queue_pair, key) = unsafe { ((*self.pair).qp_num, (*self.landing_mr).rkey) };
        let (mtu, packet, gid) = (self.mtu, self.packet, self.port.gid());
        Description {
            queue_pair,
            packet,
            mtu,
            gid,
            ring: self.landing.address(0),
            slots: self.slots,
            key,
        }
    }

    /// Slots of either ring, which are also the requests that may be under way.
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// Connects to the end that `peer` describes, with rings like these: messages may come from now on. They may be sent once
    /// the peer has done the same.
    ///
    /// # Errors
    /// The kernel or the device refuses it, as for a host that can't be reached.
    pub fn connect(&mut self, peer: &Description) -> Result<(), VerbsError> {
        let (subnet, interface) = peer.gid.split_at(8);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        let ah_attr = ibv_ah_attr {
            grh: ibv_global_route {
                dgid: [word(subnet), word(interface)],
                sgid_index: self.port.gid_index,
                hop_limit: 64,
                ..Default::default()
            },
            is_global: 1,
            port_num: self.port.port,
            ..Default::default()
        };
        let receive = ibv_qp_attr {
            qp_state: IBV_QPS_RTR,
            path_mtu: u32::from(self.mtu.min(peer.mtu)),
            rq_psn: peer.packet,
            dest_qp_num: peer.queue_pair,
            ah_attr,
            max_dest_rd_atomic: 1,
            min_rnr_timer: NOT_READY_TIMER,
            ..Default::default()
        };
        let members = mask::STATE
            | mask::AV
            | mask::PATH_MTU
            | mask::DEST_QPN
            | mask::RQ_PSN
            | mask::MAX_DEST_RD_ATOMIC
            | mask::MIN_RNR_TIMER;
        self.modify(receive, members)?;
        let send = ibv_qp_attr {
            qp_state: IBV_QPS_RTS,
            sq_psn: self.packet,
            timeout: TIMEOUT,
            retry_cnt: RETRIES,
            rnr_retry: NOT_READY_RETRIES,
            max_rd_atomic: 1,
            ..Default::default()
        };
        let members =
            mask::STATE | mask::SQ_PSN | mask::TIMEOUT | mask::RETRY_CNT | mask::RNR_RETRY | mask::MAX_RD_ATOMIC;
        self.modify(send, members)?;
        self.remote = (peer.ring, peer.key);
        Ok(())
    }

    fn modify(&self, mut attributes: ibv_qp_attr, members: c_int) -> Result<(), VerbsError> {
        // SAFETY: the queue pair exists until `drop`; the attributes outlive the call.
        done("ibv_modify_qp", unsafe {
            (self.verbs.modify_qp)(self.pair, &raw mut attributes, members)
        })
    }

    /// Puts `bytes` into a slot of the staging ring, from `at` on. The slot must not be under way.
    pub fn stage(&self, slot: usize, at: usize, bytes: &[u8]) {
        self.staging.copy_in(slot, at, bytes);
    }

    /// Copies out of a slot of the landing ring.
    pub fn landed(&self, slot: usize, at: usize, to: &mut [u8]) {
        self.landing.copy_out(slot, at, to);
    }

    /// Writes the first `len` bytes of a staging slot into the same slot of the peer's landing ring, and
    /// tells it by `immediate`.
    ///
    /// # Errors
    /// The device does not take it.
    pub fn post_write(&self, slot: usize, len: usize, immediate: u32) -> Result<(), Errno> {
        assert!(len <= SLOT, "{len} bytes");
        // SAFETY: the registration exists until `drop`.
        let lkey = unsafe { (*self.staging_mr).lkey };
        let mut part = ibv_sge {
            addr: self.staging.address(slot),
            length: len as u32,
            lkey,
        };
        let small = if len as u32 <= self.inline { IBV_SEND_INLINE } else { 0 };
        let (ring, rkey) = self.remote;
        let mut request = ibv_send_wr {
            wr_id: 0,
            next: ptr::null_mut(),
            sg_list: &raw mut part,
            num_sge: c_int::from(len > 0),
            opcode: IBV_WR_RDMA_WRITE_WITH_IMM,
            send_flags: IBV_SEND_SIGNALED | small,
            imm_data: immediate.to_be(),
            remote_addr: ring + (slot * SLOT) as u64,
            rkey,
            _rest: [0; 19],
        };
        let mut refused = ptr::null_mut();
        // SAFETY: the queue pair exists until `drop`, its context with the table of functions, too. The
        // request and its part are read during the call; what the device reads later, the staging slot, is
        // inside the ring (`address` checks it) and registered until `drop`.
        let result = unsafe { ((*(*self.pair).context).ops.post_send)(self.pair, &raw mut request, &raw mut refused) };
        match result {
            0 => Ok(()),
            number => Err(Errno(number.abs())),
        }
    }

    /// Lets one more message come.
    ///
    /// # Errors
    /// The device does not take it.
    pub fn post_receive(&self) -> Result<(), Errno> {
        let mut request = ibv_recv_wr {
            wr_id: 0,
            next: ptr::null_mut(),
            sg_list: ptr::null_mut(),
            num_sge: 0,
        };
        let mut refused = ptr::null_mut();
        // SAFETY: as in `post_write`; the request names no memory.
        let result = unsafe { ((*(*self.pair).context).ops.post_recv)(self.pair, &raw mut request, &raw mut refused) };
        match result {
            0 => Ok(()),
            number => Err(Errno(number.abs())),
        }
    }

    /// Completions of sent messages, in order: how many `into` now starts with.
    ///
    /// # Errors
    /// The device is broken.
    pub fn poll_sent(&self, into: &mut [Completion]) -> Result<usize, Errno> {
        Self::poll(self.sent, into)
    }

    /// Messages that came, in order: how many `into` now starts with.
    ///
    /// # Errors
    /// The device is broken.
    pub fn poll_received(&self, into: &mut [Completion]) -> Result<usize, Errno> {
        Self::poll(self.received, into)
    }

    fn poll(queue: *mut ibv_cq, into: &mut [Completion]) -> Result<usize, Errno> {
        let mut completions = [ibv_wc::default(); 16];
        let most = into.len().min(completions.len());
        // SAFETY: the queue is one of ours, which exist until `drop`; there is room for `most` completions.
        let count = unsafe { ((*(*queue).context).ops.poll_cq)(queue, most as c_int, completions.as_mut_ptr()) };
        if count < 0 {
            return Err(Errno(libc::EIO));
        }
        let count = most.min(count as usize);
        for (to, from) in into.iter_mut().zip(&completions[..count]) {
            let failure = match from.status {
                abi::IBV_WC_SUCCESS => None,
                abi::IBV_WC_WR_FLUSH_ERR => Some(Failure::Flushed),
                abi::IBV_WC_RETRY_EXC_ERR | abi::IBV_WC_RNR_RETRY_EXC_ERR => Some(Failure::Unanswered),
                status => Some(Failure::Other(status)),
            };
            let written = failure.is_none() && from.opcode == IBV_WC_RECV_RDMA_WITH_IMM;
            *to = Completion {
                immediate: written.then_some(u32::from_be(from.imm_data)),
                failure,
            };
        }
        Ok(count)
    }

    /// Has the next message that comes make [`Endpoint::event_fd`] readable. Messages that came before
    /// may not: poll once more after this.
    ///
    /// # Errors
    /// The device is broken.
    pub fn arm(&self) -> Result<(), Errno> {
        // SAFETY: the queue exists until `drop`.
        match unsafe { ((*(*self.received).context).ops.req_notify_cq)(self.received, 0) } {
            0 => Ok(()),
            number => Err(Errno(number.abs())),
        }
    }

    /// Readable when a message came after [`Endpoint::arm`].
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel exists until `drop`, and so does its descriptor.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }

    /// Takes back what made the descriptor readable.
    pub fn clear_events(&self) {
        let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel exists until `drop` and does not block; only our queue is connected to it.
        while unsafe { (self.verbs.get_cq_event)(self.channel, &raw mut queue, &raw mut context) } == 0 {
            // SAFETY: the event taken just now is acknowledged once.
            unsafe { (self.verbs.ack_cq_events)(self.received, 1) };
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // SAFETY: each object is ours, is given back once, and after those that are made of it. An error
        // would mean that one of those still exists, which can't be.
        unsafe {
            let verbs = self.verbs;
            if !self.pair.is_null() {
                (verbs.destroy_qp)(self.pair);
            }
            for queue in [self.sent, self.received] {
                if !queue.is_null() {
                    (verbs.destroy_cq)(queue);
                }
            }
            if !self.channel.is_null() {
                (verbs.destroy_comp_channel)(self.channel);
            }
            for mr in [self.staging_mr, self.landing_mr] {
                if !mr.is_null() {
                    (verbs.dereg_mr)(mr);
                }
            }
            if !self.pd.is_null() {
                (verbs.dealloc_pd)(self.pd);
            }
            if !self.context.is_null() {
                (verbs.close_device)(self.context);
            }
        }
    }
}

fn open_device(verbs: &'static Verbs, name: &str) -> Result<*mut ibv_context, VerbsError> {
    let mut count = 0;
    // SAFETY: the list has `count` devices, which are valid until it is freed below.
    unsafe {
        let list = given("ibv_get_device_list", (verbs.get_device_list)(&raw mut count))?;
        let found = (0..usize::try_from(count).unwrap_or(0))
            .map(|n| *list.add(n))
            .find(|device| CStr::from_ptr((verbs.get_device_name)(*device)).to_bytes() == name.as_bytes());
        let context = match found {
            Some(device) => given("ibv_open_device", (verbs.open_device)(device)),
            None => Err(VerbsError::Device(name.to_owned())),
        };
        (verbs.free_device_list)(list);
        context
    }
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: changes a flag of a descriptor that is ours.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}
