//! The CMOS clock (MC146818), read-only: it shows the host's wall clock.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Index port; the data port follows.
pub const INDEX_PORT: u16 = 0x70;
/// Data port.
pub const DATA_PORT: u16 = 0x71;

/// The clock. Its only state is the selected register.
#[derive(Default)]
pub struct Rtc {
    index: AtomicU8,
}

impl Rtc {
    /// The selected register, for a saved state.
    pub fn index(&self) -> u8 {
        self.index.load(Ordering::Relaxed)
    }

    /// Selects a register: a write to [`INDEX_PORT`]. Bit 7 (NMI mask) has no effect.
    pub fn select(&self, index: u8) {
        self.index.store(index & 0x7f, Ordering::Relaxed);
    }

    /// Reads the selected register at the host's time.
    pub fn read(&self) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        register(self.index(), now)
    }
}

/// Value of register `index` at `now` (seconds since 1970, UTC): BCD, 24-hour mode, because Linux
/// takes a PC's clock to be BCD whatever register B says.
fn register(index: u8, now: u64) -> u8 {
    let (year, month, day) = civil(now / 86_400);
    let value = match index {
        0x00 => now % 60,
        0x02 => now / 60 % 60,
        0x04 => now / 3600 % 24,
        0x06 => (now / 86_400 + 4) % 7 + 1,
        0x07 => day,
        0x08 => month,
        0x09 => year % 100,
        0x32 => year / 100,
        0x0a => return 0x26,
        0x0b => return 0x02,
        0x0d => return 0x80,
        _ => return 0,
    };
    (((value / 10 % 10) << 4) | (value % 10)) as u8
}

/// Year, month and day of a day counted from 1 January 1970, in the Gregorian calendar. Counts
/// from 1 March, so that the leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let from_march = days + 719_468;
    let era = from_march / 146_097;
    let day_of_era = from_march % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(11_017), (2000, 3, 1));
        assert_eq!(civil(20_789), (2026, 12, 2));
    }

    #[test]
    fn registers_are_bcd() {
        // 2000-02-29 23:59:58 UTC, a Tuesday.
        let now = 11_016 * 86_400 + 86_398;
        let read = |index| register(index, now);
        assert_eq!(
            [0x32, 9, 8, 7, 4, 2, 0, 6].map(read),
            [0x20, 0, 2, 0x29, 0x23, 0x59, 0x58, 3]
        );
        assert_eq!([0x0a, 0x0b, 0x0d, 0x7f].map(read), [0x26, 2, 0x80, 0]);
    }
}
