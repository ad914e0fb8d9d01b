//! The cluster's shared secret and the keys made from it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Least number of bytes a secret file has to hold.
pub const MIN_SECRET: usize = 32;
/// Most bytes read of a secret file.
const MAX_SECRET: u64 = 64 << 10;

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file can't be read.
    #[error("secret file {}: {}", path.display(), super::errno::describe(source))]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Less than [`MIN_SECRET`] bytes.
    #[error("secret file {}: {length} bytes, at least {MIN_SECRET} are needed; make one with: head -c 32 /dev/urandom | base64", path.display())]
    TooShort {
        /// Which file.
        path: PathBuf,
        /// Bytes in it, white space at its end not counted.
        length: usize,
    },
    /// Others can read it.
    #[error("secret file {}: others may read it (mode {mode:03o}); run: chmod 600 {}", path.display(), path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The kernel gave no random bytes.
    #[error("/dev/urandom: {}", super::errno::describe(.0))]
    Random(io::Error),
}

/// A 256-bit key that proves membership of the cluster. Never shown, not even by `Debug`.
#[derive(Clone)]
pub struct Secret([u8; 32]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// The key of a secret file: its content without white space at the end, hashed.
    ///
    /// # Errors
    /// When the file can't be read, is too short, or other users may read it.
    pub fn from_file(path: &Path) -> Result<Self, SecretError> {
        let failed = |source| SecretError::Read {
            path: path.into(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(SecretError::Open {
                path: path.into(),
                mode,
            });
        }
        let mut content = Vec::new();
        file.take(MAX_SECRET).read_to_end(&mut content).map_err(failed)?;
        let content = content.trim_ascii_end();
        if content.len() < MIN_SECRET {
            return Err(SecretError::TooShort {
                path: path.into(),
                length: content.len(),
            });
        }
        Ok(Self(blake3::derive_key("krg-vmm 2026 cluster secret file", content)))
    }

    /// The secret file a user has without naming one: `~/.config/krg-vmm/secret`, if it exists.
    pub fn default_file() -> Option<PathBuf> {
        let home = std::env::var_os("HOME")?;
        let path = Path::new(&home).join(".config/krg-vmm/secret");
        fs::metadata(&path).is_ok().then_some(path)
    }

    /// A fresh random key, for nodes that this process starts itself.
    ///
    /// # Errors
    /// When the kernel gives no random bytes.
    pub fn random() -> Result<Self, SecretError> {
        Ok(Self(random_bytes().map_err(SecretError::Random)?))
    }

    /// The key from raw bytes that came over a pipe from the process that started this one.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The raw bytes, for the pipe to a process started by this one. They go nowhere else.
    pub(super) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key that the peers of one session prove to each other. It follows from the secret and
    /// the session's random id, so that it never crosses the network.
    pub fn peer_key(&self, session: &[u8; 32]) -> Secret {
        let mut material = [0; 64];
        material[..32].copy_from_slice(&self.0);
        material[32..].copy_from_slice(session);
        Self(blake3::derive_key("krg-vmm 2026 session peer key", &material))
    }

    /// Keyed hash of `message`. Comparing two of them takes constant time.
    pub(super) fn mac(&self, message: &[u8]) -> blake3::Hash {
        blake3::keyed_hash(&self.0, message)
    }
}

/// 32 bytes from the kernel's random number generator.
///
/// # Errors
/// When `/dev/urandom` can't be read.
pub fn random_bytes() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    fn file(content: &str, mode: u32) -> TempFile {
        let file = TempFile::new().unwrap();
        fs::write(file.as_path(), content).unwrap();
        fs::set_permissions(file.as_path(), fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn files_with_the_same_secret_agree() {
        let text = "0123456789abcdef0123456789abcdef";
        let a = Secret::from_file(file(text, 0o600).as_path()).unwrap();
        let b = Secret::from_file(file(&format!("{text}\n"), 0o400).as_path()).unwrap();
        assert_eq!(a.bytes(), b.bytes());
        assert_ne!(a.peer_key(&[1; 32]).bytes(), a.peer_key(&[2; 32]).bytes());
        assert_eq!(format!("{a:?}"), "Secret(..)");
    }

    #[test]
    fn bad_files_are_refused() {
        let text = "0123456789abcdef0123456789abcdef";
        assert!(matches!(
            Secret::from_file(file("short", 0o600).as_path()),
            Err(SecretError::TooShort { length: 5, .. })
        ));
        assert!(matches!(
            Secret::from_file(file(text, 0o644).as_path()),
            Err(SecretError::Open { mode: 0o644, .. })
        ));
        let missing = Secret::from_file(Path::new("/nonexistent/secret"))
            .unwrap_err()
            .to_string();
        assert!(missing.contains("ENOENT"), "{missing}");
    }

    #[test]
    fn random_secrets_differ() {
        assert_ne!(Secret::random().unwrap().bytes(), Secret::random().unwrap().bytes());
    }
}
