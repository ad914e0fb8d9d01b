//! What the user decided about each vCPU, and why each is where it is.
//!
//! Requests on the control socket write here; whoever moves vCPUs looks here right before each move:
//!
//! ```
//! use krg_vmm::cluster::vcpus::{Why, Wishes};
//!
//! let wishes = Wishes::new(2);
//! wishes.pin(1, Some(0));
//! assert!(wishes.of(0).is_some_and(|wish| wish.permits(1).is_ok()));
//! assert!(wishes.of(1).is_some_and(|wish| wish.permits(1).is_err()));
//! // After the move:
//! wishes.came(0, Why::Scheduled("node 0 has 2.00 CPUs' work for each CPU, node 1 0.00".into()));
//! assert!(matches!(wishes.why(0), Some(Why::Scheduled(_))));
//! ```

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the user wants of one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// The only node it may run on.
    pub pin: Option<usize>,
    /// It has the capability MIGRATE: without, nothing moves it, not even to its pin.
    pub may_migrate: bool,
}

/// Why a vCPU may not move to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is pinned to this other node.
    Pinned(usize),
    /// It lacks the capability MIGRATE.
    Dropped,
}

impl Wish {
    /// Whether a vCPU that is elsewhere may move to `node`.
    ///
    /// # Errors
    /// What is in the way.
    pub fn permits(self, node: usize) -> Result<(), Refusal> {
        match self.pin {
            _ if !self.may_migrate => Err(Refusal::Dropped),
            Some(pin) if pin != node => Err(Refusal::Pinned(pin)),
            _ => Ok(()),
        }
    }
}

/// Why a vCPU is where it is. Its text completes "it is there because".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The placement put it there when the machine started.
    Placed,
    /// The user moved it.
    Moved,
    /// The user pinned it.
    Pinned,
    /// The scheduler moved it, for this reason.
    Scheduled(String),
}

impl Why {
    /// One word for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Placed => "placed",
            Self::Moved => "moved",
            Self::Pinned => "pinned",
            Self::Scheduled(_) => "scheduled",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Placed => f.write_str("it was placed there at the start"),
            Self::Moved => f.write_str("the user moved it"),
            Self::Pinned => f.write_str("the user pinned it"),
            Self::Scheduled(reason) => f.write_str(reason),
        }
    }
}

/// The wishes for all vCPUs of a machine; clones are one table.
#[derive(Clone, Debug)]
pub struct Wishes(Arc<Mutex<Vec<Vcpu>>>);

#[derive(Clone, Debug)]
struct Vcpu {
    wish: Wish,
    /// How it came where it is.
    came: Why,
    /// It has a pin, and is there or on its way: not so after a restart.
    at_pin: bool,
}

impl Wishes {
    /// The start: nothing is pinned, everything may move, and is where it was placed.
    pub fn new(vcpus: u32) -> Self {
        let vcpu = Vcpu { wish: Wish { pin: None, may_migrate: true }, came: Why::Placed, at_pin: false };
        Self(Arc::new(Mutex::new(vec![vcpu; vcpus as usize])))
    }

    /// The guest starts again: its vCPUs are where they were placed. What the user decided stays.
    pub fn restarted(&self) {
        self.lock().iter_mut().for_each(|vcpu| (vcpu.came, vcpu.at_pin) = (Why::Placed, false));
    }

    /// What the user wants of a vCPU; `None`: there is no such vCPU.
    pub fn of(&self, vcpu: u32) -> Option<Wish> {
        self.lock().get(vcpu as usize).map(|vcpu| vcpu.wish)
    }

    /// Why a vCPU is where it is; `None`: there is no such vCPU.
    pub fn why(&self, vcpu: u32) -> Option<Why> {
        let all = self.lock();
        let vcpu = all.get(vcpu as usize)?;
        Some(if vcpu.at_pin { Why::Pinned } else { vcpu.came.clone() })
    }

    /// Does `act`, which asks for a move, if the vCPU may move to `node`. A pin or a capability that changes meanwhile
    /// waits: what is asked for because of it comes after what `act` asked for. `None`: there is no such vCPU.
    pub fn if_permitted<T>(&self, vcpu: u32, node: usize, act: impl FnOnce() -> T) -> Option<Result<T, Refusal>> {
        let all = self.lock();
        all.get(vcpu as usize).map(|vcpu| vcpu.wish.permits(node).map(|()| act()))
    }

