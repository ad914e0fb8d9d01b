//! extlinux.conf and syslinux.cfg: the label that is booted by default.

use super::Entry;

/// The entry of the `DEFAULT` label, or the first label with a kernel. Paths that do not start with
/// '/' are relative to `directory`, where the file is.
pub(crate) fn default_entry(text: &str, directory: &str) -> Option<Entry> {
    let mut default = None;
    let mut labels: Vec<(String, Entry)> = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let (key, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let value = value.trim();
        let entry = labels.last_mut().map(|(_, entry)| entry);
        match (key.to_ascii_lowercase().as_str(), entry) {
            ("default" | "ontimeout", None) => default = default.or(Some(value.to_owned())),
            ("label", _) => {
                labels.push((
                    value.to_owned(),
                    Entry {
                        title: value.to_owned(),
                        ..Entry::default()
                    },
                ));
            }
            ("kernel" | "linux", Some(entry)) => entry.kernel = absolute(value, directory),
            ("append", Some(entry)) => {
                // An initrd may also be given as if it were a parameter.
                for word in value.split_whitespace() {
                    match word.strip_prefix("initrd=") {
                        Some(paths) => entry.initrds = initrds(paths, directory),
                        None if entry.cmdline.is_empty() => entry.cmdline = word.to_owned(),
                        None => entry.cmdline = format!("{} {word}", entry.cmdline),
                    }
                }
            }
            ("initrd", Some(entry)) => entry.initrds = initrds(value, directory),
            ("menu", Some(entry)) => {
                if let Some((word, title)) = value.split_once(char::is_whitespace) {
                    if word.eq_ignore_ascii_case("label") {
                        entry.title = title.trim().replace('^', "");
                    }
                }
            }
            _ => {}
        }
    }
    // Modules of syslinux itself (menus, chain loaders) are no kernels.
    labels.retain(|(_, entry)| !entry.kernel.is_empty() && !entry.kernel.ends_with(".c32"));
    let chosen = labels
        .iter()
        .position(|(label, _)| Some(label) == default.as_ref())
        .unwrap_or(0);
    (chosen < labels.len()).then(|| labels.swap_remove(chosen).1)
}

fn initrds(paths: &str, directory: &str) -> Vec<String> {
    paths
        .split(',')
        .filter(|path| !path.is_empty())
        .map(|path| absolute(path, directory))
        .collect()
}

fn absolute(path: &str, directory: &str) -> String {
    if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("{}/{path}", directory.trim_end_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_label_is_taken() {
        let text = "DEFAULT linux\nTIMEOUT 3\nLABEL menu\n KERNEL menu.c32\nLABEL old\n LINUX /vmlinuz-old\nLABEL linux\n MENU LABEL Alpine ^Linux\n LINUX vmlinuz-lts\n INITRD initramfs-lts,extra\n APPEND root=UUID=7 modules=ext4 quiet\n";
        let entry = default_entry(text, "/boot/extlinux/").unwrap();
        let expected = Entry {
            title: "Alpine Linux".into(),
            kernel: "/boot/extlinux/vmlinuz-lts".into(),
            initrds: vec!["/boot/extlinux/initramfs-lts".into(), "/boot/extlinux/extra".into()],
            cmdline: "root=UUID=7 modules=ext4 quiet".into(),
            fs_uuid: None,
        };
        assert_eq!(entry, expected);
    }

    #[test]
    fn without_default_the_first_kernel_is_taken_and_initrd_may_be_a_parameter() {
        let text = "label a\nkernel menu.c32\nlabel b\nkernel /b\nappend initrd=/i1,/i2 ro  quiet\n";
        let entry = default_entry(text, "/").unwrap();
        assert_eq!((entry.kernel.as_str(), entry.cmdline.as_str()), ("/b", "ro quiet"));
        assert_eq!(entry.initrds, ["/i1", "/i2"]);
        assert_eq!(default_entry("label a\nkernel menu.c32\n", "/"), None);
        assert_eq!(default_entry("", "/"), None);
    }
}
