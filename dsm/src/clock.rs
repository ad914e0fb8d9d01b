//! How far apart the TSCs of two nodes are, from timed round trips.
//!
//! A node reads its TSC, asks its peer for the peer's, and reads its own again when the answer is
//! there. The peer read its TSC somewhere in between, so half the round trip bounds the error. A
//! machine's vCPUs may not see time run backwards: the error has to be below the latency of the
//! fastest way on which one vCPU can tell another what time it is, which is one message.

/// One timed round trip, in TSC ticks of equal frequency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Our TSC when the request left.
    pub sent: u64,
    /// The peer's TSC when it answered.
    pub remote: u64,
    /// Our TSC when the answer came.
    pub received: u64,
}

/// What the peer's TSC is ahead of ours (modulo 2^64), and for how long that holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    /// Peer minus ours, in ticks. Wraps.
    pub ticks: i64,
    /// The true offset is at most this far from `ticks`, if both TSCs tick equally.
    pub error: u64,
    /// Our TSC in the middle of the measurement: drift counts from here.
    pub at: u64,
}

/// Why there is no offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClockError {
    /// No usable round trips.
    #[error("TSC offset: no round trip was measured; check the connection")]
    NoSamples,
    /// No single offset explains all round trips.
    #[error(
        "TSC offset: round trips contradict each other by {ticks} ticks; the TSC of one host is not constant (tsc_unstable)"
    )]
    Contradiction {
        /// By how much.
        ticks: u64,
    },
}

impl Sample {
    /// Ticks between request and answer; `None` if our own TSC went backwards.
    fn round_trip(&self) -> Option<u64> {
        let ticks = self.received.wrapping_sub(self.sent);
        i64::try_from(ticks).is_ok().then_some(ticks)
    }

    /// Peer minus ours, if the peer read its TSC when the request left: the greatest offset that
    /// this round trip allows. The least is that less the round trip.
    fn greatest(&self) -> u64 {
        self.remote.wrapping_sub(self.sent)
    }
}

/// The offset that all `samples` allow, taken over a time too short for drift. Every round trip
/// bounds the offset from both sides, the shortest ones most tightly; the bounds of all are
/// combined, so that the error is never more than half the shortest round trip.
///
/// # Errors
/// No samples, or samples that no offset explains.
pub fn estimate(samples: &[Sample]) -> Result<Offset, ClockError> {
    let usable = || samples.iter().filter_map(|sample| Some((sample, sample.round_trip()?)));
    let (best, shortest) = usable()
        .min_by_key(|(_, round_trip)| *round_trip)
        .ok_or(ClockError::NoSamples)?;
    // Offsets wrap: reckon relative to the best sample's greatest.
    let base = best.greatest();
    let (mut low, mut high) = (-i128::from(shortest), 0);
    for (sample, round_trip) in usable() {
        let greatest = i128::from(sample.greatest().wrapping_sub(base) as i64);
        high = high.min(greatest);
        low = low.max(greatest - i128::from(round_trip));
    }
    if low > high {
        return Err(ClockError::Contradiction {
            ticks: (low - high) as u64,
        });
    }
    let middle = (low + high).div_euclid(2);
    Ok(Offset {
        ticks: base.wrapping_add(middle as u64) as i64,
        error: (high - middle) as u64,
        at: best.sent.wrapping_add(shortest / 2),
    })
}

/// What happened to an offset between two measurements of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drift {
    /// Change in parts per million of the time between; positive: the peer's TSC is faster.
    pub ppm: f64,
    /// The errors of the two measurements alone could explain this much, in ppm.
    pub uncertainty_ppm: f64,
}

impl Drift {
    /// The change from `earlier` to `later`; `None` if no time lies between.
    pub fn between(earlier: &Offset, later: &Offset) -> Option<Self> {
        let elapsed = later.at.wrapping_sub(earlier.at) as i64;
        if elapsed <= 0 {
            return None;
        }
        let change = later.ticks.wrapping_sub(earlier.ticks);
        let ppm = |ticks: f64| ticks / elapsed as f64 * 1e6;
        Some(Self {
            ppm: ppm(change as f64),
            uncertainty_ppm: ppm(earlier.error as f64 + later.error as f64),
        })
    }

