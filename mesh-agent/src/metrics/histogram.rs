//! A histogram of plain atomics. (prometheus-client's takes a lock for each observation.)

use std::sync::atomic::{AtomicU64, Ordering};

/// Envoy's default buckets, which Istio's dashboards are used to: milliseconds, or bytes.
pub(super) const BOUNDS: [f64; 19] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5, 6e5, 1.8e6,
    3.6e6,
];

/// What one observation is counted in, and the bounds in that unit.
pub(super) struct Unit {
    bounds: [u64; BOUNDS.len()],
    per_unit: u32,
}

/// Whole bytes; at most half a byte is none.
pub(super) const BYTES: Unit = Unit {
    bounds: [
        0, 1, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 300_000, 600_000,
        1_800_000, 3_600_000,
    ],
    per_unit: 1,
};

/// Microseconds, shown as milliseconds.
pub(super) const MICROSECONDS: Unit = Unit {
    bounds: [
        500,
        1_000,
        5_000,
        10_000,
        25_000,
        50_000,
        100_000,
        250_000,
        500_000,
        1_000_000,
        2_500_000,
        5_000_000,
        10_000_000,
        30_000_000,
        60_000_000,
        300_000_000,
        600_000_000,
        1_800_000_000,
        3_600_000_000,
    ],
    per_unit: 1_000,
};

#[derive(Debug, Default)]
pub(super) struct Histogram {
    /// Not cumulative; the last one is `+Inf`.
    counts: [AtomicU64; BOUNDS.len() + 1],
    sum: AtomicU64,
}

/// What a histogram held at one moment.
pub(super) struct Observed {
    pub(super) sum: f64,
    pub(super) count: u64,
    /// Upper bound and the observations in this bucket alone.
    pub(super) buckets: [(f64, u64); BOUNDS.len() + 1],
}

impl Histogram {
    pub(super) fn observe(&self, value: u64, unit: &Unit) {
        let bucket = unit.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// What all of them hold together.
    pub(super) fn read<'a>(parts: impl Iterator<Item = &'a Self>, unit: &Unit) -> Observed {
        let bound = |index| BOUNDS.get(index).copied().unwrap_or(f64::INFINITY);
        let mut buckets = std::array::from_fn(|index| (bound(index), 0));
        let mut sum = 0_u64;
        for part in parts {
            for ((_, all), count) in buckets.iter_mut().zip(&part.counts) {
                *all += count.load(Ordering::Relaxed);
            }
            sum = sum.wrapping_add(part.sum.load(Ordering::Relaxed));
        }
        Observed {
            sum: sum as f64 / f64::from(unit.per_unit),
            count: buckets.iter().map(|(_, count)| count).sum(),
            buckets,
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_agree_with_the_units() {
        for (index, bound) in BOUNDS.into_iter().enumerate() {
            assert_eq!(BYTES.bounds[index] as f64, bound.floor());
            assert_eq!(MICROSECONDS.bounds[index] as f64, bound * 1e3);
        }
    }

    #[test]
    fn a_value_on_a_bound_belongs_below_it() {
        let histogram = Histogram::default();
        for value in [0, 1, 2, 3_600_000, 3_600_001] {
            histogram.observe(value, &BYTES);
        }
        let observed = Histogram::read([&histogram].into_iter(), &BYTES);
        let of = |bound: f64| observed.buckets.iter().find(|(b, _)| *b == bound).unwrap().1;
        assert_eq!(
            (of(0.5), of(1.0), of(5.0), of(3.6e6), of(f64::INFINITY)),
            (1, 1, 1, 1, 1)
        );
        assert_eq!(observed.count, 5);
        assert_eq!(observed.sum, 7_200_004.0);
    }
}
