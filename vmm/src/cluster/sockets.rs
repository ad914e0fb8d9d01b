//! Where control sockets are when nobody says: one file a machine, `NAME.sock`, in a folder of the user's own.
//! A second machine of the same name on the host is `NAME-2.sock`.

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::errno;

/// Machines of one name on a host that find a place.
const MOST: usize = 64;
/// A name that is longer is cut, since the path of a socket has 107 bytes.
const LONGEST: usize = 48;

/// The folder: `$KRG_RUNTIME_DIR`, for root `/run/krg-vmm`, for others `$XDG_RUNTIME_DIR/krg-vmm`; `None` for users
/// who have none of these.
pub fn directory() -> Option<PathBuf> {
    directory_of(|name| env::var_os(name), rustix::process::geteuid().is_root())
}

fn directory_of(variable: impl Fn(&str) -> Option<OsString>, root: bool) -> Option<PathBuf> {
    let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("KRG_RUNTIME_DIR")
        .or_else(|| root.then(|| "/run/krg-vmm".into()))
        .or_else(|| absolute("XDG_RUNTIME_DIR").map(|path| path.join("krg-vmm")))
}

/// The path in `directory` for a machine's name, and for the second and further of that name.
pub fn path(directory: &Path, name: &str, number: usize) -> PathBuf {
    let name: String = name
        .chars()
        .take(LONGEST)
        .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' })
        .collect();
    let name = name.trim_start_matches('.');
    let name = if name.is_empty() { "krg" } else { name };
    directory.join(if number > 1 { format!("{name}-{number}.sock") } else { format!("{name}.sock") })
}

/// A place that is this machine's as long as it listens there.
pub struct Place {
    /// Where to listen.
    pub path: PathBuf,
    // Others look for a place when this is dropped.
    _turn: File,
}

/// Finds a place for a machine's socket and keeps others from taking it until the `Place` is dropped; by then the
/// machine should listen.
///
/// # Errors
/// One line for people.
pub fn claim(directory: &Path, name: &str) -> Result<Place, String> {
    let failed = |error: io::Error| format!("{}: {}", directory.display(), errno::describe(&error));
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
    let turn = File::create(directory.join("lock")).map_err(failed)?;
    flock(&turn, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
    let free = |path: &PathBuf| match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type().is_socket() && UnixStream::connect(path).is_err(),
        Err(_) => true,
    };
    let path = (1..=MOST).map(|number| path(directory, name, number)).find(free);
    let path = path.ok_or_else(|| format!("{}: EADDRINUSE ({MOST} machines of one name)", directory.display()))?;
    Ok(Place { path, _turn: turn })
}

/// The machines that listen in `directory`: their names there and their sockets.
///
/// # Errors
/// When the folder can't be read; one that is not there has no machines.
pub fn running(directory: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().to_str()?.strip_suffix(".sock")?.to_owned();
            UnixStream::connect(entry.path()).ok().map(|_| (name, entry.path()))
        })
        .collect();
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn folders() {
        let of = |set: &'static [(&str, &str)], root| {
            directory_of(|name| set.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).into()), root)
        };
        assert_eq!(of(&[], true), Some("/run/krg-vmm".into()));
        assert_eq!(of(&[], false), None);
        assert_eq!(of(&[("XDG_RUNTIME_DIR", "/run/user/7")], false), Some("/run/user/7/krg-vmm".into()));
        assert_eq!(of(&[("XDG_RUNTIME_DIR", "relative")], false), None);
        assert_eq!(of(&[("KRG_RUNTIME_DIR", "/x"), ("XDG_RUNTIME_DIR", "/y")], true), Some("/x".into()));
    }

    #[test]
    fn names_stay_in_the_folder() {
        let of = |name: &str| path(Path::new("/d"), name, 1);
        assert_eq!(of("web 1"), Path::new("/d/web-1.sock"));
        assert_eq!(of("../../etc/x"), Path::new("/d/-..-etc-x.sock"));
        assert_eq!([of(""), of("..")], [Path::new("/d/krg.sock"); 2]);
        assert_eq!(of(&"n".repeat(500)).as_os_str().len(), "/d/.sock".len() + LONGEST);
        assert_eq!(path(Path::new("/d"), "a", 3), Path::new("/d/a-3.sock"));
    }

    #[test]
    fn machines_of_one_name_do_not_collide_and_dead_ones_leave_their_place() {
        let dir = TempDir::new_with_prefix("/tmp/krg-sockets").unwrap();
        let dir = dir.as_path().join("made");
        assert_eq!(running(&dir).unwrap(), []);
        let listen = || UnixListener::bind(claim(&dir, "m").unwrap().path).unwrap();
        let (first, second) = (listen(), listen());
        let names = || running(&dir).unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(), ["m", "m-2"]);
        drop(first);
        assert_eq!(names(), ["m-2"]);
        assert_eq!(claim(&dir, "m").unwrap().path, dir.join("m.sock"));
        // What is no socket is nobody's place.
        fs::write(dir.join("k.sock"), "").unwrap();
        assert_eq!(claim(&dir, "k").unwrap().path, dir.join("k-2.sock"));
        drop(second);
    }
}
