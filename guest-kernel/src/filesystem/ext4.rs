//! ext2, ext3 and ext4, by the crate `ext4-view`, which follows the journal.

use super::{FileSystem, ReadError, Window};

pub(super) struct Ext4(ext4_view::Ext4);

impl Ext4 {
    pub(super) fn mount(window: Window) -> Result<Ext4, ReadError> {
        Ok(Ext4(ext4_view::Ext4::load(Box::new(window)).map_err(convert)?))
    }
}

fn convert(error: ext4_view::Ext4Error) -> ReadError {
    match error {
        ext4_view::Ext4Error::NotFound => ReadError::NotFound,
        other => ReadError::Other(other.to_string()),
    }
}

impl FileSystem for Ext4 {
    fn read(&self, path: &str, limit: u64) -> Result<Vec<u8>, ReadError> {
        let mut file = self.0.open(path).map_err(convert)?;
        let len = file.metadata().len();
        if len > limit {
            return Err(ReadError::Other(format!("is larger than {} MiB", limit >> 20)));
        }
        // The length is the inode's claim: memory grows only as data arrives.
        let mut data = Vec::new();
        let mut part = vec![0; 1 << 20];
        loop {
            let have = file.read_bytes(&mut part).map_err(convert)?;
            if have == 0 {
                return Ok(data);
            }
            data.extend_from_slice(&part[..have]);
            if data.len() as u64 > limit {
                return Err(ReadError::Other("is longer than its inode says".into()));
            }
        }
    }

    fn list(&self, path: &str) -> Vec<String> {
        let Ok(entries) = self.0.read_dir(path) else {
            return Vec::new();
        };
        let mut names = Vec::new();
        for entry in entries {
            // After damage the rest of the directory is unknown.
            let Ok(entry) = entry else { break };
            if let Ok(name) = entry.file_name().as_str() {
                if name != "." && name != ".." {
                    names.push(name.to_owned());
                }
            }
        }
        names.sort();
        names
    }

    fn exists(&self, path: &str) -> bool {
        self.0.exists(path).unwrap_or(false)
    }

    fn uuid(&self) -> String {
        self.0.uuid().to_string()
    }
}
