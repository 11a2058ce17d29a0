//! The range in which a path MTU lies, and the choice of the next size to try.

/// State of one search. Sizes are whole IP packets in bytes.
#[derive(Debug, Clone)]
pub(super) struct Bracket {
    limits: SizeLimits,
    /// The largest size that is known to pass.
    low: Option<u16>,
    /// The smallest size that is known not to pass; the ceiling plus one if there is none.
    high: u16,
    /// A likely MTU: the value of a router error, or the previous MTU.
    hint: Option<u16>,
    hints_left: u8,
}

/// Limits of a search.
#[derive(Debug, Clone, Copy)]
pub(super) struct SizeLimits {
    /// Size of the shortest probe.
    pub(super) small: u16,
    /// Size to start with (BASE_PLPMTU, RFC 8899 section 5.1.2).
    pub(super) base: u16,
    /// Largest size to try (MAX_PLPMTU).
    pub(super) ceiling: u16,
}

/// Common MTUs in descending order: Ethernet; PPPoE (RFC 2516); Ethernet minus an IPv4 header (IPIP, 6in4),
/// minus GRE, minus 40 bytes as in clouds, minus VXLAN, minus WireGuard; tunnels with a margin; the minimum
/// of IPv6.
const COMMON: [u16; 9] = [1500, 1492, 1480, 1476, 1460, 1450, 1420, 1400, 1280];

/// Maximum number of hints used per search. Chosen: 4, for as many routers with ever smaller MTUs; false
/// hints can cost no more than a few round trips.
const HINTS_MAX: u8 = 4;

impl Bracket {
    pub(super) fn new(limits: SizeLimits) -> Self {
        Self { limits, low: None, high: limits.ceiling + 1, hint: None, hints_left: HINTS_MAX }
    }

    /// A search for sizes above one that passes. It first tries one byte more, because usually nothing has
    /// changed.
    pub(super) fn above(limits: SizeLimits, size: u16) -> Self {
        Self { low: Some(size), hint: Some(size), ..Self::new(limits) }
    }

    /// Records that a packet of that size arrived. This is proof and overrides earlier conclusions.
    pub(super) fn passed(&mut self, size: u16) {
        self.low = self.low.max(Some(size));
        if size >= self.high {
            self.high = self.limits.ceiling + 1;
        }
    }

    /// Records that packets of that size do not arrive.
    pub(super) fn rejected(&mut self, size: u16) {
        self.high = self.high.min(size);
        self.low = self.low.filter(|low| *low < self.high);
    }

    /// Records the hint of a router that `mtu` bytes pass where `size` bytes did not. Returns whether the
    /// hint will be tried.
    pub(super) fn add_hint(&mut self, mtu: u32, size: u16) -> bool {
        let Ok(mtu) = u16::try_from(mtu) else { return false };
        let is_possible = mtu < size && mtu < self.high && mtu > self.low.unwrap_or(self.limits.small);
        if !is_possible || self.hints_left == 0 {
            return false;
        }
        self.hints_left -= 1;
        self.hint = Some(mtu);
        true
    }

    pub(super) fn has_passed(&self, size: u16) -> bool {
        self.low.is_some_and(|low| low >= size)
    }

    /// The next size to try; `Err`: the result, the largest size that passes.
    pub(super) fn next(&self) -> Result<u16, u16> {
        let SizeLimits { small, base, ceiling } = self.limits;
        let is_open = |size: &u16| *size < self.high && *size > self.low.unwrap_or(small);
        if let Some(hint) = self.hint.filter(is_open) {
            return Ok(hint);
        }
        let Some(low) = self.low else {
            return Ok(if base < self.high { base } else { small });
        };
        if low + 1 >= self.high {
            return Err(low);
        }
        if self.hint == Some(low) {
            return Ok(low + 1);
        }
        if self.high > ceiling {
            return Ok(ceiling);
        }
        if is_open(&COMMON[0]) {
            return Ok(COMMON[0]);
        }
        let common: Vec<u16> = COMMON.into_iter().filter(is_open).collect();
        if let Some(middle) = common.get(common.len() / 2) {
            return Ok(*middle);
        }
        if COMMON.contains(&low) {
            return Ok(low + 1);
        }
        Ok(low + (self.high - low) / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: SizeLimits = SizeLimits { small: 156, base: 1200, ceiling: 9000 };

    /// The sizes that are tried if the path MTU is `mtu`.
    fn tried(mut bracket: Bracket, mtu: u16) -> Vec<u16> {
        let mut sizes = Vec::new();
        loop {
            match bracket.next() {
                Ok(size) => {
                    if size <= mtu {
                        bracket.passed(size)
                    } else {
                        bracket.rejected(size)
                    }
                    sizes.push(size);
                }
                Err(found) => {
                    assert_eq!(found, mtu);
                    return sizes;
                }
            }
            assert!(sizes.len() < 30, "{mtu}: {sizes:?}");
        }
    }

    #[test]
    fn every_mtu_is_found_exactly() {
        for mtu in 156..=9000 {
            let count = tried(Bracket::new(LIMITS), mtu).len();
            assert!(count <= 19, "{mtu}: {count}");
        }
        assert_eq!(tried(Bracket::new(LIMITS), 1500), [1200, 9000, 1500, 1501]);
        assert_eq!(tried(Bracket::new(LIMITS), 1420), [1200, 9000, 1500, 1450, 1400, 1420, 1421]);
        assert_eq!(tried(Bracket::new(LIMITS), 9000), [1200, 9000]);
        assert_eq!(tried(Bracket::above(LIMITS, 1437), 1437), [1438], "nothing has changed");
        for mtu in 1437..=9000 {
            tried(Bracket::above(LIMITS, 1437), mtu);
        }
    }

    #[test]
    fn hint_is_tried_next_and_proves_nothing() {
        for (hint, mtu) in [(1400, 1400), (1400, 1300), (1400, 1450), (157, 9000), (8999, 156)] {
            let mut bracket = Bracket::new(LIMITS);
            assert!(bracket.add_hint(hint, 9000));
            assert_eq!(bracket.next().map(u32::from), Ok(hint));
            tried(bracket, mtu);
        }
    }

    #[test]
    fn impossible_hint_is_ignored() {
        let mut bracket = Bracket::new(LIMITS);
        bracket.passed(1200);
        bracket.rejected(1500);
        for hint in [0, 68, 1200, 1500, 1501, 65_535, 65_536 + 1400] {
            assert!(!bracket.add_hint(hint, 9000), "{hint}");
        }
        assert!(!bracket.add_hint(1450, 1450), "the hint is not smaller than the packet");
        for _ in 0..HINTS_MAX {
            assert!(bracket.add_hint(1400, 1450));
        }
        assert!(!bracket.add_hint(1400, 1450), "the limit of hints is reached");
    }

    #[test]
    fn size_that_passes_overrides_smaller_ones_that_did_not() {
        let mut bracket = Bracket::new(LIMITS);
        bracket.rejected(1400);
        bracket.passed(1450);
        assert_eq!(tried(bracket, 9000).last(), Some(&9000));
    }

    #[test]
    fn size_that_is_rejected_after_it_passed_has_not_passed() {
        let mut bracket = Bracket::new(LIMITS);
        bracket.passed(1400);
        bracket.rejected(1400);
        assert!(!bracket.has_passed(1400));
    }
}