    /// The TSCs do not tick equally beyond doubt: more than `limit_ppm` apart even if both
    /// measurements were off as far as they can be.
    pub fn exceeds(&self, limit_ppm: f64) -> bool {
        self.ppm.abs() - self.uncertainty_ppm > limit_ppm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A round trip that leaves at `sent` and takes `there` and `back` ticks.
    fn sample(offset: u64, sent: u64, there: u64, back: u64) -> Sample {
        Sample {
            sent,
            remote: sent.wrapping_add(there).wrapping_add(offset),
            received: sent.wrapping_add(there + back),
        }
    }

    fn distance(offset: &Offset, truth: u64) -> u64 {
        ((offset.ticks as u64).wrapping_sub(truth) as i64).unsigned_abs()
    }

    #[test]
    fn the_truth_is_within_the_error_whatever_the_delays() {
        let mut random = 1u64;
        let mut delay = |least: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            least + (random >> 33) % 50_000
        };
        for truth in [0, 1, u64::MAX, 1 << 63, (1 << 63) - 1, 0x1234_5678_9abc_def0] {
            for start in [0, u64::MAX - 300_000, 1 << 40] {
                let samples: Vec<_> = (0..40)
                    .map(|turn: u64| sample(truth, start.wrapping_add(turn * 200_000), delay(900), delay(100)))
                    .collect();
                let offset = estimate(&samples).unwrap();
                let shortest = samples.iter().filter_map(Sample::round_trip).min().unwrap();
                assert!(
                    distance(&offset, truth) <= offset.error,
                    "{truth:#x} {start:#x}: {offset:?}"
                );
                assert!(offset.error <= shortest.div_ceil(2));
            }
        }
    }

    #[test]
    fn short_round_trips_decide() {
        let symmetric = sample(5000, 0, 100, 100);
        assert_eq!(
            estimate(&[symmetric]),
            Ok(Offset {
                ticks: 5000,
                error: 100,
                at: 100
            })
        );
        let slow = sample(5000, 10_000, 70_000, 500);
        assert_eq!(
            estimate(&[slow, symmetric]),
            Ok(Offset {
                ticks: 5000,
                error: 100,
                at: 100
            })
        );
        // One is bounded from above by its quick request, the other from below by its answer.
        let bounds = [sample(5000, 0, 10, 1000), sample(5000, 5000, 1000, 10)];
        assert_eq!(
            estimate(&bounds).map(|offset| (offset.ticks, offset.error)),
            Ok((5000, 10))
        );
    }

    #[test]
    fn refuses_what_no_offset_explains() {
        assert_eq!(estimate(&[]), Err(ClockError::NoSamples));
        let backwards = Sample {
            sent: 100,
            remote: 0,
            received: 99,
        };
        assert_eq!(estimate(&[backwards]), Err(ClockError::NoSamples));
        let jumped = [sample(0, 0, 50, 50), sample(1000, 1000, 50, 50)];
        assert_eq!(estimate(&jumped), Err(ClockError::Contradiction { ticks: 900 }));
    }

    #[test]
    fn drift_counts_only_beyond_the_errors() {
        let earlier = Offset {
            ticks: -100,
            error: 50,
            at: u64::MAX - 999_999,
        };
        let later = Offset {
            ticks: 100,
            error: 50,
            at: 1_000_000,
        };
        let drift = Drift::between(&earlier, &later).unwrap();
        assert!(
            (drift.ppm - 100.0).abs() < 0.01 && (drift.uncertainty_ppm - 50.0).abs() < 0.01,
            "{drift:?}"
        );
        assert!(drift.exceeds(49.0) && !drift.exceeds(51.0));
        assert_eq!(Drift::between(&later, &later), None);
        assert_eq!(Drift::between(&later, &earlier), None);
    }
}
