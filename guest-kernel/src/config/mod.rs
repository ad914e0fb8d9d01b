//! Boot loader configurations: what they would boot by default. Pure text in, an [`Entry`] out; the
//! files are found and read elsewhere.

pub(crate) mod bls;
pub(crate) mod extlinux;
pub(crate) mod grub;
pub(crate) mod uki;

mod shell;

/// What a configuration boots: paths as it gives them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    /// What people see in the boot menu.
    pub title: String,
    /// Path of the kernel.
    pub kernel: String,
    /// Paths of initrds, in the order they are joined.
    pub initrds: Vec<String>,
    /// Kernel command line.
    pub cmdline: String,
    /// UUID of the file system that the paths belong to, if the configuration names one.
    pub fs_uuid: Option<String>,
}

/// GRUB's environment block (grubenv): lines `name=value`, padded with '#'.
pub(crate) fn grubenv(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.into(), value.into()))
        .collect()
}

/// Compares versions so that "6.10" comes after "6.9": runs of digits by value, the rest as text.
pub(crate) fn compare_versions(a: &str, b: &str) -> std::cmp::Ordering {
    fn parts(text: &str) -> impl Iterator<Item = (bool, &str)> {
        let mut rest = text;
        std::iter::from_fn(move || {
            let digits = rest.starts_with(|c: char| c.is_ascii_digit());
            let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
            let (part, tail) = rest.split_at(end);
            rest = tail;
            (!part.is_empty()).then_some((digits, part))
        })
    }
    let mut a = parts(a);
    let mut b = parts(b);
    loop {
        let order = match (a.next(), b.next()) {
            (None, None) => return std::cmp::Ordering::Equal,
            (Some((true, a)), Some((true, b))) => {
                let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
                a.len().cmp(&b.len()).then_with(|| a.cmp(b))
            }
            (a, b) => a.cmp(&b),
        };
        if order.is_ne() {
            return order;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cmp::Ordering::{Equal, Greater, Less};

    #[test]
    fn versions_compare_by_number() {
        for (a, b, order) in [
            ("6.9.1", "6.10.0", Less),
            ("6.1.0-9-amd64", "6.1.0-18-amd64", Less),
            ("6.1", "6.1", Equal),
            ("6.1.1", "6.1", Greater),
            ("vmlinuz-6.1", "vmlinuz-5.20", Greater),
            ("007", "7", Equal),
        ] {
            assert_eq!(compare_versions(a, b), order, "{a} {b}");
        }
    }

    #[test]
    fn grubenv_has_values_and_padding() {
        let text = "# GRUB Environment Block\nsaved_entry=a=b\nnext_entry=\n#######";
        assert_eq!(
            grubenv(text),
            [
                ("saved_entry".into(), "a=b".into()),
                ("next_entry".into(), String::new())
            ]
        );
    }
}
