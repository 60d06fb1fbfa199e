//! Quantities on the command line: bytes and durations with their units.

use std::fmt;
use std::time::Duration;

const UNITS: [(&str, u64); 4] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// A number of bytes: `4096`, `512MiB`, `1.5GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no size: give bytes, or a number with KiB, MiB, GiB or TiB");
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = unit.trim_start();
        let scale = if unit.is_empty() || unit == "B" {
            1
        } else {
            UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(wrong)?.1
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let whole: u64 = whole.parse().map_err(|_| wrong())?;
        let bytes = whole.checked_mul(scale).ok_or_else(|| format!("{text:?} is more than 2^64 bytes"))?;
        let part = if fraction.is_empty() {
            0
        } else {
            if fraction.len() > 9 || scale == 1 {
                return Err(wrong());
            }
            let digits: u128 = fraction.parse().map_err(|_| wrong())?;
            let part = u128::from(scale) * digits / 10u128.pow(fraction.len() as u32);
            u64::try_from(part).map_err(|_| wrong())?
        };
        bytes.checked_add(part).map(Self).ok_or_else(|| format!("{text:?} is more than 2^64 bytes"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().rev().find(|(_, scale)| self.0 >= *scale) {
            Some((unit, scale)) => write!(f, "{:.1} {unit}", self.0 as f64 / *scale as f64),
            None => write!(f, "{} B", self.0),
        }
    }
}

/// Reads a duration: `80us`, `250ms`, `3s`, `2m`, `1h`; a plain number counts seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration: give a whole number with us, ms, s, m or h");
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let micros = match unit.trim() {
        "us" => 1,
        "ms" => 1000,
        "" | "s" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(micros).map(Duration::from_micros).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_binary_units_and_fractions() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("2KiB", 2048),
            ("1.5GiB", 3 << 29),
            ("16 mib", 16 << 20),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "GiB", "1GB", "-1", "1.5", "1e9", "99999999999TiB", "1.0000000000GiB", "0x10"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!(Size(1536 << 20).to_string(), "1.5 GiB");
        assert_eq!(Size(12).to_string(), "12 B");
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("80us"), Ok(Duration::from_micros(80)));
        assert_eq!(duration("3"), Ok(Duration::from_secs(3)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("").is_err());
        assert!(duration("3d").is_err());
    }
}
