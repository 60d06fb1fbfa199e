//! How much memory this machine has for this process, and how much of it the process uses.

use std::fs;

/// Memory of the machine, as far as it tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes of the machine, or of the control group if that has fewer.
    pub total: u64,
    /// Bytes that could be used now without swapping.
    pub available: u64,
}

/// Asks the system.
///
/// # Errors
/// If `/proc/meminfo` cannot be read or lacks what it should have.
pub fn measure() -> std::io::Result<Memory> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let (total, available) = parse_meminfo(&meminfo)
        .ok_or_else(|| std::io::Error::other("/proc/meminfo has no MemTotal and MemAvailable"))?;
    let limit = group_limit().unwrap_or(u64::MAX);
    Ok(Memory { total: total.min(limit), available: available.min(limit) })
}

/// Bytes of this process that are in memory now.
pub fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(rustix::param::page_size() as u64)
}

/// The most bytes of this process that were in memory at once, since it began or the peak was forgotten.
pub fn peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Has the peak begin again from what is in memory now. Where the system does not allow it, it stays.
pub fn forget_peak() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The limit of the control group, version 2 or 1.
fn group_limit() -> Option<u64> {
    ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok())
}

fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let value = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some((value("MemTotal")?, value("MemAvailable")?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_by_name() {
        let text = "MemTotal:       24000000 kB\nMemFree:  1 kB\nMemAvailable:   8000 kB\n";
        assert_eq!(parse_meminfo(text), Some((24_000_000 << 10, 8000 << 10)));
        assert_eq!(parse_meminfo("MemTotal: 5 kB\n"), None);
        let here = measure().unwrap();
        assert!(here.available > 0 && here.available <= here.total);
        assert!(resident_bytes().unwrap() > 1 << 16);
        assert!(peak_bytes().unwrap() >= resident_bytes().unwrap() / 2);
    }
}
