//! Sizes as people write them: `512M`, `2G`, `1073741824`.

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not digits with one unit letter behind.
    #[error("{0:?} is not a size: write digits and K, M, G or T, as in 512M")]
    Malformed(String),
    /// Zero, or more than 64 bits hold.
    #[error("{0:?} is not a size that memory can have")]
    Range(String),
}

/// Bytes in `text`: digits, then an optional unit of K, M, G or T (powers of 1024), with an
/// optional `iB` or `B` behind.
///
/// # Errors
/// When it is not of that form, zero, or too large for 64 bits.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(SizeError::Malformed(text.into())),
    };
    if number.is_empty() {
        return Err(SizeError::Malformed(text.into()));
    }
    let range = || SizeError::Range(text.into());
    let number: u64 = number.parse().map_err(|_| range())?;
    match number.checked_mul(1 << shift) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(range()),
    }
}

/// `bytes` for people: whole GiB where it is one, MiB otherwise.
pub fn show(bytes: u64) -> String {
    if bytes >= 1 << 30 && bytes.trailing_zeros() >= 30 {
        format!("{} GiB", bytes >> 30)
    } else {
        format!("{} MiB", bytes >> 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("2g"), Ok(2 << 30));
        assert_eq!(parse("1TiB"), Ok(1 << 40));
    }

    #[test]
    fn what_is_no_size() {
        for text in ["", "M", "12Q", "-1", "1.5G", "1 G"] {
            assert_eq!(parse(text), Err(SizeError::Malformed(text.into())));
        }
        for text in ["0", "0G", "99999999999999999999", "18446744073709551615T"] {
            assert_eq!(parse(text), Err(SizeError::Range(text.into())));
        }
    }

    #[test]
    fn shown() {
        assert_eq!(show(3 << 30), "3 GiB");
        assert_eq!(show(1536 << 20), "1536 MiB");
    }
}
