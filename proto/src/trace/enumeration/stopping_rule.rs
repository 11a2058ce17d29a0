//! The stopping rule of the multipath detection algorithm.

/// Number of probes after which a router with `found` known successors has no further one, at 95 %
/// confidence; `None` above 16 successors.
///
/// With so many probes, a router that spreads flows evenly over k = `found` + 1 successors would have shown
/// all of them in at least 95 % of cases: the smallest n for which Σᵢ (−1)ⁱ⁺¹·C(k,i)·(1 − i/k)ⁿ ≤ 0.05.
/// Because the rule is applied after each new successor, a router with k successors can also be taken for one
/// with fewer successors earlier. With that, the probability of missing a successor is between 3.1 % and
/// 5.06 %, the latter for k = 9.
///
/// Source: Augustin, Friedman, Teixeira, "Multipath tracing with Paris traceroute", E2EMON 2007; Veitch,
/// Augustin, Friedman, Teixeira, "Failure control in multipath route tracing", INFOCOM 2009.
pub(super) fn probes_required(found: usize) -> Option<usize> {
    PROBES_REQUIRED.get(found.max(1) - 1).copied()
}

/// Index: number of known successors − 1.
const PROBES_REQUIRED: [usize; 16] = [6, 11, 16, 21, 27, 33, 38, 44, 51, 57, 63, 70, 76, 83, 90, 96];

/// The probability that this rule misses a successor of a router that spreads flows evenly over `successors`
/// successors.
#[cfg(test)]
pub(super) fn failure_probability(successors: usize) -> f64 {
    let share = |count: usize| {
        f64::from(u32::try_from(count).unwrap()) / f64::from(u32::try_from(successors).unwrap())
    };
    // Index: number of known successors. Contents: the probability of that and of not having stopped.
    let mut known = vec![0.0; successors + 1];
    known[1] = 1.0;
    let mut failed = 0.0;
    for probes in 1..=96 {
        for (found, probability) in known.iter_mut().enumerate().take(successors) {
            if probes >= probes_required(found).unwrap() {
                failed += std::mem::take(probability);
            }
        }
        for found in (1..=successors).rev() {
            known[found] = known[found] * share(found) + known[found - 1] * (1.0 - share(found - 1));
        }
    }
    failed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn required_probes_are_the_smallest_that_show_all_successors_in_95_percent_of_cases() {
        for successors in 2..=17_u32 {
            let missing = |probes: usize| -> f64 {
                let mut choose = 1.0;
                let terms = (1..successors).map(|left_out| {
                    choose *= f64::from(successors - left_out + 1) / f64::from(left_out);
                    let share = 1.0 - f64::from(left_out) / f64::from(successors);
                    let sign = if left_out % 2 == 1 { 1.0 } else { -1.0 };
                    sign * choose * share.powi(i32::try_from(probes).unwrap())
                });
                terms.sum()
            };
            let required = probes_required(successors as usize - 1).unwrap();
            assert!(missing(required) <= 0.05, "{successors}");
            assert!(missing(required - 1) > 0.05, "{successors}");
        }
        assert_eq!(probes_required(17), None);
    }

    #[test]
    fn rule_misses_a_successor_in_at_most_5_06_percent_of_cases() {
        let failures: Vec<f64> = (2..=16).map(failure_probability).collect();
        assert!(failures.iter().all(|failure| (0.031..0.0507).contains(failure)), "{failures:?}");
        let mean = failures.iter().sum::<f64>() / 15.0;
        assert!(mean < 0.05, "{mean}");
    }
}
