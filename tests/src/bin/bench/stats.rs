//! Medians and spreads of the few values that rounds give.

/// The middle one, or the mean of the two in the middle.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let values = sorted(values);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// How far the rounds lie apart: half of what is between the least and the greatest, as a share of the median.
pub(crate) fn spread(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let values = sorted(values);
    let (least, greatest) = (values.first()?, values.last()?);
    let middle = median(values.iter().copied())?;
    (middle > 0.0).then(|| (greatest - least) / 2.0 / middle)
}

fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    values
}

#[cfg(test)]
mod tests {
    use super::{median, spread};

    #[test]
    fn the_middle_of_few() {
        assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median([4.0, 1.0]), Some(2.5));
        assert_eq!(median([f64::NAN]), None);
    }

    #[test]
    fn spread_is_relative_to_the_median() {
        assert_eq!(spread([90.0, 100.0, 110.0]), Some(0.1));
        assert_eq!(spread([5.0]), Some(0.0));
        assert_eq!(spread([]), None);
    }
}
