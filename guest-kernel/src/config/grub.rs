//! grub.cfg: the entry that GRUB would boot by default.
//!
//! The script is run as far as entries depend on it: variables, `if` with `[ ... ]`, `load_env`,
//! `search --fs-uuid`. Functions and loops are not; distributions do not choose a kernel by them.

use super::Entry;
use super::shell::{self, Part, Statement, Word};

/// A menu entry before its body is run.
struct MenuEntry {
    title: String,
    id: Option<String>,
    body: Body,
}

enum Body {
    Entry(Vec<Statement>),
    Submenu(Vec<MenuEntry>),
}

/// Variables in the order they were set first.
#[derive(Clone, Default)]
struct Environment(Vec<(String, String)>);

impl Environment {
    fn get(&self, name: &str) -> &str {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map_or("", |(_, value)| value)
    }

    fn set(&mut self, name: &str, value: String) {
        match self.0.iter_mut().find(|(key, _)| key == name) {
            Some(entry) => entry.1 = value,
            None => self.0.push((name.into(), value)),
        }
    }

    fn expand(&self, word: &Word) -> String {
        word.parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => text,
                Part::Variable(name) => self.get(name),
            })
            .collect()
    }

    /// The words of a command. As in a shell, an unquoted variable may stand for several or for none.
    fn words(&self, words: &[Word]) -> Vec<String> {
        let mut all = Vec::new();
        for word in words {
            let text = self.expand(word);
            if !word.quoted && word.parts.iter().any(|part| matches!(part, Part::Variable(_))) {
                all.extend(text.split_whitespace().map(str::to_owned));
            } else {
                all.push(text);
            }
        }
        all
    }

    /// Conditions that are known to hold; whatever is not understood does not.
    fn holds(&self, condition: &[Word]) -> bool {
        let words: Vec<String> = condition.iter().map(|word| self.expand(word)).collect();
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        match (words.first(), words.last()) {
            (Some(&"["), Some(&"]")) => words = words[1..words.len() - 1].to_vec(),
            (Some(&"test"), _) => words = words[1..].to_vec(),
            (Some(&"true"), _) => return true,
            _ => return false,
        }
        let negate = words.first() == Some(&"!");
        if negate {
            words.remove(0);
        }
        let holds = match words.as_slice() {
            [word] | ["-n", word] => !word.is_empty(),
            ["-z", word] => word.is_empty(),
            [a, "=" | "==", b] => a == b,
            [a, "!=", b] => a != b,
            // The files GRUB asks for are its environment block, which is given to us, and fonts.
            ["-s" | "-f" | "-e", path] => path.ends_with("/grubenv"),
            _ => false,
        };
        holds != negate
    }
}

/// Most statements that are run, and most menu entries kept.
const MAX_STEPS: usize = 100_000;

struct Run<'a> {
    env: Environment,
    /// What `load_env` loads.
    grubenv: &'a [(String, String)],
    steps: usize,
}

