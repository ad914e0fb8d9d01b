//! Which pages a thread reads after a page it waits for: seen in its faults. Pure: decides from the order and the times
//! of faults alone.
//!
//! A program that goes through the same list, tree or graph again reads the same pages again that another host has written
//! since, one after the other. The pages are anywhere, so no stream shows them (see [`crate::prefetch`]); but who faulted on
//! one has faulted on the same others soon after it. A fault *leads* the reads that the same thread has soon after it, its
//! *followers*. Who led the same follower twice asks for it at once the next time.
//!
//! Only reads follow. To ask for the right to write before it is needed takes the page from its readers too early, and they
//! ask for it again. For the same reason whoever asks leaves out pages that somebody writes all the time ([`Standing::Away`]).
//!
//! Pages that are there don't fault, so a follower that was asked for shows no more whether it is wanted. Now and then it
//! is not asked for, and its fault tells: twice as many times are taken on trust each time it comes, once if it does not.

use std::collections::{HashMap, VecDeque};

/// A fault: the page, and whether it asks to write.
pub type Fault = (u32, bool);

/// Reads of one thread after a fault that may be its followers, at most, and how long after it, in microseconds.
const FOLLOW: usize = 8;
const SOON: u64 = 10_000;
/// Followers of one fault that are remembered.
const FOLLOWERS: usize = 16;
/// Faults whose followers are remembered; more halve these.
const LEADERS: usize = 4096;
/// Threads that are followed at a time; more are begun with anew.
const THREADS: usize = 1024;
/// Times a follower came, less those it did not: when it is believed, and at most.
const BELIEVED: u8 = 2;
const SURE: u8 = 3;
/// Times in a row a follower is asked for without being seen, at most.
const TRUST: u8 = 16;

/// What came of followers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FollowerCounters {
    /// Asked for.
    pub asked: u64,
    /// Believed, not asked for, and came.
    pub came: u64,
    /// The same, and did not come.
    pub stayed_away: u64,
}

/// Whether a page is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is, or on its way: a fault on it would not be seen.
    Here,
    /// It is not, and may be asked for.
    Askable,
    /// It is not, and may not.
    Away,
}

/// A page that was read soon after a fault.
#[derive(Clone, Debug)]
struct Follower {
    page: u32,
    /// Times it came, less those it did not: forgotten at 0.
    score: u8,
    /// Times it is taken on trust, and how many of these are left.
    trust: u8,
    left: u8,
}

/// A fault and what followed it.
#[derive(Debug, Default)]
struct Leader {
    followers: Vec<Follower>,
    /// How often it was one.
    times: u32,
}

/// The reads after a fault, as far as they came.
#[derive(Debug)]
struct Open {
    leader: Fault,
    at: u64,
    /// Followers whose fault would not be seen.
    unseen: Vec<u32>,
    came: Vec<u32>,
}

/// Followers of the faults of one node's threads.
#[derive(Debug, Default)]
pub struct Followers {
    leaders: HashMap<Fault, Leader>,
    open: HashMap<u32, VecDeque<Open>>,
    counters: FollowerCounters,
}

impl Followers {
    /// Takes note that `thread` waits for a page, which `fault` names, at time `now`, in microseconds. Says what it may well read
    /// soon: `room` pages at most.
    pub fn fault(&mut self, thread: u32, fault: Fault, now: u64, room: usize, standing: impl Fn(u32) -> Standing) -> Vec<u32> {
        self.note(thread, fault, now);
        if self.leaders.len() >= LEADERS && !self.leaders.contains_key(&fault) {
            self.forget();
        }
        let leader = self.leaders.entry(fault).or_default();
        leader.times = leader.times.saturating_add(1);
        let mut open = Open { leader: fault, at: now, unseen: Vec::new(), came: Vec::new() };
        let mut asked = Vec::new();
        for follower in &mut leader.followers {
            match standing(follower.page) {
                Standing::Here => open.unseen.push(follower.page),
                Standing::Askable if follower.score >= BELIEVED && follower.left > 0 && asked.len() < room => {
                    follower.left -= 1;
                    asked.push(follower.page);
                }
                Standing::Askable | Standing::Away => {}
            }
        }
        self.counters.asked += asked.len() as u64;
        let open_now = self.open.entry(thread).or_default();
        open_now.push_back(open);
        // Whoever leads them, too, sees them no more.
        open_now.iter_mut().for_each(|earlier| earlier.unseen.extend(&asked));
        asked
    }

