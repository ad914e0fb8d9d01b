//! All decisions with their inputs, a JSON object a line, as [`krg_scheduler::replay`] takes them.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use krg_scheduler::Record;

use crate::cluster::errno;
use crate::cluster::error::FrontError;

/// The file of `--sched-log`.
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Makes the file, or empties it.
    ///
    /// # Errors
    /// It can't be written.
    pub fn create(path: &Path) -> Result<Self, FrontError> {
        let file = File::create(path).map_err(|source| FrontError::File { path: path.into(), source })?;
        Ok(Log { path: path.into(), file })
    }

    /// Appends one decision.
    ///
    /// # Errors
    /// One line for people.
    pub fn write(&mut self, record: &Record) -> Result<(), String> {
        let failed = |reason: String| format!("--sched-log {}: {reason}", self.path.display());
        let mut line = serde_json::to_vec(record).map_err(|error| failed(error.to_string()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|error| failed(errno::describe(&error)))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
