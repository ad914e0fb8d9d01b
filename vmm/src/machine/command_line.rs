//! The kernel command line: the image's own, and what this machine needs on top.

/// What the machine knows that the command line has to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// TSC frequency in kHz as the guest's kernel shall take it.
    pub tsc_khz: u32,
    /// Hosts of the machine.
    pub hosts: usize,
    /// vCPUs of the machine.
    pub cpus: u32,
    /// vCPUs of node 0: numbers 0 up to this.
    pub first_host_cpus: u32,
}

/// A word and its reason are one line here; a word the user has set (by name) is left alone.
fn words(needs: &Needs) -> Vec<String> {
    let mut words = vec![
        // The only console there is.
        "console=ttyS0".to_owned(),
        // No CPUID leaf tells AMD kernels the frequency, and there is no PIT to measure against.
        format!("tsc_early_khz={}", needs.tsc_khz),
        // The TSCs of all vCPUs are set together; a watchdog would need another clock.
        "tsc=reliable".to_owned(),
        // What udelay() counts with; a CPU in a package of its own would measure it, tick by tick. For 250
        // ticks a second: a kernel with more of them waits longer than it means to, which is safe.
        format!("lpj={}", u64::from(needs.tsc_khz) * 4),
        // There is no timer interrupt on the IOAPIC to check.
        "no_timer_check".to_owned(),
    ];
    if needs.hosts > 1 {
        words.extend([
            // Ticks of all CPUs at one instant would ask for the same pages at one instant.
            "skew_tick=1".to_owned(),
            // The lock-up detectors touch shared state every few seconds and have no PMU to use.
            "nowatchdog".to_owned(),
            // A page that crosses hosts may hold a CPU up for longer than on one board.
            "rcupdate.rcu_cpu_stall_timeout=300".to_owned(),
            // Pages move to whoever uses them; unmapping some to see who that is moves page tables, too.
            "numa_balancing=disable".to_owned(),
            // Not more CPUs than there are: per-CPU memory would be laid out for them.
            format!("possible_cpus={}", needs.cpus),
        ]);
        if needs.first_host_cpus < needs.cpus {
            // A tick touches pages that the CPU which keeps the time has just written. CPUs of the other
            // hosts do without while they run one task, and leave timers, callbacks and kernel threads
            // to the host that has the devices. A two-host boot to /init took 3.4 times as long without.
            let others = format!("{}-{}", needs.first_host_cpus, needs.cpus - 1);
            words.push(format!("nohz_full={others}"));
            words.push(format!("rcu_nocbs={others}"));
        }
    }
    words
}

/// Completes `own`, the image's or the user's command line, with what this machine needs. Words that
/// are there already, with whatever value, are not added again.
pub fn complete(own: &str, needs: &Needs) -> String {
    let name = |word: &str| word.split_once('=').map_or(word, |(name, _)| name).to_owned();
    let present: Vec<String> = own.split_whitespace().map(name).collect();
    let missing = words(needs).into_iter().filter(|word| !present.contains(&name(word)));
    let all: Vec<String> = own.split_whitespace().map(str::to_owned).chain(missing).collect();
    all.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_added_and_what_is_there_stays() {
        let needs = Needs {
            tsc_khz: 2_000_000,
            hosts: 1,
            cpus: 2,
            first_host_cpus: 2,
        };
        let line = complete("root=/dev/vda1 ro console=tty0 tsc=unstable", &needs);
        assert_eq!(
            line,
            "root=/dev/vda1 ro console=tty0 tsc=unstable tsc_early_khz=2000000 lpj=8000000 no_timer_check"
        );
        assert!(complete("", &needs).starts_with("console=ttyS0 "));
    }

    #[test]
    fn several_hosts_want_more() {
        let line = complete(
            "quiet",
            &Needs {
                tsc_khz: 1,
                hosts: 2,
                cpus: 4,
                first_host_cpus: 2,
            },
        );
        assert!(
            line.contains("skew_tick=1") && line.contains("possible_cpus=4") && line.contains("nohz_full=2-3"),
            "{line}"
        );
    }
}
