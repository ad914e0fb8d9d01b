//! Litmus tests for a Linux guest: run inside the machine, on CPUs of different hosts.
//!
//! `guest-litmus ITERATIONS TABLES CPU CPU...` pins one thread of each test to each CPU, round robin, and
//! counts outcomes that x86's memory model (or Linux) does not allow: ITERATIONS of each test of memory,
//! TABLES of those of page tables, which are thousands of changes each. It prints a line a test, with how
//! often each outcome was seen, and ends with `litmus: all as allowed` and status 0, or with
//! `litmus: FORBIDDEN` and status 1.
//!
//! The memory tests run in rounds: in round r every store writes r, so a load sees the old value or the
//! new one and nothing has to be reset. Each variable has a page, so every access that another host has
//! made impossible is a page fault there.

use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, compiler_fence, fence};
use std::time::Instant;

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// Iterations of a round; each has a word of each variable's page.
const BATCH: usize = 64;

#[repr(C, align(4096))]
struct Page([AtomicU64; WORDS]);

impl Page {
    fn boxed() -> Box<Page> {
        Box::new(Page([const { AtomicU64::new(0) }; WORDS]))
    }
}

#[derive(Clone, Copy)]
enum Op {
    Store(usize),
    Load(usize),
    Fence,
}

use Op::{Fence, Load, Store};

struct Test {
    name: &'static str,
    threads: &'static [&'static [Op]],
    /// Given which loads saw the new value, in the order of the text.
    forbidden: fn(&[bool]) -> bool,
}

const TESTS: &[Test] = &[
    Test {
        name: "SB+mfences",
        threads: &[&[Store(0), Fence, Load(1)], &[Store(1), Fence, Load(0)]],
        forbidden: |new| !new[0] && !new[1],
    },
    Test { name: "MP", threads: &[&[Store(0), Store(1)], &[Load(1), Load(0)]], forbidden: |new| new[0] && !new[1] },
    Test { name: "LB", threads: &[&[Load(0), Store(1)], &[Load(1), Store(0)]], forbidden: |new| new[0] && new[1] },
    Test {
        name: "IRIW",
        threads: &[&[Store(0)], &[Store(1)], &[Load(0), Load(1)], &[Load(1), Load(0)]],
        forbidden: |new| new[0] && !new[1] && new[2] && !new[3],
    },
    Test { name: "CoRR", threads: &[&[Store(0)], &[Load(0), Load(0)]], forbidden: |new| new[0] && !new[1] },
];

/// A barrier of its own page: spins, and yields for those who share a CPU.
struct Barrier {
    page: Box<Page>,
    parties: u64,
}

impl Barrier {
    fn new(parties: usize) -> Self {
        Barrier { page: Page::boxed(), parties: parties as u64 }
    }

    fn wait(&self) {
        let turn = self.page.0[0].fetch_add(1, Ordering::SeqCst) / self.parties + 1;
        while self.page.0[0].load(Ordering::SeqCst) < turn * self.parties {
            std::thread::yield_now();
        }
    }
}

fn pin(cpu: usize) {
    // SAFETY: `set` is a plain bit mask of the size that is given, valid when zero.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    assert_eq!(result, 0, "no CPU {cpu}");
}

/// Runs `body(thread)` on `count` threads, pinned to `cpus` in turn.
fn on_cpus(count: usize, cpus: &[usize], body: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        for thread in 0..count {
            let body = &body;
            scope.spawn(move || {
                pin(cpus[thread % cpus.len()]);
                body(thread);
            });
        }
    });
}

