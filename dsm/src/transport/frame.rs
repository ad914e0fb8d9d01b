//! Frames in a byte stream: payload length (u32, little endian), class (u8), payload.

/// Longest payload in bytes.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Class of the transport's own empty frames that show a quiet peer is there.
pub const HEARTBEAT: u8 = 0xff;
/// Read at once at most: what is read is still in a processor's cache when its frame is handed on.
const AT_ONCE: usize = 256 << 10;
/// Length and class.
pub const HEADER: usize = 5;

/// What is wrong with a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A frame longer than [`MAX_PAYLOAD`].
    #[error("frame of class {class:#x} with {len} bytes is longer than {MAX_PAYLOAD}")]
    Length {
        /// Class.
        class: u8,
        /// Payload length in bytes as sent.
        len: u32,
    },
    /// A heartbeat with a payload.
    #[error("heartbeat with {len} bytes of payload")]
    Heartbeat {
        /// Payload length in bytes as sent.
        len: u32,
    },
    /// An RDMA message longer than its slot.
    #[error("message of {len} bytes is longer than its slot")]
    Message {
        /// Length in bytes as sent.
        len: usize,
    },
    /// An RDMA message that is no write with an immediate.
    #[error("message without an immediate")]
    Bare,
    /// An RDMA message that counts more than was sent.
    #[error("message with a count of more than was sent")]
    Count,
}

/// The header of a frame; `len` is at most [`MAX_PAYLOAD`].
pub fn header(class: u8, len: usize) -> [u8; HEADER] {
    let [a, b, c, d] = (len as u32).to_le_bytes();
    [a, b, c, d, class]
}

/// Cuts a byte stream into frames.
#[derive(Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    at_once: usize,
    /// Unread bytes are `start..end`.
    start: usize,
    end: usize,
}

impl Decoder {
    /// An empty one.
    pub fn new() -> Self {
        Self::reading(AT_ONCE)
    }

    /// An empty one that is given so many bytes at once at most.
    pub fn reading(at_once: usize) -> Self {
        // Room for the longest frame, and for more to read while it is incomplete.
        Self {
            buffer: vec![0; 2 * (HEADER + MAX_PAYLOAD)],
            at_once,
            start: 0,
            end: 0,
        }
    }

