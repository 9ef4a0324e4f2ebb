//! Reading what an agent tells Prometheus.

use std::collections::BTreeMap;

/// The samples of one or several agents.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<Sample>);

#[derive(Clone, Debug)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Samples {
    /// Reads the text format. Lines that are no samples are comments.
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(parse_line).collect())
    }

    /// The samples of a metric that have these labels.
    pub fn all<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| {
            sample.name == name
                && labels
                    .iter()
                    .all(|(key, value)| sample.labels.get(*key).is_some_and(|have| have == value))
        })
    }

    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.all(name, labels).map(|sample| sample.value).sum()
    }
}

fn parse_line(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let (series, value) = line.rsplit_once(' ')?;
    let (name, rest) = series.split_once('{').unwrap_or((series, "}"));
    let mut labels = BTreeMap::new();
    let mut rest = rest.strip_suffix('}')?;
    while let Some((key, quoted)) = rest.split_once("=\"") {
        let end = closing_quote(quoted)?;
        labels.insert(key.trim_start_matches(',').to_owned(), quoted[..end].to_owned());
        rest = &quoted[end + 1..];
    }
    Some(Sample {
        name: name.to_owned(),
        labels,
        value: value.parse().ok()?,
    })
}

fn closing_quote(text: &str) -> Option<usize> {
    let mut escaped = false;
    text.find(|character| {
        let ends = character == '"' && !escaped;
        escaped = character == '\\' && !escaped;
        ends
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_by_name_and_label() {
        let text =
            "# HELP a b\nreq{code=\"200\",path=\"a\\\"},b\"} 3\nreq{code=\"500\",path=\"x\"} 4.5\nup 1\n";
        let samples = Samples::parse(text);
        assert!((samples.sum("req", &[]) - 7.5).abs() < 1e-9);
        assert!((samples.sum("req", &[("code", "500")]) - 4.5).abs() < 1e-9);
        assert!((samples.sum("up", &[]) - 1.0).abs() < 1e-9);
        assert!(samples.sum("req", &[("nope", "")]).abs() < 1e-9);
        let first = samples.all("req", &[("code", "200")]).next().unwrap();
        assert_eq!(first.labels["path"], "a\\\"},b");
    }
}