/// The number of forbidden outcomes, and how often each outcome was seen: a digit a load, 1 for the new
/// value.
fn litmus(test: &Test, iterations: usize, cpus: &[usize]) -> (usize, String) {
    let variables = [Page::boxed(), Page::boxed()];
    let threads = test.threads.len();
    let barrier = Barrier::new(threads);
    let seen: Vec<Box<Page>> = (0..threads).map(|_| Page::boxed()).collect();
    let outcomes = Mutex::new(BTreeMap::<Vec<bool>, usize>::new());
    let rounds = iterations.div_ceil(BATCH) as u64;
    on_cpus(threads, cpus, |thread| {
        for round in 1..=rounds {
            barrier.wait();
            for i in 0..BATCH {
                let mut bits = 0;
                let mut loads = 0;
                for op in test.threads[thread] {
                    match *op {
                        Store(v) => variables[v].0[i].store(round, Ordering::Relaxed),
                        Load(v) => {
                            bits |= u64::from(variables[v].0[i].load(Ordering::Relaxed) == round) << loads;
                            loads += 1;
                        }
                        Fence => fence(Ordering::SeqCst),
                    }
                    // The hardware's order is tested: the compiler keeps the program's.
                    compiler_fence(Ordering::SeqCst);
                }
                seen[thread].0[i].store(bits, Ordering::Relaxed);
            }
            barrier.wait();
            if thread == 0 {
                let mut outcomes = outcomes.lock().expect("only this thread counts");
                for i in 0..BATCH {
                    let mut new = Vec::new();
                    for (thread, ops) in test.threads.iter().enumerate() {
                        let bits = seen[thread].0[i].load(Ordering::Relaxed);
                        let loads = ops.iter().filter(|op| matches!(op, Load(_))).count();
                        new.extend((0..loads).map(|n| bits >> n & 1 != 0));
                    }
                    *outcomes.entry(new).or_default() += 1;
                }
            }
        }
    });
    let outcomes = outcomes.into_inner().expect("all threads have ended well");
    let forbidden = outcomes.iter().filter(|(new, _)| (test.forbidden)(new)).map(|(_, count)| count).sum();
    let digits = |new: &[bool]| new.iter().map(|bit| if *bit { '1' } else { '0' }).collect::<String>();
    let seen: Vec<_> = outcomes.iter().map(|(new, count)| format!("{} {count}", digits(new))).collect();
    (forbidden, seen.join(", "))
}

/// Locked increments of one word; the number lost.
fn increments(iterations: usize, cpus: &[usize]) -> usize {
    let page = Page::boxed();
    on_cpus(cpus.len(), cpus, |_| {
        for _ in 0..iterations {
            page.0[7].fetch_add(1, Ordering::SeqCst);
        }
    });
    iterations * cpus.len() - page.0[7].load(Ordering::SeqCst) as usize
}

struct Plain(UnsafeCell<u64>);

// SAFETY: only touched under the lock of `locked`.
unsafe impl Sync for Plain {}

/// Plain increments under a spin lock; the number lost.
fn locked(iterations: usize, cpus: &[usize]) -> usize {
    let lock = Page::boxed();
    let count = Plain(UnsafeCell::new(0));
    let count = &count;
    on_cpus(cpus.len(), cpus, |_| {
        for _ in 0..iterations {
            while lock.0[0].swap(1, Ordering::Acquire) != 0 {
                std::thread::yield_now();
            }
            // SAFETY: the lock is held.
            unsafe { *count.0.get() += 1 };
            lock.0[0].store(0, Ordering::Release);
        }
    });
    // SAFETY: all threads have ended.
    iterations * cpus.len() - unsafe { *count.0.get() } as usize
}