    /// Where the next bytes of the stream go; never empty once [`Self::next`] has said `None`.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start >= self.buffer.len() / 2 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let most = self.buffer.len().min(self.end + self.at_once);
        &mut self.buffer[self.end..most]
    }

    /// `count` bytes were put at the start of [`Self::space`].
    pub fn filled(&mut self, count: usize) {
        self.end = self.buffer.len().min(self.end + count);
    }

    /// The next complete frame: class and payload.
    ///
    /// # Errors
    /// A stream that holds no frames; there is no way to go on.
    pub fn next(&mut self) -> Result<Option<(u8, &[u8])>, Malformed> {
        let Some((class, len)) = self.head()? else { return Ok(None) };
        let from = self.start + HEADER;
        if self.end - from < len {
            return Ok(None);
        }
        self.start = from + len;
        Ok(Some((class, &self.buffer[from..self.start])))
    }

    /// The next frame once its header is there: class and length of the payload, which is what follows. It is to be
    /// taken by [`Self::take`] and then from the stream itself, all of it.
    ///
    /// # Errors
    /// As for [`Self::next`].
    pub fn open(&mut self) -> Result<Option<(u8, usize)>, Malformed> {
        let head = self.head()?;
        self.start += if head.is_some() { HEADER } else { 0 };
        Ok(head)
    }

    /// Moves bytes of the stream out, as many as there are and fit.
    pub fn take(&mut self, into: &mut [u8]) -> usize {
        let some = into.len().min(self.end - self.start);
        into[..some].copy_from_slice(&self.buffer[self.start..self.start + some]);
        self.start += some;
        some
    }

    fn head(&self) -> Result<Option<(u8, usize)>, Malformed> {
        let Some(&[a, b, c, d, class]) = self.buffer[self.start..self.end].first_chunk::<HEADER>() else { return Ok(None) };
        let len = u32::from_le_bytes([a, b, c, d]);
        if len as usize > MAX_PAYLOAD {
            return Err(Malformed::Length { class, len });
        }
        if class == HEARTBEAT && len != 0 {
            return Err(Malformed::Heartbeat { len });
        }
        Ok(Some((class, len as usize)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(decoder: &mut Decoder, bytes: &[u8]) {
        decoder.space()[..bytes.len()].copy_from_slice(bytes);
        decoder.filled(bytes.len());
    }

    fn frame(class: u8, payload: &[u8]) -> Vec<u8> {
        [&header(class, payload.len()), payload].concat()
    }

    #[test]
    fn cuts_frames_wherever_the_stream_is_torn() {
        let stream: Vec<u8> = [frame(1, b"abc"), frame(2, b""), frame(3, &[7; 300])].concat();
        for piece in [1, 2, 4, 5, 6, 7, 100, stream.len()] {
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            for bytes in stream.chunks(piece) {
                feed(&mut decoder, bytes);
                while let Some((class, payload)) = decoder.next().unwrap() {
                    seen.push((class, payload.to_vec()));
                }
            }
            assert_eq!(
                seen,
                [(1, b"abc".to_vec()), (2, vec![]), (3, vec![7; 300])],
                "pieces of {piece}"
            );
        }
    }

    #[test]
    fn has_space_for_the_longest_frames_for_ever() {
        let mut decoder = Decoder::new();
        let payload: Vec<u8> = (0..MAX_PAYLOAD).map(|at| at as u8).collect();
        let stream = [
            frame(9, &payload),
            frame(8, &payload),
            frame(7, b"x"),
            frame(9, &payload),
        ]
        .concat();
        let (mut at, mut seen) = (0, 0);
        while at < stream.len() {
            let space = decoder.space();
            assert!(!space.is_empty());
            let count = space.len().min(stream.len() - at).min(700_001);
            space[..count].copy_from_slice(&stream[at..at + count]);
            decoder.filled(count);
            at += count;
            while let Some((class, got)) = decoder.next().unwrap() {
                assert!(if class == 7 { got == b"x" } else { got == payload });
                seen += 1;
            }
        }
        assert_eq!(seen, 4);
    }

    #[test]
    fn a_frame_that_is_opened_is_followed_by_the_next() {
        let mut decoder = Decoder::reading(16);
        assert_eq!(decoder.space().len(), 16);
        feed(&mut decoder, &frame(3, b"a long one")[..4]);
        assert_eq!(decoder.open(), Ok(None));
        feed(&mut decoder, &frame(3, b"a long one")[4..8]);
        assert_eq!(decoder.next(), Ok(None));
        assert_eq!(decoder.open(), Ok(Some((3, 10))));
        let mut taken = [0; 10];
        assert_eq!((decoder.take(&mut taken), decoder.take(&mut taken[3..])), (3, 0));
        // The other seven don't pass through here.
        feed(&mut decoder, &frame(4, b"next"));
        assert_eq!(decoder.next(), Ok(Some((4, &b"next"[..]))));
    }

    #[test]
    fn refuses_what_is_no_frame_as_soon_as_the_header_is_there() {
        let mut decoder = Decoder::new();
        feed(&mut decoder, &[1, 0, 16, 0, 4]);
        assert_eq!(
            decoder.next(),
            Err(Malformed::Length {
                class: 4,
                len: (1 << 20) + 1
            })
        );
        let mut decoder = Decoder::new();
        feed(&mut decoder, b"HTTP/");
        assert!(matches!(decoder.next(), Err(Malformed::Length { .. })));
        let mut decoder = Decoder::new();
        feed(&mut decoder, &[1, 0, 0, 0, HEARTBEAT]);
        assert_eq!(decoder.next(), Err(Malformed::Heartbeat { len: 1 }));
        let mut decoder = Decoder::new();
        feed(&mut decoder, &[0, 0, 16, 0, 4]);
        assert_eq!(decoder.next(), Ok(None));
    }
}
