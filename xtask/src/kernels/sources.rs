//! Where apt gets packages from, in both formats that it reads.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// What apt's files of sources say.
#[derive(Debug, Default)]
pub(super) struct Texts {
    /// Stanzas of fields, as in `debian.sources`.
    stanzas: String,
    /// A source per line, as in `sources.list`.
    lines: String,
}

/// Reads the machine's own.
pub(super) fn read() -> Result<Texts> {
    let mut texts = Texts::default();
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(folder.flatten().map(|entry| entry.path()));
    }
    for file in files.into_iter().filter(|file| file.is_file()) {
        let extension = file.extension().unwrap_or_default();
        if extension != "sources" && extension != "list" {
            continue;
        }
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let all = if extension == "list" {
            &mut texts.lines
        } else {
            &mut texts.stanzas
        };
        all.push_str(&text);
        // The next file begins a stanza of its own.
        all.push_str("\n\n");
    }
    Ok(texts)
}

/// Stanzas with the same archives as those of the suite `own`, for the suite `wanted`. Only the suite itself, its
/// updates and its security updates: what others serve for `own` they may not have for `wanted`.
pub(super) fn of_suite(texts: &Texts, own: &str, wanted: &str) -> String {
    let suites_of = |suites: &str| {
        let renamed: Vec<_> = suites
            .split_whitespace()
            .filter_map(|suite| suite.strip_prefix(own))
            .filter(|kind| ["", "-updates", "-security"].contains(kind))
            .map(|kind| format!("{wanted}{kind}"))
            .collect();
        (!renamed.is_empty()).then(|| renamed.join(" "))
    };
    let mut found = String::new();
    let mut add = |uris: &str, suites: Option<String>, components: &str, signed_by: &str| {
        if let Some(suites) = suites
            && components.split_whitespace().any(|component| component == "main")
        {
            found.push_str(&format!(
                "Types: deb\nURIs: {uris}\nSuites: {suites}\nComponents: main\n{signed_by}\n"
            ));
        }
    };
    for stanza in split(&texts.stanzas) {
        let field = |name: &str| field(&stanza, name).unwrap_or_default();
        if !field("Types").split_whitespace().any(|kind| kind == "deb")
            || field("Enabled").trim().eq_ignore_ascii_case("no")
        {
            continue;
        }
        let key = field("Signed-By");
        let signed_by = if key.is_empty() {
            String::new()
        } else {
            format!("Signed-By:{key}\n")
        };
        add(
            field("URIs").trim(),
            suites_of(&field("Suites")),
            &field("Components"),
            &signed_by,
        );
    }
    for line in texts.lines.lines() {
        let Some(rest) = line.trim().strip_prefix("deb ") else {
            continue;
        };
        let (options, rest) = match rest
            .trim_start()
            .strip_prefix('[')
            .and_then(|rest| rest.split_once(']'))
        {
            Some((options, rest)) => (options, rest),
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else {
            continue;
        };
        let components: Vec<_> = words.take_while(|word| !word.starts_with('#')).collect();
        let signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="))
            .map_or_else(String::new, |key| format!("Signed-By: {key}\n"));
        add(uri, suites_of(suite), &components.join(" "), &signed_by);
    }
    found
}

/// The stanzas without comments.
fn split(text: &str) -> Vec<String> {
    let mut stanzas = vec![String::new()];
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if line.trim().is_empty() {
            stanzas.push(String::new());
        } else if let Some(last) = stanzas.last_mut() {
            last.push_str(line);
            last.push('\n');
        }
    }
    stanzas.retain(|stanza| !stanza.is_empty());
    stanzas
}

/// A field's value with the lines that continue it: a key may stand there in full.
fn field(stanza: &str, name: &str) -> Option<String> {
    let mut lines = stanza.lines();
    let first = lines.find_map(|line| {
        let (have, value) = line.split_once(':')?;
        have.eq_ignore_ascii_case(name).then_some(value)
    })?;
    let more = lines.take_while(|line| line.starts_with([' ', '\t']));
    Some(std::iter::once(first).chain(more).collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::{Texts, of_suite};

    #[test]
    fn the_same_archives_for_another_suite() {
        let texts = Texts {
            stanzas: "Types: deb deb-src\n# a comment\nURIs: http://mirror.example/debian\n\
                      Suites: bookworm bookworm-updates bookworm-backports\nComponents: main contrib\n\
                      Signed-By: /keys/debian.gpg\n\n\
                      Types: deb\nURIs: http://other.example\nSuites: nodistro\nComponents: main\n\n\
                      Types: deb\nEnabled: no\nURIs: http://off.example\nSuites: bookworm\nComponents: main\n\n\
                      Types: deb\nURIs: http://docker.example\nSuites: bookworm\nComponents: stable\n"
                .to_owned(),
            lines: "deb [arch=amd64 signed-by=/k.gpg] http://security.example bookworm-security main # why\n\
                    deb-src http://mirror.example bookworm main\n# deb http://no.example bookworm main\n"
                .to_owned(),
        };
        assert_eq!(
            of_suite(&texts, "bookworm", "trixie"),
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie trixie-updates\nComponents: main\n\
             Signed-By: /keys/debian.gpg\n\n\
             Types: deb\nURIs: http://security.example\nSuites: trixie-security\nComponents: main\n\
             Signed-By: /k.gpg\n\n"
        );
        assert_eq!(of_suite(&texts, "bullseye", "trixie"), "");
    }

    #[test]
    fn a_key_may_stand_in_the_file() {
        let texts = Texts {
            stanzas: "Types: deb\nURIs: http://a.example\nSuites: bookworm\nComponents: main\nSigned-By:\n \
                      -----BEGIN\n .\n -----END\n"
                .to_owned(),
            lines: String::new(),
        };
        assert!(
            of_suite(&texts, "bookworm", "bullseye").ends_with("Signed-By:\n -----BEGIN\n .\n -----END\n\n")
        );
    }
}
