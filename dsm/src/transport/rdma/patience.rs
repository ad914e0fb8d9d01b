//! How long to look for the next message before going to sleep.

use std::time::Duration;

/// Longest look. Going to sleep and being woken costs a few microseconds on a quiet host, tens on a busy one.
const LONGEST: Duration = Duration::from_micros(50);

/// Learns from the waits before: looking only pays while messages come close together.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// A moving mean of the waits, each counted as four times the longest look at most.
    expected: Duration,
    /// A host with one CPU does not look: whoever is to send has to run.
    never: bool,
}

impl Patience {
    /// For a host with `cpus`.
    pub fn new(cpus: usize) -> Self {
        Self {
            expected: Duration::ZERO,
            never: cpus < 2,
        }
    }

    /// For messages that nobody waits for that urgently: it never looks.
    pub fn none() -> Self {
        Self::new(1)
    }

    /// How long to look now.
    pub fn look(&self) -> Duration {
        if self.never || self.expected > LONGEST {
            Duration::ZERO
        } else {
            LONGEST
        }
    }

    /// A message came after this wait, asleep or not.
    pub fn waited(&mut self, wait: Duration) {
        self.expected = (self.expected * 7 + wait.min(4 * LONGEST)) / 8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_while_it_pays() {
        let mut patience = Patience::new(2);
        assert_eq!(patience.look(), LONGEST);
        for _ in 0..20 {
            patience.waited(Duration::from_millis(500));
        }
        assert_eq!(patience.look(), Duration::ZERO);
        for _ in 0..30 {
            patience.waited(Duration::from_micros(5));
        }
        assert_eq!(patience.look(), LONGEST);
        assert_eq!(Patience::new(1).look(), Duration::ZERO);
        assert_eq!(Patience::none().look(), Duration::ZERO);
    }
}