    /// What came of followers so far.
    pub fn counters(&self) -> FollowerCounters {
        self.counters
    }

    /// A fault of a thread follows those it had before.
    fn note(&mut self, thread: u32, (page, write): Fault, now: u64) {
        if self.open.len() >= THREADS && !self.open.contains_key(&thread) {
            // What these were about to lead is not known any more.
            self.open.clear();
        }
        let open = self.open.entry(thread).or_default();
        let is_over = |earlier: &Open| earlier.came.len() >= FOLLOW || now.saturating_sub(earlier.at) > SOON;
        while open.front().is_some_and(is_over) {
            let Some(over) = open.pop_front() else { break };
            if let Some(leader) = self.leaders.get_mut(&over.leader) {
                leader.followed_by(&over, &mut self.counters);
            }
        }
        for earlier in open.iter_mut().filter(|_| !write) {
            if earlier.leader.0 != page && !earlier.came.contains(&page) {
                earlier.came.push(page);
            }
        }
    }

    /// Forgets the faults that led less often, which are half of them or more.
    fn forget(&mut self) {
        let mut times: Vec<u32> = self.leaders.values().map(|leader| leader.times).collect();
        let middle = times.len() / 2;
        let median = *times.select_nth_unstable(middle).1;
        self.leaders.retain(|_, leader| leader.times > median);
        self.leaders.values_mut().for_each(|leader| leader.times /= 2);
    }
}

