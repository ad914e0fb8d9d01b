//! Boot Loader Specification entries (UAPI.1): loader/entries/*.conf, as systemd-boot and Fedora's
//! GRUB use them.

use super::{Entry, compare_versions};

/// One entry file.
#[derive(Clone, Debug, Default)]
struct Candidate {
    /// File name without ".conf".
    name: String,
    version: String,
    sort_key: String,
    entry: Entry,
}

/// The entry to boot out of `(file name, text)` pairs: the one that `saved` or a pattern in
/// loader.conf names; else by the specification's order: sort key, then the newest version.
pub(crate) fn default_entry(
    files: &[(String, String)],
    loader_conf: Option<&str>,
    grubenv: &[(String, String)],
) -> Option<Entry> {
    let mut all: Vec<Candidate> = files
        .iter()
        .filter_map(|(name, text)| parse(name, text, grubenv))
        .collect();
    all.sort_by(|a, b| {
        // Entries with a sort key come first, by key ascending, then by version descending.
        (a.sort_key.is_empty(), &a.sort_key)
            .cmp(&(b.sort_key.is_empty(), &b.sort_key))
            .then_with(|| compare_versions(&b.version, &a.version))
            .then_with(|| compare_versions(&b.name, &a.name))
    });
    let saved = grubenv
        .iter()
        .find(|(name, _)| name == "saved_entry")
        .map(|(_, value)| value.as_str());
    let pattern = loader_conf.and_then(|text| {
        let fields = text
            .lines()
            .filter_map(|line| line.trim().split_once(char::is_whitespace));
        fields
            .filter(|(key, _)| *key == "default")
            .map(|(_, value)| value.trim())
            .next_back()
    });
    let by_name = |pattern: &str| {
        let pattern = pattern.strip_suffix(".conf").unwrap_or(pattern);
        all.iter().find(|candidate| matches(pattern, &candidate.name))
    };
    let chosen = saved
        .and_then(by_name)
        .or_else(|| pattern.and_then(by_name))
        .or_else(|| all.first());
    chosen.map(|candidate| candidate.entry.clone())
}

/// Shell patterns with '*' only.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let mut ends_free = false;
    let mut last = None;
    for part in parts {
        if let Some(middle) = last.replace(part) {
            let middle: &str = middle;
            let Some(at) = rest.find(middle) else { return false };
            rest = &rest[at + middle.len()..];
        }
        ends_free = true;
    }
    match last {
        Some(end) => rest.ends_with(end),
        None => !ends_free && rest.is_empty(),
    }
}

fn parse(name: &str, text: &str, grubenv: &[(String, String)]) -> Option<Candidate> {
    let name = name.strip_suffix(".conf")?;
    let mut candidate = Candidate {
        name: name.to_owned(),
        ..Candidate::default()
    };
    let mut options = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let Some((key, value)) = line.split_once(char::is_whitespace) else {
            continue;
        };
        let value = value.trim();
        match key {
            "title" => candidate.entry.title = value.to_owned(),
            "version" => candidate.version = value.to_owned(),
            "sort-key" => candidate.sort_key = value.to_owned(),
            "linux" => candidate.entry.kernel = value.to_owned(),
            // A unified kernel image; the caller looks into it.
            "efi" | "uki" if candidate.entry.kernel.is_empty() => candidate.entry.kernel = value.to_owned(),
            // Fedora's GRUB allows several paths in one line.
            "initrd" => candidate
                .entry
                .initrds
                .extend(value.split_whitespace().map(str::to_owned)),
            "options" => options.push(value),
            "architecture" if !matches!(value, "x64" | "X64") => return None,
            _ => {}
        }
    }
    candidate.entry.cmdline = expand(&options.join(" "), grubenv);
    candidate.entry.initrds = candidate
        .entry
        .initrds
        .iter()
        .map(|path| expand(path, grubenv))
        .collect();
    candidate.entry.initrds.retain(|path| !path.is_empty());
    (!candidate.entry.kernel.is_empty()).then_some(candidate)
}

/// Replaces words `$name` by GRUB's environment, as Fedora's entries use it ($kernelopts, $tuned_params).
fn expand(text: &str, grubenv: &[(String, String)]) -> String {
    let words = text.split_whitespace().map(|word| match word.strip_prefix('$') {
        Some(name) => grubenv
            .iter()
            .find(|(key, _)| key == name)
            .map_or("", |(_, value)| value),
        None => word,
    });
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Vec<(String, String)> {
        let file = |name: &str, text: &str| (name.to_owned(), text.to_owned());
        vec![
            file(
                "id-6.9.0.conf",
                "title Old\nversion 6.9.0\nlinux /vmlinuz-6.9.0\noptions root=a\n",
            ),
            file(
                "id-6.10.0.conf",
                "# comment\ntitle New\nversion 6.10.0\nlinux /vmlinuz-6.10.0\ninitrd /a.img $tuned\ninitrd /b.img\noptions $kernelopts ro\noptions quiet\n",
            ),
            file("arm.conf", "version 9\nlinux /arm\narchitecture aa64\n"),
            file("readme.txt", "linux /no\n"),
            file("none.conf", "title Nothing\n"),
        ]
    }

    #[test]
    fn the_newest_version_is_first() {
        let env = [("kernelopts".to_owned(), "root=UUID=1".to_owned())];
        let entry = default_entry(&files(), None, &env).unwrap();
        let expected = Entry {
            title: "New".into(),
            kernel: "/vmlinuz-6.10.0".into(),
            initrds: vec!["/a.img".into(), "/b.img".into()],
            cmdline: "root=UUID=1 ro quiet".into(),
            fs_uuid: None,
        };
        assert_eq!(entry, expected);
        assert_eq!(default_entry(&[], None, &env), None);
    }

    #[test]
    fn saved_entries_and_patterns_choose() {
        let saved = [("saved_entry".to_owned(), "id-6.9.0".to_owned())];
        assert_eq!(default_entry(&files(), None, &saved).unwrap().title, "Old");
        for pattern in ["id-6.9.0.conf", "id-6.9*", "*6.9.0.conf", "i*9*0"] {
            let conf = format!("timeout 3\ndefault {pattern}\n");
            assert_eq!(
                default_entry(&files(), Some(&conf), &[]).unwrap().title,
                "Old",
                "{pattern}"
            );
        }
        for pattern in ["@saved", "id-6.9", "*7*"] {
            let conf = format!("default {pattern}");
            assert_eq!(
                default_entry(&files(), Some(&conf), &[]).unwrap().title,
                "New",
                "{pattern}"
            );
        }
    }

    #[test]
    fn a_sort_key_comes_before_none() {
        let mut files = files();
        files[0].1.push_str("sort-key debian\n");
        assert_eq!(default_entry(&files, None, &[]).unwrap().title, "Old");
    }
}
