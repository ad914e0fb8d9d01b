//! FAT12, FAT16 and FAT32, by the crate `fatfs`: EFI system partitions.

use std::io::{self, Read};

use super::{FileSystem, ReadError, Window};

pub(super) struct Fat(fatfs::FileSystem<Window>);

/// Entries of a directory that are looked at.
const MAX_ENTRIES: usize = 65536;

impl Fat {
    pub(super) fn mount(window: Window) -> Result<Fat, ReadError> {
        check_geometry(&window).map_err(ReadError::Other)?;
        let options = fatfs::FsOptions::new().update_accessed_date(false);
        Ok(Fat(fatfs::FileSystem::new(window, options).map_err(convert)?))
    }
}

/// Refuses boot sectors whose numbers do not fit together: the crate computes with them unchecked.
fn check_geometry(window: &Window) -> Result<(), String> {
    let mut boot = [0; 512];
    window.read_at(&mut boot, 0).map_err(|error| error.to_string())?;
    let word = |at: usize| u64::from(u16::from_le_bytes([boot[at], boot[at + 1]]));
    let long = |at: usize| u64::from(u32::from_le_bytes([boot[at], boot[at + 1], boot[at + 2], boot[at + 3]]));
    let (bytes_per_sector, sectors_per_cluster) = (word(11), u64::from(boot[13]));
    let (reserved, fats, root_entries) = (word(14), u64::from(boot[16]), word(17));
    let sectors = if word(19) != 0 { word(19) } else { long(32) };
    let fat_sectors = if word(22) != 0 { word(22) } else { long(36) };
    if !matches!(bytes_per_sector, 512 | 1024 | 2048 | 4096) || !sectors_per_cluster.is_power_of_two() {
        return Err("FAT boot sector with impossible sector or cluster size".into());
    }
    if bytes_per_sector * sectors_per_cluster > 256 << 10 {
        return Err("FAT boot sector with impossible cluster size".into());
    }
    let before_data = reserved + fats * fat_sectors + (root_entries * 32).div_ceil(bytes_per_sector);
    if reserved == 0 || fats == 0 || fat_sectors == 0 || before_data >= sectors {
        return Err("FAT boot sector whose tables are larger than the disk".into());
    }
    let clusters = (sectors - before_data) / sectors_per_cluster;
    let bits = match clusters {
        0..4085 => 12,
        4085..65525 => 16,
        _ => 32,
    };
    if clusters == 0 || (clusters + 2) * bits > fat_sectors * bytes_per_sector * 8 {
        return Err("FAT boot sector whose table is too small for its clusters".into());
    }
    Ok(())
}

fn convert(error: io::Error) -> ReadError {
    match error.kind() {
        io::ErrorKind::NotFound => ReadError::NotFound,
        _ => ReadError::Other(error.to_string()),
    }
}

impl FileSystem for Fat {
    fn read(&self, path: &str, limit: u64) -> Result<Vec<u8>, ReadError> {
        let file = self.0.root_dir().open_file(path.trim_matches('/')).map_err(convert)?;
        let mut data = Vec::new();
        file.take(limit + 1).read_to_end(&mut data).map_err(convert)?;
        if data.len() as u64 > limit {
            return Err(ReadError::Other(format!("is larger than {} MiB", limit >> 20)));
        }
        Ok(data)
    }

    fn list(&self, path: &str) -> Vec<String> {
        let path = path.trim_matches('/');
        let root = self.0.root_dir();
        let directory = if path.is_empty() {
            root
        } else {
            match root.open_dir(path) {
                Ok(directory) => directory,
                Err(_) => return Vec::new(),
            }
        };
        let entries = directory.iter().take(MAX_ENTRIES);
        let mut names: Vec<String> = entries.map_while(Result::ok).map(|entry| entry.file_name()).collect();
        names.retain(|name| name != "." && name != "..");
        names.sort();
        names
    }

    fn exists(&self, path: &str) -> bool {
        let path = path.trim_matches('/');
        let root = self.0.root_dir();
        path.is_empty() || root.open_file(path).is_ok() || root.open_dir(path).is_ok()
    }

    fn uuid(&self) -> String {
        let id = self.0.volume_id();
        format!("{:04X}-{:04X}", id >> 16, id & 0xffff)
    }
}
