//! Finds the words in which a live page differs from its twin.
//!
//! It runs over the replicated pages that may have changed before a message leaves, so the common case, no difference,
//! has to be quick. The guest writes to the page meanwhile: all reads of it are either atomic
//! words or wide loads in assembly, of which each aligned word is whole on x86-64. A word that
//! changes after it was read counts as unchanged, exactly as if it had changed a moment later.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::memory::PAGE_WORDS;

/// Words compared at once: one cache line.
const LINE: usize = 8;

/// Finds the first line at or after a word (a multiple of [`LINE`]) that differs; `PAGE_WORDS` if
/// none does.
type Search = fn(&[AtomicU64; PAGE_WORDS], &[u64; PAGE_WORDS], usize) -> usize;

/// Appends to `out` each word that differs from `twin`, with its present value.
pub fn differences(live: &[AtomicU64; PAGE_WORDS], twin: &[u64; PAGE_WORDS], out: &mut Vec<(u16, u64)>) {
    let next_line = quickest();
    let mut at = 0;
    loop {
        at = next_line(live, twin, at);
        if at >= PAGE_WORDS {
            return;
        }
        for word in at..at + LINE {
            let now = live[word].load(Ordering::Relaxed);
            if now != twin[word] {
                out.push((word as u16, now));
            }
        }
        at += LINE;
    }
}

/// The searches that this CPU can do.
fn searches() -> Vec<Search> {
    let mut searches: Vec<Search> = vec![next_line_words];
    #[cfg(target_arch = "x86_64")]
    {
        searches.push(next_line_sse2);
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2.
            searches.push(|live, twin, at| unsafe { next_line_avx2(live, twin, at) });
        }
    }
    searches
}

/// The search that is quickest here. Measured once, because CPU features do not tell: AVX2 takes
/// half the time of single words on hardware, and three times as long in an emulator.
fn quickest() -> Search {
    static QUICKEST: OnceLock<Search> = OnceLock::new();
    *QUICKEST.get_or_init(|| {
        let live = Box::new([const { AtomicU64::new(1) }; PAGE_WORDS]);
        let twin = Box::new([1; PAGE_WORDS]);
        let time = |search: &Search| {
            // The least of several runs is free of interruptions and of first touches.
            let run = |_| {
                let started = Instant::now();
                for _ in 0..4 {
                    std::hint::black_box(search(&live, std::hint::black_box(&twin), 0));
                }
                started.elapsed()
            };
            (0..16).map(run).min()
        };
        searches().into_iter().min_by_key(time).unwrap_or(next_line_words)
    })
}

fn next_line_words(live: &[AtomicU64; PAGE_WORDS], twin: &[u64; PAGE_WORDS], at: usize) -> usize {
    let differs = |line: &usize| {
        (*line..line + LINE).fold(0, |sum, word| sum | (live[word].load(Ordering::Relaxed) ^ twin[word])) != 0
    };
    (at..PAGE_WORDS).step_by(LINE).find(differs).unwrap_or(PAGE_WORDS)
}

/// # Safety
/// The CPU must have AVX2.
#[cfg(target_arch = "x86_64")]
unsafe fn next_line_avx2(live: &[AtomicU64; PAGE_WORDS], twin: &[u64; PAGE_WORDS], at: usize) -> usize {
    let mut at = at * 8;
    // SAFETY: the loop reads 64 bytes at byte offsets from `at` in steps of 64, stopping at
    // PAGE_WORDS * 8 = 4096, so all reads are inside the two pages; nothing is written. The
    // caller vouches for AVX2. Assembly may read memory that others change.
    unsafe {
        std::arch::asm!(
            "2:",
            "cmp rax, 4096",
            "jae 3f",
            "vmovdqu ymm0, ymmword ptr [{live} + rax]",
            "vmovdqu ymm1, ymmword ptr [{live} + rax + 32]",
            "vpxor ymm0, ymm0, ymmword ptr [{twin} + rax]",
            "vpxor ymm1, ymm1, ymmword ptr [{twin} + rax + 32]",
            "vpor ymm0, ymm0, ymm1",
            "vptest ymm0, ymm0",
            "jnz 3f",
            "add rax, 64",
            "jmp 2b",
            "3:",
            "vzeroupper",
            live = in(reg) live.as_ptr(),
            twin = in(reg) twin.as_ptr(),
            inout("rax") at,
            clobber_abi("sysv64"),
            options(nostack, readonly),
        );
    }
    at / 8
}

