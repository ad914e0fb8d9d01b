//! A range of the image, as the file system crates want it, with a limit on the work that a forged
//! file system can cause.

use std::cell::RefCell;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::rc::Rc;

/// Read and seek in one trait object.
pub(crate) trait ReadSeek: Read + Seek {}

impl<T: Read + Seek> ReadSeek for T {}

/// Bytes per block of the buffer.
const BLOCK: u64 = 16 << 10;

/// All that is read of one image in bytes, and in requests. A kernel and an initrd need a small part
/// of it; a file system whose tables form a circle would be read for ever.
const MAX_BYTES: u64 = 4 << 30;
const MAX_REQUESTS: u64 = 16 << 20;

/// The image that all windows read from.
pub(crate) struct Source {
    disk: Box<dyn ReadSeek>,
    size: u64,
    bytes_left: u64,
    requests_left: u64,
    /// The block read last, and where it starts: file systems read their tables word by word.
    buffer: Vec<u8>,
    buffered_at: u64,
}

impl Source {
    /// Wraps an image.
    pub(crate) fn new(mut disk: Box<dyn ReadSeek>) -> io::Result<Source> {
        let size = disk.seek(SeekFrom::End(0))?;
        Ok(Source {
            disk,
            size,
            bytes_left: MAX_BYTES,
            requests_left: MAX_REQUESTS,
            buffer: Vec::new(),
            buffered_at: 0,
        })
    }

    /// The image's size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `to` from byte `at` of the image.
    pub(crate) fn read_at(&mut self, to: &mut [u8], at: u64) -> io::Result<()> {
        if at.checked_add(to.len() as u64).is_none_or(|end| end > self.size) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "reaches beyond the end of the disk",
            ));
        }
        self.requests_left = self.requests_left.checked_sub(1).ok_or_else(too_much)?;
        if to.len() as u64 >= BLOCK {
            return self.fetch(to, at);
        }
        let mut done = 0;
        while done < to.len() {
            let from = at + done as u64;
            let inside = from
                .checked_sub(self.buffered_at)
                .filter(|&inside| inside < self.buffer.len() as u64);
            let Some(inside) = inside else {
                self.fill(from / BLOCK * BLOCK)?;
                continue;
            };
            let part = &self.buffer[inside as usize..];
            let len = part.len().min(to.len() - done);
            to[done..done + len].copy_from_slice(&part[..len]);
            done += len;
        }
        Ok(())
    }

    /// Buffers the block at `start`, which is inside the image.
    fn fill(&mut self, start: u64) -> io::Result<()> {
        let mut block = std::mem::take(&mut self.buffer);
        block.resize((self.size - start).min(BLOCK) as usize, 0);
        self.fetch(&mut block, start)?;
        (self.buffer, self.buffered_at) = (block, start);
        Ok(())
    }

    fn fetch(&mut self, to: &mut [u8], at: u64) -> io::Result<()> {
        self.bytes_left = self.bytes_left.checked_sub(to.len() as u64).ok_or_else(too_much)?;
        self.disk.seek(SeekFrom::Start(at))?;
        self.disk.read_exact(to)
    }
}

fn too_much() -> io::Error {
    io::Error::other("its tables lead to endless reading")
}

/// A partition: a range of the image with a position.
#[derive(Clone)]
pub(crate) struct Window {
    source: Rc<RefCell<Source>>,
    start: u64,
    len: u64,
    position: u64,
}

impl Window {
    /// The range `start..start + len`, cut off at the image's end.
    pub(crate) fn new(source: &Rc<RefCell<Source>>, start: u64, len: u64) -> Window {
        let size = source.borrow().size();
        let start = start.min(size);
        Window {
            source: source.clone(),
            start,
            len: len.min(size - start),
            position: 0,
        }
    }

    /// Fills `to` from byte `at` of the range.
    pub(crate) fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        if at.checked_add(to.len() as u64).is_none_or(|end| end > self.len) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "reaches beyond the end of its partition",
            ));
        }
        self.source.borrow_mut().read_at(to, self.start + at)
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }
}

impl Read for Window {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let left = self.len.saturating_sub(self.position);
        let len = to.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.read_at(&mut to[..len], self.position.min(self.len))?;
        self.position += len as u64;
        Ok(len)
    }
}

impl Seek for Window {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}

/// The FAT crate asks for it; nothing is ever written.
impl Write for Window {
    fn write(&mut self, _data: &[u8]) -> io::Result<usize> {
        Err(io::Error::from(io::ErrorKind::PermissionDenied))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ext4_view::Ext4Read for Window {
    fn read(&mut self, start: u64, to: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.read_at(to, start)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_reads_its_range_and_nothing_else() {
        let image: Vec<u8> = (0..100_000u32).map(|i| (i % 239) as u8).collect();
        let source = Source::new(Box::new(io::Cursor::new(image.clone()))).unwrap();
        let source = Rc::new(RefCell::new(source));
        let mut window = Window::new(&source, 1000, 50_000);
        for (at, len) in [(0, 10), (16_000, 1000), (49_990, 10), (20_000, 30_000)] {
            let mut got = vec![0; len];
            window.read_at(&mut got, at as u64).unwrap();
            assert!(got == image[1000 + at..1000 + at + len], "{len} at {at}");
        }
        assert!(window.read_at(&mut [0; 2], 49_999).is_err());
        assert!(window.read_at(&mut [0; 2], u64::MAX).is_err());
        window.seek(SeekFrom::End(-3)).unwrap();
        let mut rest = Vec::new();
        window.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, image[50_997..51_000]);
        assert_eq!(Window::new(&source, 99_000, u64::MAX).len(), 1000);
        assert_eq!(Window::new(&source, u64::MAX, 7).len(), 0);
    }

    #[test]
    fn reading_ends_some_time() {
        let mut source = Source::new(Box::new(io::Cursor::new(vec![0; 64]))).unwrap();
        source.requests_left = 2;
        let mut byte = [0];
        assert!(source.read_at(&mut byte, 1).is_ok() && source.read_at(&mut byte, 2).is_ok());
        assert!(
            source
                .read_at(&mut byte, 3)
                .unwrap_err()
                .to_string()
                .contains("endless")
        );
    }
}