/// Maps a page on one CPU, has it read and written on another, protects it, unmaps it and maps the next
/// one, which the kernel makes of the memory just freed. The number of wrong values.
fn mappings(iterations: usize, cpus: &[usize]) -> usize {
    let shared = Page::boxed();
    let (turn, address, wrong) = (&shared.0[0], &shared.0[8], AtomicUsize::new(0));
    on_cpus(2, cpus, |thread| {
        for n in 0..iterations as u64 {
            let wait = |what| {
                while turn.load(Ordering::SeqCst) != what {
                    std::thread::yield_now();
                }
            };
            if thread == 0 {
                // SAFETY: a new private mapping; only its address is used, and only until munmap.
                let page = unsafe {
                    libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
                };
                assert_ne!(page, libc::MAP_FAILED);
                // SAFETY: the page is mapped, aligned, and used as atomics by both threads.
                let words = unsafe { &*page.cast::<Page>() };
                wrong.fetch_add(words.0.iter().filter(|w| w.load(Ordering::Relaxed) != 0).count(), Ordering::Relaxed);
                words.0[3].store(n + 1, Ordering::Relaxed);
                address.store(page as u64, Ordering::Relaxed);
                turn.store(4 * n + 1, Ordering::SeqCst);
                wait(4 * n + 2);
                wrong.fetch_add(usize::from(words.0[4].load(Ordering::Relaxed) != n + 7), Ordering::Relaxed);
                // SAFETY: the mapping above; the other thread only reads from now on.
                assert_eq!(unsafe { libc::mprotect(page, PAGE, libc::PROT_READ) }, 0);
                turn.store(4 * n + 3, Ordering::SeqCst);
                wait(4 * n + 4);
                // SAFETY: the mapping above; the other thread has said that it is through with it.
                assert_eq!(unsafe { libc::munmap(page, PAGE) }, 0);
            } else {
                wait(4 * n + 1);
                // SAFETY: mapped by thread 0 until the turn 4 n + 4, and used as atomics.
                let words = unsafe { &*(address.load(Ordering::Relaxed) as *const Page) };
                wrong.fetch_add(usize::from(words.0[3].load(Ordering::Relaxed) != n + 1), Ordering::Relaxed);
                words.0[4].store(n + 7, Ordering::Relaxed);
                turn.store(4 * n + 2, Ordering::SeqCst);
                wait(4 * n + 3);
                wrong.fetch_add(usize::from(words.0[4].load(Ordering::Relaxed) != n + 7), Ordering::Relaxed);
                turn.store(4 * n + 4, Ordering::SeqCst);
            }
        }
    });
    wrong.into_inner()
}

/// Forks on every CPU at once; each child writes to its copy of a page. The number of wrong values.
fn forks(iterations: usize, cpus: &[usize]) -> usize {
    let wrong = AtomicUsize::new(0);
    on_cpus(cpus.len(), cpus, |thread| {
        let own = Page::boxed();
        for n in 0..iterations as u64 {
            own.0[1].store(n, Ordering::Relaxed);
            // SAFETY: the child only touches its own memory and ends by _exit.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let good = own.0[1].load(Ordering::Relaxed) == n;
                own.0[1].store(!n, Ordering::Relaxed);
                let good = good && own.0[1].load(Ordering::Relaxed) == !n;
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(if good { 40 } else { 41 }) };
            }
            assert!(child > 0, "thread {thread}: fork failed");
            let mut status = 0;
            // SAFETY: waits for the child above and fills `status`.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            let good = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 40;
            let kept = own.0[1].load(Ordering::Relaxed) == n;
            wrong.fetch_add(usize::from(!good || !kept), Ordering::Relaxed);
        }
    });
    wrong.into_inner()
}

fn main() -> ExitCode {
    let arguments: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let Some((&[iterations, tables], cpus)) = arguments.split_first_chunk().filter(|(_, cpus)| cpus.len() >= 2) else {
        eprintln!("usage: guest-litmus ITERATIONS TABLES CPU CPU...: at least two CPUs are needed");
        return ExitCode::from(2);
    };
    let mut forbidden = 0;
    let mut report = |name: &str, iterations: usize, test: &dyn Fn() -> (usize, String)| {
        let begun = Instant::now();
        let (bad, seen) = test();
        let seconds = begun.elapsed().as_secs_f64();
        println!("{name}: {iterations} iterations, {bad} forbidden; {seconds:.1} s by the guest's clock{seen}");
        forbidden += bad;
    };
    for test in TESTS {
        report(test.name, iterations.div_ceil(BATCH) * BATCH, &|| {
            let (bad, seen) = litmus(test, iterations, cpus);
            (bad, format!("; seen: {seen}"))
        });
    }
    report("locked increments", iterations, &|| (increments(iterations, cpus), String::new()));
    report("spin lock", iterations, &|| (locked(iterations, cpus), String::new()));
    report("map, touch, protect, unmap", tables, &|| (mappings(tables, cpus), String::new()));
    report("fork", tables, &|| (forks(tables, cpus), String::new()));
    println!("litmus: {}", if forbidden == 0 { "all as allowed" } else { "FORBIDDEN" });
    ExitCode::from(u8::from(forbidden > 0))
}