#[cfg(target_arch = "x86_64")]
fn next_line_sse2(live: &[AtomicU64; PAGE_WORDS], twin: &[u64; PAGE_WORDS], at: usize) -> usize {
    let mut at = at * 8;
    // SAFETY: as above, with 16-byte loads; SSE2 is part of x86-64. The twin need not be
    // 16-byte aligned, hence movdqu for it as well.
    unsafe {
        std::arch::asm!(
            "2:",
            "cmp {at}, 4096",
            "jae 3f",
            "movdqu {a}, xmmword ptr [{live} + {at}]",
            "movdqu {b}, xmmword ptr [{twin} + {at}]",
            "pcmpeqb {a}, {b}",
            "movdqu {c}, xmmword ptr [{live} + {at} + 16]",
            "movdqu {d}, xmmword ptr [{twin} + {at} + 16]",
            "pcmpeqb {c}, {d}",
            "pand {a}, {c}",
            "movdqu {b}, xmmword ptr [{live} + {at} + 32]",
            "movdqu {c}, xmmword ptr [{twin} + {at} + 32]",
            "pcmpeqb {b}, {c}",
            "pand {a}, {b}",
            "movdqu {c}, xmmword ptr [{live} + {at} + 48]",
            "movdqu {d}, xmmword ptr [{twin} + {at} + 48]",
            "pcmpeqb {c}, {d}",
            "pand {a}, {c}",
            "pmovmskb {mask:e}, {a}",
            "cmp {mask:e}, 0xffff",
            "jne 3f",
            "add {at}, 64",
            "jmp 2b",
            "3:",
            at = inout(reg) at,
            mask = out(reg) _,
            live = in(reg) live.as_ptr(),
            twin = in(reg) twin.as_ptr(),
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            c = out(xmm_reg) _,
            d = out(xmm_reg) _,
            options(nostack, readonly),
        );
    }
    at / 8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Box<[AtomicU64; PAGE_WORDS]> {
        Box::new(std::array::from_fn(|word| {
            AtomicU64::new((word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        }))
    }

    fn twin(page: &[AtomicU64; PAGE_WORDS]) -> Box<[u64; PAGE_WORDS]> {
        Box::new(std::array::from_fn(|word| page[word].load(Ordering::Relaxed)))
    }

    #[test]
    fn finds_every_changed_word_and_no_other() {
        let live = page();
        let twin = twin(&live);
        let mut out = Vec::new();
        differences(&live, &twin, &mut out);
        assert_eq!(out, []);
        let mut expected = Vec::new();
        for (word, flip) in [
            (0, 1u64),
            (7, 1 << 63),
            (8, 1 << 32),
            (300, !0),
            (301, 1 << 8),
            (511, 1),
        ] {
            live[word].fetch_xor(flip, Ordering::Relaxed);
            expected.push((word as u16, twin[word] ^ flip));
        }
        differences(&live, &twin, &mut out);
        assert_eq!(out, expected);
    }

    #[test]
    fn every_search_sees_every_single_bit_position() {
        let live = page();
        let twin = twin(&live);
        for search in searches() {
            assert_eq!(search(&live, &twin, 0), PAGE_WORDS);
            for word in 0..PAGE_WORDS {
                live[word].fetch_xor(1 << (word % 64), Ordering::Relaxed);
                let line = word / LINE * LINE;
                assert_eq!(search(&live, &twin, 0), line, "word {word}");
                assert_eq!(search(&live, &twin, line), line, "word {word}");
                assert_eq!(search(&live, &twin, line + LINE), PAGE_WORDS, "word {word}");
                live[word].fetch_xor(1 << (word % 64), Ordering::Relaxed);
            }
        }
    }
}