impl Leader {
    /// Judges its followers by what came, and takes note of new ones.
    fn followed_by(&mut self, over: &Open, counters: &mut FollowerCounters) {
        // What comes after so many is not known.
        let all = over.came.len() < FOLLOW;
        self.followers.retain_mut(|follower| {
            let (came, unseen) = (over.came.contains(&follower.page), over.unseen.contains(&follower.page));
            let believed = follower.score >= BELIEVED;
            if came {
                follower.score = (follower.score + 1).min(SURE);
            }
            if came && !unseen {
                counters.came += u64::from(believed);
                follower.trust = if believed { (follower.trust * 2).min(TRUST) } else { 1 };
                follower.left = follower.trust;
            } else if !came && !unseen && all {
                counters.stayed_away += u64::from(believed);
                follower.score -= 1;
                (follower.trust, follower.left) = (1, 1);
            }
            follower.score > 0
        });
        for page in &over.came {
            if self.followers.len() < FOLLOWERS && self.followers.iter().all(|follower| follower.page != *page) {
                self.followers.push(Follower { page: *page, score: 1, trust: 1, left: 1 });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: usize = 1000;

    /// The pages that have come since the start of a round, of a guest whose others take all of them back between rounds.
    #[derive(Default)]
    struct Guest {
        followers: Followers,
        here: std::collections::HashSet<u32>,
        now: u64,
    }

    impl Guest {
        /// A thread reads these one after the other: how many of them it waits for.
        fn reads(&mut self, thread: u32, pages: impl IntoIterator<Item = u32>) -> usize {
            let before = self.here.len();
            let mut asked = 0;
            for page in pages {
                if self.here.insert(page) {
                    self.now += 100;
                    let standing = |page| if self.here.contains(&page) { Standing::Here } else { Standing::Askable };
                    let expected = self.followers.fault(thread, (page, false), self.now, ROOM, standing);
                    asked += expected.len();
                    self.here.extend(expected);
                }
            }
            self.here.len() - before - asked
        }

        /// The same after all was taken back, and not soon after what was before.
        fn round(&mut self, thread: u32, pages: impl IntoIterator<Item = u32>) -> usize {
            self.here.clear();
            self.now += SOON + 1;
            self.reads(thread, pages)
        }
    }

    #[test]
    fn who_led_the_same_twice_asks_for_them_at_once() {
        let mut guest = Guest::default();
        assert_eq!([0, 1].map(|_| guest.round(1, [70, 3, 1000, 40])), [4, 4]);
        assert_eq!(guest.round(1, [70, 40, 1000, 3]), 1, "in another order");
    }

    #[test]
    fn now_and_then_followers_are_left_out_to_see_whether_they_still_come() {
        let mut guest = Guest::default();
        let rounds: Vec<usize> = (0..20).map(|_| guest.round(1, [1, 5])).collect();
        // Believed after two; then on trust once, twice, four times, ...
        assert_eq!(rounds, [2, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1]);
        assert_eq!(guest.followers.counters(), FollowerCounters { asked: 15, came: 3, stayed_away: 0 });
    }

    #[test]
    fn followers_that_stay_away_are_asked_for_once_more_and_forgotten() {
        let mut guest = Guest::default();
        (0..2).for_each(|_| _ = guest.round(1, [1, 5]));
        let asked: Vec<u64> = (0..6)
            .map(|_| {
                guest.round(1, [1]);
                guest.followers.counters().asked
            })
            .collect();
        assert_eq!(asked, [1; 6]);
        assert_eq!(guest.followers.counters().stayed_away, 1);
    }

    #[test]
    fn what_comes_late_or_on_another_thread_follows_nothing() {
        let mut guest = Guest::default();
        for _ in 0..4 {
            guest.round(1, [1]);
            guest.now += SOON;
            guest.reads(1, [2]);
            guest.reads(2, [3]);
        }
        assert_eq!(guest.followers.counters().asked, 0);
    }

    #[test]
    fn no_more_is_asked_for_than_there_is_room() {
        let mut followers = Followers::default();
        for round in 1..3 {
            (0..6).for_each(|page| _ = followers.fault(1, (page, false), round * 2 * SOON, ROOM, |_| Standing::Askable));
        }
        assert_eq!(followers.fault(1, (0, false), 6 * SOON, 2, |_| Standing::Askable), [1, 2]);
    }

    #[test]
    fn writes_lead_and_do_not_follow() {
        let mut followers = Followers::default();
        let asked = |followers: &mut Followers, round: u64| followers.fault(1, (1, true), round * 2 * SOON, ROOM, |_| Standing::Askable);
        for round in 1..3 {
            assert_eq!(asked(&mut followers, round), [0; 0]);
            followers.fault(1, (2, true), round * 2 * SOON + 1, ROOM, |_| Standing::Askable);
            followers.fault(1, (3, false), round * 2 * SOON + 2, ROOM, |_| Standing::Askable);
        }
        assert_eq!(asked(&mut followers, 3), [3]);
    }

    #[test]
    fn followers_on_their_way_are_not_asked_for_nor_missed() {
        let mut followers = Followers::default();
        for (round, standing, asked) in [(1, Standing::Askable, 0), (2, Standing::Askable, 0), (3, Standing::Here, 0), (4, Standing::Here, 0), (5, Standing::Away, 0)] {
            assert_eq!(followers.fault(1, (1, true), round * 2 * SOON, ROOM, |_| standing).len(), asked);
            if round < 3 {
                followers.fault(1, (2, false), round * 2 * SOON + 1, ROOM, |_| standing);
            }
        }
        assert_eq!(followers.fault(1, (1, true), 12 * SOON, ROOM, |_| Standing::Askable), [0; 0], "it stayed away the last time");
        assert_eq!(followers.counters(), FollowerCounters { asked: 0, came: 0, stayed_away: 1 });
    }

    #[test]
    fn long_chains_are_followed_from_fault_to_fault() {
        let mut guest = Guest::default();
        let rounds: Vec<usize> = (0..8).map(|_| guest.round(1, (0..40).map(|n| n * 977))).collect();
        assert_eq!(rounds[..2], [40, 40]);
        assert!(rounds[2] <= 10, "{rounds:?}");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_those_who_lead_often_stay() {
        let mut guest = Guest::default();
        for n in 0..3 * LEADERS as u32 {
            if n % 100 == 0 {
                guest.round(1, [1, 5]);
            }
            guest.reads(2 + n, [100 + n]);
        }
        assert!(guest.followers.leaders.len() <= LEADERS);
        assert!(guest.followers.open.len() <= THREADS);
        assert!(guest.followers.leaders.values().all(|leader| leader.followers.len() <= FOLLOWERS));
        let leader = &guest.followers.leaders[&(1, false)];
        assert!(leader.followers.iter().any(|follower| follower.page == 5 && follower.score >= BELIEVED));
    }
}
