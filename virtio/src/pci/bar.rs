//! Address assignment in the PCI window before the guest boots.

use std::ops::Range;

use crate::error::{Error, Result};

/// Hands out naturally aligned addresses of the 32-bit PCI window, upwards.
#[derive(Debug)]
pub(super) struct WindowAllocator {
    next: u64,
    end: u64,
}

impl WindowAllocator {
    pub(super) fn new(window: Range<u64>) -> Self {
        WindowAllocator {
            next: window.start,
            end: window.end,
        }
    }

    /// Takes `size` bytes (a power of two, as every BAR is), aligned to `size`.
    pub(super) fn take(&mut self, size: u64) -> Result<u64> {
        let full = Error::WindowFull { size };
        let Some(base) = self.next.checked_next_multiple_of(size) else {
            return Err(full);
        };
        match base.checked_add(size) {
            Some(end) if end <= self.end => {
                self.next = end;
                Ok(base)
            }
            _ => Err(full),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_aligned_and_the_window_ends() {
        let mut window = WindowAllocator::new(0xC000_1000..0xC004_0000);
        assert_eq!(window.take(0x1000).unwrap(), 0xC000_1000);
        assert_eq!(window.take(0x1_0000).unwrap(), 0xC001_0000);
        assert_eq!(window.take(0x1000).unwrap(), 0xC002_0000);
        assert!(window.take(0x2_0000).is_err());
        assert_eq!(window.take(0x1_0000).unwrap(), 0xC003_0000);
        assert!(window.take(0x1000).is_err());
    }

    #[test]
    fn no_overflow_at_the_top_of_the_address_space() {
        let mut window = WindowAllocator::new(u64::MAX - 0x10..u64::MAX);
        assert!(window.take(0x1000).is_err());
    }
}
