//! What there is to be tested: kernels and architectures.

use std::fmt;

use anyhow::{Result, bail};
use clap::ValueEnum;

use crate::cross::Arch;

/// A version of Linux that Debian has for clouds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Release {
    pub(super) name: &'static str,
    pub(super) suite: &'static str,
    /// What tests may find missing: nothing else.
    pub(super) lacks: &'static [&'static str],
}

/// The oldest that we support, and each long-term one since that Debian has.
const RELEASES: [Release; 3] = [
    Release {
        name: "5.10",
        suite: "bullseye",
        lacks: &["fast path", "kernel TLS", "multipath TCP"],
    },
    Release {
        name: "6.1",
        suite: "bookworm",
        lacks: &[],
    },
    Release {
        name: "6.12",
        suite: "trixie",
        lacks: &[],
    },
];

/// A kernel as one names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    #[value(name = "5.10")]
    V5_10,
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
    /// The one that runs here, without QEMU.
    Host,
}

/// One run of the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) arch: Arch,
    /// `None`: this machine's own.
    pub(super) release: Option<&'static Release>,
}

impl Row {
    pub(super) fn kernel(&self) -> &'static str {
        self.release.map_or("host", |release| release.name)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} {}", self.kernel(), self.arch)
    }
}

/// All of the wanted kernels on all of the wanted architectures; those that were not named are all wanted.
pub(super) fn wanted(kernels: &[Kernel], arches: &[Arch]) -> Result<Vec<Row>> {
    let all_kernels = Kernel::value_variants();
    let kernels = if kernels.is_empty() { all_kernels } else { kernels };
    let arches = if arches.is_empty() { &Arch::ALL } else { arches };
    let mut rows = Vec::new();
    for kernel in all_kernels.iter().filter(|kernel| kernels.contains(kernel)) {
        let release = match kernel {
            Kernel::V5_10 => Some(&RELEASES[0]),
            Kernel::V6_1 => Some(&RELEASES[1]),
            Kernel::V6_12 => Some(&RELEASES[2]),
            Kernel::Host => None,
        };
        for arch in Arch::ALL.into_iter().filter(|arch| arches.contains(arch)) {
            if release.is_some() || arch.is_host() {
                rows.push(Row { arch, release });
            }
        }
    }
    if rows.is_empty() {
        bail!("this machine's own kernel is none for the architecture asked for");
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::{Arch, Kernel, wanted};

    fn names(kernels: &[Kernel], arches: &[Arch]) -> Vec<String> {
        let rows = wanted(kernels, arches).unwrap();
        rows.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_kernel_on_every_architecture_and_the_own_one() {
        let all = names(&[], &[]);
        let guests = [
            "5.10 x86_64",
            "5.10 arm64",
            "6.1 x86_64",
            "6.1 arm64",
            "6.12 x86_64",
            "6.12 arm64",
        ];
        assert_eq!(all[..6], guests);
        assert_eq!(all.len(), 7);
        assert!(all[6].starts_with("host "));
    }

    #[test]
    fn what_is_named_is_in_the_table_once() {
        let kernels = [Kernel::V6_12, Kernel::V6_1, Kernel::V6_1];
        assert_eq!(names(&kernels, &[Arch::Arm64]), ["6.1 arm64", "6.12 arm64"]);
        let foreign = Arch::ALL.into_iter().find(|arch| !arch.is_host()).unwrap();
        assert!(wanted(&[Kernel::Host], &[foreign]).is_err());
    }
}
