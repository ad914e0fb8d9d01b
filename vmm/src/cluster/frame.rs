//! Frames of an authenticated control connection: a 32-bit little-endian length, then that many
//! bytes of JSON.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Most bytes of JSON in one frame.
pub const MAX_FRAME: u32 = 16 << 20;

/// Why a frame can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The other side closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// The connection broke or was silent for too long.
    #[error("{}", super::errno::describe(.0))]
    Io(#[source] io::Error),
    /// A length above [`MAX_FRAME`].
    #[error("a frame of {0} bytes, at most {MAX_FRAME} are allowed")]
    TooLong(u64),
    /// Not a message of this protocol.
    #[error("a malformed message: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// What a frame holds: a sign of life or a message.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub enum Envelope<M> {
    /// Nothing to say, but alive.
    Heartbeat,
    /// One message.
    Message(M),
}

/// The frame of `message`, ready to be written at once.
///
/// # Errors
/// `TooLong`, or `Malformed` when the message has no JSON form.
pub fn encode<M: Serialize>(message: &Envelope<M>) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() as u64 - 4;
    let prefix = u32::try_from(length)
        .ok()
        .filter(|l| *l <= MAX_FRAME)
        .ok_or(FrameError::TooLong(length))?;
    frame[..4].copy_from_slice(&prefix.to_le_bytes());
    Ok(frame)
}

/// Writes one frame.
///
/// # Errors
/// See [`FrameError`].
pub fn write<M: Serialize>(stream: &mut impl Write, message: &Envelope<M>) -> Result<(), FrameError> {
    stream.write_all(&encode(message)?).map_err(FrameError::Io)
}

/// Reads one frame. Memory grows with the bytes that really come, not with what a length claims.
///
/// # Errors
/// See [`FrameError`]; the stream is of no more use then.
pub fn read<M: DeserializeOwned>(stream: &mut impl Read) -> Result<Envelope<M>, FrameError> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).map_err(closed)?;
    let length = u32::from_le_bytes(prefix);
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length.into()));
    }
    let mut body = Vec::new();
    let got = stream
        .by_ref()
        .take(length.into())
        .read_to_end(&mut body)
        .map_err(closed)?;
    if got < length as usize {
        return Err(FrameError::Closed);
    }
    Ok(serde_json::from_slice(&body)?)
}

/// A peer that is gone shows as end of file or as a reset: the same to us.
fn closed(error: io::Error) -> FrameError {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error.kind() {
        UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe => FrameError::Closed,
        _ => FrameError::Io(error),
    }
}

/// Console bytes in JSON: a string with one character of U+0000 to U+00FF a byte, which is
/// readable and far shorter than an array of numbers.
pub mod latin1 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// For `#[serde(with)]`.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&bytes.iter().map(|b| char::from(*b)).collect::<String>())
    }

    /// For `#[serde(with)]`.
    ///
    /// # Errors
    /// The deserializer's, or a character above U+00FF.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.chars()
            .map(|c| u8::try_from(c).map_err(|_| D::Error::custom("not a byte")))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Bytes(#[serde(with = "latin1")] Vec<u8>);

    #[test]
    fn a_frame_comes_back() {
        let message = Envelope::Message(Bytes((0..=255).collect()));
        let mut wire = encode(&message).unwrap();
        wire.extend(encode(&Envelope::<Bytes>::Heartbeat).unwrap());
        let mut wire = wire.as_slice();
        assert_eq!(read::<Bytes>(&mut wire).unwrap(), message);
        assert_eq!(read::<Bytes>(&mut wire).unwrap(), Envelope::Heartbeat);
        assert!(matches!(read::<Bytes>(&mut wire), Err(FrameError::Closed)));
    }

    #[test]
    fn bad_frames_are_refused() {
        let frame = |body: &[u8]| [&(body.len() as u32).to_le_bytes(), body].concat();
        let parse = |wire: Vec<u8>| read::<Bytes>(&mut wire.as_slice());
        assert!(matches!(parse(vec![0xff; 64]), Err(FrameError::TooLong(0xffff_ffff))));
        assert!(matches!(parse(frame(b"{}")), Err(FrameError::Malformed(_))));
        assert!(matches!(parse(frame(b"")), Err(FrameError::Malformed(_))));
        assert!(matches!(
            parse(frame("{\"Message\":\"\u{100}\"}".as_bytes())),
            Err(FrameError::Malformed(_))
        ));
        assert!(matches!(parse(frame(&[b'['; 100_000])), Err(FrameError::Malformed(_))));
        assert!(matches!(parse(vec![9, 0, 0, 0, b'x']), Err(FrameError::Closed)));
        let huge = Envelope::Message(Bytes(vec![b'x'; MAX_FRAME as usize]));
        assert!(matches!(encode(&huge), Err(FrameError::TooLong(_))));
    }
}