    /// Pins a vCPU, or lifts its pin. Nobody moves it elsewhere from now on; it is not moved by this.
    pub fn pin(&self, vcpu: u32, node: Option<usize>) {
        self.change(vcpu, |vcpu| (vcpu.wish.pin, vcpu.at_pin) = (node, node.is_some()));
    }

    /// Pins as [`Wishes::pin`] does, if the pin is still `before`: undoes a pin that could not be carried out,
    /// unless somebody else has decided since.
    pub fn pin_again(&self, vcpu: u32, before: Option<usize>, node: Option<usize>) {
        self.change(vcpu, |vcpu| {
            if vcpu.wish.pin == before {
                (vcpu.wish.pin, vcpu.at_pin) = (node, node.is_some());
            }
        });
    }

    /// Gives a vCPU the capability MIGRATE, or takes it.
    pub fn allow(&self, vcpu: u32, may_migrate: bool) {
        self.change(vcpu, |vcpu| vcpu.wish.may_migrate = may_migrate);
    }

    /// A vCPU has been moved, for this reason.
    pub fn came(&self, vcpu: u32, why: Why) {
        self.change(vcpu, |vcpu| (vcpu.came, vcpu.at_pin) = (why, vcpu.wish.pin.is_some()));
    }

    fn change(&self, vcpu: u32, how: impl FnOnce(&mut Vcpu)) {
        if let Some(vcpu) = self.lock().get_mut(vcpu as usize) {
            how(vcpu);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vcpu>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_first_everything_may_move_anywhere() {
        let wishes = Wishes::new(2);
        assert_eq!(wishes.of(1), Some(Wish { pin: None, may_migrate: true }));
        assert_eq!((wishes.of(2), wishes.why(2)), (None, None));
        assert_eq!(wishes.of(1).unwrap().permits(9), Ok(()));
        assert_eq!(wishes.why(1), Some(Why::Placed));
    }

    #[test]
    fn pins_and_the_capability_are_in_the_way_of_moves() {
        let wishes = Wishes::new(2);
        wishes.pin(0, Some(3));
        let permits = |vcpu, node| wishes.of(vcpu).unwrap().permits(node);
        assert_eq!([permits(0, 3), permits(0, 1), permits(1, 1)], [Ok(()), Err(Refusal::Pinned(3)), Ok(())]);
        wishes.allow(0, false);
        assert_eq!([permits(0, 3), permits(0, 1), permits(1, 1)], [Err(Refusal::Dropped), Err(Refusal::Dropped), Ok(())]);
        wishes.pin(0, None);
        assert_eq!(permits(0, 1), Err(Refusal::Dropped));
        wishes.allow(0, true);
        assert_eq!(permits(0, 1), Ok(()));
        assert_eq!(wishes.if_permitted(0, 1, || 7), Some(Ok(7)));
        assert_eq!(wishes.if_permitted(7, 1, || unreachable!("it is not there")), None::<Result<(), _>>);
        wishes.pin(0, Some(3));
        assert_eq!(wishes.if_permitted(0, 1, || unreachable!("it is pinned")), Some(Err::<(), _>(Refusal::Pinned(3))));
        // What is not there is not there; nobody else is changed.
        wishes.pin(7, Some(0));
        assert_eq!(wishes.of(7), None);
    }

    #[test]
    fn a_pin_that_failed_does_not_undo_another() {
        let wishes = Wishes::new(1);
        wishes.pin(0, Some(1));
        wishes.pin_again(0, Some(1), None);
        assert_eq!(wishes.of(0).unwrap().pin, None);
        wishes.pin(0, Some(2));
        wishes.pin_again(0, Some(1), None);
        assert_eq!(wishes.of(0).unwrap().pin, Some(2));
    }

    #[test]
    fn the_reason_is_the_last_move_and_a_pin_comes_first() {
        let wishes = Wishes::new(1);
        wishes.came(0, Why::Scheduled("because".into()));
        assert_eq!(wishes.why(0).unwrap().to_string(), "because");
        wishes.pin(0, Some(1));
        wishes.came(0, Why::Moved);
        assert_eq!(wishes.why(0), Some(Why::Pinned));
        wishes.pin(0, None);
        assert_eq!(wishes.why(0), Some(Why::Moved));
        wishes.pin(0, Some(1));
        wishes.restarted();
        assert_eq!((wishes.of(0).unwrap().pin, wishes.why(0)), (Some(1), Some(Why::Placed)));
        wishes.came(0, Why::Scheduled("it is pinned there".into()));
        assert_eq!(wishes.why(0), Some(Why::Pinned));
    }
}
