//! What people and programs are told on standard error, one line each. The guest's console has
//! standard output for itself.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::console;

/// Writes lines for people, or (`--json`) one JSON object a line with an `event` member.
#[derive(Clone, Copy, Debug)]
pub struct Reporter {
    json: bool,
}

impl Reporter {
    /// Lines for people, or JSON.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Something worth knowing; without a line it is for programs only.
    pub fn event(&self, line: &str, json: &Value) {
        if line.is_empty() && !self.json {
            return;
        }
        self.write(&if self.json {
            json.to_string()
        } else {
            format!("krg-vmm: {}", one_line(line))
        });
    }

    /// Why the program ends without the guest having powered off, and with which exit status.
    pub fn error(&self, line: &str, status: u8) {
        let line = one_line(line);
        let event = json!({"event": "error", "message": line, "status": status});
        self.write(&if self.json {
            event.to_string()
        } else {
            format!("krg-vmm: {line}")
        });
    }

    fn write(&self, line: &str) {
        // Nobody is left to tell when standard error is gone.
        let _ = write!(io::stderr().lock(), "{line}{}", console::line_end());
    }
}

/// Text from a node or a guest on our terminal: no line breaks, no control sequences.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_stays_one_line() {
        assert_eq!(one_line("a\nb\x1b[2Jc"), "a b [2Jc");
    }
}
