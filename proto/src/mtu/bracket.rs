//! Between which sizes a path's MTU lies, and which to try next.

/// What is known in one search. Sizes are whole IP packets in bytes.
#[derive(Debug, Clone)]
pub(super) struct Bracket {
    limits: SizeLimits,
    /// The largest that is known to pass.
    low: Option<u16>,
    /// The smallest that is known not to; one above the ceiling: none yet.
    high: u16,
    /// Where an end is likely: what a router said, or what was the MTU before.
    hint: Option<u16>,
    hints_left: u8,
}

/// What a search keeps to.
#[derive(Debug, Clone, Copy)]
pub(super) struct SizeLimits {
    /// The shortest probe there is.
    pub(super) small: u16,
    /// Where to begin (RFC 8899 section 5.1.2, BASE_PLPMTU).
    pub(super) base: u16,
    /// The longest that is tried (MAX_PLPMTU).
    pub(super) ceiling: u16,
}

/// MTUs that are common, the largest first: Ethernet; PPPoE (RFC 2516); Ethernet less an IPv4 header (IPIP, 6in4), less GRE, less
/// 40 as in clouds, less VXLAN, less WireGuard; tunnels with a margin; IPv6's minimum.
const COMMON: [u16; 9] = [1500, 1492, 1480, 1476, 1460, 1450, 1420, 1400, 1280];

/// Hints that are followed in one search. Chosen: 4, a router on each of so many ever narrower links; hints that lie can do no
/// more than take a few round trips.
const HINTS: u8 = 4;

impl Bracket {
    pub(super) fn new(limits: SizeLimits) -> Self {
        Self { limits, low: None, high: limits.ceiling + 1, hint: None, hints_left: HINTS }
    }

    /// A search upwards, from a size that passes: first of all the next byte, because mostly nothing has changed.
    pub(super) fn above(limits: SizeLimits, size: u16) -> Self {
        Self { low: Some(size), hint: Some(size), ..Self::new(limits) }
    }

    /// A packet of that size arrived. That is proof, whatever was concluded before.
    pub(super) fn passed(&mut self, size: u16) {
        self.low = self.low.max(Some(size));
        if size >= self.high {
            self.high = self.limits.ceiling + 1;
        }
    }

    /// Packets of that size do not arrive.
    pub(super) fn refused(&mut self, size: u16) {
        self.high = self.high.min(size);
        self.low = self.low.filter(|low| *low < self.high);
    }

    /// A router says that `mtu` bytes would pass where a packet of `size` did not. True if that is to be tried.
    pub(super) fn hinted(&mut self, mtu: u32, size: u16) -> bool {
        let Ok(mtu) = u16::try_from(mtu) else { return false };
        let is_inside = mtu < size && mtu < self.high && mtu > self.low.unwrap_or(self.limits.small);
        if !is_inside || self.hints_left == 0 {
            return false;
        }
        self.hints_left -= 1;
        self.hint = Some(mtu);
        true
    }

    pub(super) fn has_passed(&self, size: u16) -> bool {
        self.low.is_some_and(|low| low >= size)
    }

    /// The size to try next, or what was found: the largest that passes, to the byte.
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

    /// Which sizes are tried where `mtu` is the truth.
    fn tried(mut bracket: Bracket, mtu: u16) -> Vec<u16> {
        let mut sizes = Vec::new();
        loop {
            match bracket.next() {
                Ok(size) => {
                    if size <= mtu {
                        bracket.passed(size)
                    } else {
                        bracket.refused(size)
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
    fn every_mtu_is_found_to_the_byte() {
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
    fn a_hint_is_tried_next_and_proves_nothing() {
        for (hint, mtu) in [(1400, 1400), (1400, 1300), (1400, 1450), (157, 9000), (8999, 156)] {
            let mut bracket = Bracket::new(LIMITS);
            assert!(bracket.hinted(hint, 9000));
            assert_eq!(bracket.next().map(u32::from), Ok(hint));
            tried(bracket, mtu);
        }
    }

    #[test]
    fn a_hint_that_cannot_be_true_is_none() {
        let mut bracket = Bracket::new(LIMITS);
        bracket.passed(1200);
        bracket.refused(1500);
        for hint in [0, 68, 1200, 1500, 1501, 65_535, 65_536 + 1400] {
            assert!(!bracket.hinted(hint, 9000), "{hint}");
        }
        assert!(!bracket.hinted(1450, 1450), "the packet was not longer");
        for _ in 0..HINTS {
            assert!(bracket.hinted(1400, 1450));
        }
        assert!(!bracket.hinted(1400, 1450), "enough of them");
    }
}