impl Run<'_> {
    /// Runs statements outside of entries; the entries it meets are returned.
    fn menu(&mut self, statements: &[Statement]) -> Vec<MenuEntry> {
        let mut entries = Vec::new();
        for statement in statements {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                break;
            }
            match statement {
                Statement::Command(words) => self.command(words),
                Statement::If(branches) => {
                    if let Some(body) = self.branch(branches) {
                        entries.extend(self.menu(body));
                    }
                }
                Statement::Block(head, body) => {
                    let head = self.env.words(head);
                    let mut head = head.iter().map(String::as_str);
                    let body = match head.next() {
                        Some("menuentry") => Body::Entry(body.clone()),
                        Some("submenu") => Body::Submenu(self.menu(body)),
                        _ => continue,
                    };
                    let (mut title, mut id) = (None, None);
                    while let Some(word) = head.next() {
                        match word {
                            "--id" | "$menuentry_id_option" => id = head.next().map(str::to_owned),
                            "--class" | "--users" | "--hotkey" => _ = head.next(),
                            _ if word.starts_with("--") => {}
                            // What follows the title is handed to the entry as $1, $2...
                            _ => title = title.or(Some(word.to_owned())),
                        }
                    }
                    entries.push(MenuEntry {
                        title: title.unwrap_or_default(),
                        id,
                        body,
                    });
                }
            }
        }
        entries
    }

    fn branch<'s>(&self, branches: &'s [(Vec<Word>, Vec<Statement>)]) -> Option<&'s [Statement]> {
        let found = branches
            .iter()
            .find(|(condition, _)| condition.is_empty() || self.env.holds(condition));
        found.map(|(_, body)| body.as_slice())
    }

    fn command(&mut self, words: &[Word]) {
        let words = self.env.words(words);
        let Some((command, arguments)) = words.split_first() else {
            return;
        };
        match command.as_str() {
            "load_env" => {
                for (name, value) in self.grubenv {
                    self.env.set(name, value.clone());
                }
            }
            "set" => {
                if let Some((name, value)) = arguments.first().and_then(|word| word.split_once('=')) {
                    self.env.set(name, value.to_owned());
                }
            }
            "unset" => {
                if let Some(name) = arguments.first() {
                    self.env.set(name, String::new());
                }
            }
            "search" | "search.fs_uuid" => self.search(command, arguments),
            _ => {
                if let Some((name, value)) = command.split_once('=') {
                    self.env.set(name, value.to_owned());
                }
            }
        }
    }

    /// `search --fs-uuid --set=root UUID`: the volume that later paths belong to.
    fn search(&mut self, command: &str, arguments: &[String]) {
        let by_uuid = command == "search.fs_uuid" || arguments.iter().any(|word| word == "--fs-uuid" || word == "-u");
        let uuid = arguments
            .iter()
            .rev()
            .find(|word| !word.starts_with('-') && *word != "root");
        if let (true, Some(uuid)) = (by_uuid, uuid) {
            self.env.set("root", format!("UUID={uuid}"));
        }
    }

    /// Runs the body of an entry: what it would boot, if it boots Linux at all.
    fn entry(&mut self, title: &str, statements: &[Statement], found: &mut Option<Entry>) {
        for statement in statements {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return;
            }
            match statement {
                Statement::If(branches) => {
                    if let Some(body) = self.branch(branches) {
                        self.entry(title, body, found);
                    }
                }
                Statement::Block(..) => {}
                Statement::Command(command) => {
                    let words = self.env.words(command);
                    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
                        ["linux" | "linux16" | "linuxefi", kernel, arguments @ ..] => {
                            let (uuid, kernel) = self.locate(kernel);
                            *found = Some(Entry {
                                title: title.to_owned(),
                                kernel,
                                initrds: Vec::new(),
                                cmdline: arguments.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "),
                                fs_uuid: uuid,
                            });
                        }
                        ["initrd" | "initrd16" | "initrdefi", initrds @ ..] => {
                            if let Some(entry) = found {
                                entry.initrds = initrds.iter().map(|path| self.locate(path).1).collect();
                            }
                        }
                        _ => self.command(command),
                    }
                }
            }
        }
    }

    /// Splits "(device)/path": only the path counts, as devices have other names here; `$root` set by
    /// `search` tells the volume.
    fn locate(&self, path: &str) -> (Option<String>, String) {
        let uuid = self.env.get("root").strip_prefix("UUID=").map(str::to_owned);
        match path.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((device, path)) => (
                device.strip_prefix("UUID=").map(str::to_owned).or(uuid),
                path.to_owned(),
            ),
            None => (uuid, path.to_owned()),
        }
    }
}

/// A word with spaces goes to the kernel in double quotes.
fn quote(word: &str) -> String {
    if word.contains(char::is_whitespace) {
        format!("\"{word}\"")
    } else {
        word.to_owned()
    }
}

/// Finds an entry the way GRUB reads `default`: by number, title or id, levels separated by '>'.
fn choose<'m>(menu: &'m [MenuEntry], default: &str) -> Option<&'m MenuEntry> {
    let exact = |name: &str| {
        menu.iter()
            .find(|entry| entry.title == name || entry.id.as_deref() == Some(name))
    };
    if let Some(entry) = exact(default) {
        return Some(entry);
    }
    let (first, rest) = match default.split_once('>') {
        Some((first, rest)) => (first, Some(rest)),
        None => (default, None),
    };
    let entry = exact(first).or_else(|| menu.get(first.parse::<usize>().ok()?))?;
    match (&entry.body, rest) {
        (Body::Submenu(inner), Some(rest)) => choose(inner, rest),
        _ => Some(entry),
    }
}

/// The default entry of a grub.cfg, or the first one after it that boots Linux; `None` if none does.
/// `grubenv` is the environment block, which holds the choice that was saved.
pub(crate) fn default_entry(text: &str, grubenv: &[(String, String)]) -> Option<Entry> {
    let mut run = Run {
        env: Environment::default(),
        grubenv,
        steps: 0,
    };
    run.env.set("prefix", "/boot/grub".into());
    run.env.set("grub_platform", "efi".into());
    run.env.set("grub_cpu", "x86_64".into());
    // Tells grub.cfg that this GRUB knows --id.
    run.env.set("feature_menuentry_id", "y".into());
    let menu = run.menu(&shell::parse(text));
    let default = run.env.get("default").to_owned();
    let default = if default == "saved" {
        run.env.get("saved_entry").to_owned()
    } else {
        default
    };
    let chosen = choose(&menu, &default);
    chosen
        .and_then(|entry| run.boot(entry))
        .or_else(|| menu.iter().find_map(|entry| run.boot(entry)))
}

impl Run<'_> {
    /// Runs an entry, or of a submenu its first one that boots Linux.
    fn boot(&mut self, entry: &MenuEntry) -> Option<Entry> {
        match &entry.body {
            Body::Submenu(inner) => inner.iter().find_map(|entry| self.boot(entry)),
            Body::Entry(body) => {
                // What one entry sets is not seen by the next that is tried.
                let before = self.env.clone();
                let mut found = None;
                self.entry(&entry.title, body, &mut found);
                self.env = before;
                found.filter(|entry| !entry.kernel.is_empty())
            }
        }
    }
}

#[cfg(test)]
mod tests;
