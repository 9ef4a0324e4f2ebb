//! The real trial: every program of the agent before the kernel's verifier.

use serde::Serialize;

use super::{Check, Group, Level, explain};
use crate::ebpf::Feature;
use crate::ebpf::examine::{self, Trial};
use crate::tls;

/// How the kernel judged one program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    /// The hook that it is for.
    pub hook: &'static str,
    pub loads: bool,
    /// Why not, in the kernel's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// That this agent has no programs at all.
pub(super) fn missing() -> Option<Check> {
    let error = examine::programs_inside().err()?;
    let found = Check::ok(Group::Programs, "programs", error.to_string());
    Some(found.but(Level::Problem, ""))
}

/// What came of the trial.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) verdicts: Vec<Verdict>,
    pub(super) features: Vec<Feature>,
}

/// Loads every program, then forgets it.
pub(super) fn check() -> (Vec<Check>, Outcome) {
    if let Some(missing) = missing() {
        return (vec![missing], Outcome::default());
    }
    match examine::trial() {
        Ok((features, trials)) => {
            let outcome = Outcome {
                verdicts: trials.into_iter().map(Verdict::from).collect(),
                features: features.list().into_iter().chain([kernel_tls()]).collect(),
            };
            let checks = vec![judge(&outcome.verdicts), lacking(&outcome.features)];
            (checks, outcome)
        }
        Err(error) => {
            let found = Check::ok(Group::Programs, "programs", explain(&error));
            let advice = "see the problems above first: this follows from most of them";
            (vec![found.but(Level::Problem, advice)], Outcome::default())
        }
    }
}

/// Not of eBPF, but found out by trying, too.
fn kernel_tls() -> Feature {
    Feature {
        name: "kernel TLS",
        present: tls::probe_kernel().is_ok(),
        since: "5.11",
        without: "with `kernelTls: true` the agent encrypts all the same; it takes CONFIG_TLS and ChaCha20-Poly1305",
    }
}

fn judge(verdicts: &[Verdict]) -> Check {
    let refused: Vec<_> = verdicts
        .iter()
        .filter_map(|verdict| Some(format!("{}: {}", verdict.hook, verdict.reason.as_ref()?)))
        .collect();
    let check = |found: String| Check::ok(Group::Programs, "programs", found);
    let all = verdicts.len();
    match refused.len() {
        0 => check(format!("the kernel takes all {all} programs")),
        count => check(format!("the kernel refuses {count} of {all} programs"))
            .with(refused)
            .but(
                Level::Problem,
                "mend the problems above first; if there are none, this kernel is not supported",
            ),
    }
}

/// What newer kernels have.
fn lacking(features: &[Feature]) -> Check {
    let check = |found: &str| Check::ok(Group::Programs, "features", found);
    let lacking = features.iter().filter(|feature| !feature.present);
    let details: Vec<_> = lacking
        .map(|feature| format!("{} (Linux {}): {}", feature.name, feature.since, feature.without))
        .collect();
    match details.is_empty() {
        true => check("the kernel has everything that the agent can use"),
        false => check("the kernel lacks what newer ones have").with(details).but(
            Level::Note,
            "a newer kernel, or one that was built with it, brings it; nothing else is missing",
        ),
    }
}

impl From<Trial> for Verdict {
    fn from(trial: Trial) -> Self {
        Self {
            hook: trial.hook,
            loads: trial.refused.is_none(),
            reason: trial.refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_lacks_is_said_with_what_is_otherwise() {
        let feature = |present| Feature {
            name: "fast path",
            present,
            since: "5.15",
            without: "all through the agent",
        };
        assert_eq!(lacking(&[feature(true)]).level, Level::Ok);
        let check = lacking(&[feature(true), feature(false)]);
        assert_eq!(check.level, Level::Note);
        assert_eq!(check.details, ["fast path (Linux 5.15): all through the agent"]);
    }

    #[test]
    fn a_refused_program_is_named_with_the_kernels_reason() {
        let trial = |hook, refused: Option<&str>| {
            Verdict::from(Trial {
                hook,
                refused: refused.map(str::to_owned),
            })
        };
        let good = trial("connect4", None);
        assert_eq!(judge(std::slice::from_ref(&good)).level, Level::Ok);
        let check = judge(&[good, trial("sockops", Some("unknown func"))]);
        assert_eq!(check.level, Level::Problem);
        assert_eq!(check.details, ["sockops: unknown func"]);
        assert!(check.found.contains("1 of 2"));
    }
}
