//! `agent.yaml`: the agent's own configuration. Every field has a default; an unknown one is an error.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use super::Settings;
use super::check::{DNS_SUBDOMAIN, Issue, Issues, duration, is_dns_subdomain, typed};
use super::document::parse_single;
use super::read::read_text;
use crate::log_filter;

/// The configuration in force; all paths are absolute or relative to the working directory.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentConfig {
    pub node: String,
    pub trust_domain: String,
    pub cluster_domain: String,
    /// Files and folders of resources.
    pub files: Vec<PathBuf>,
    pub ca_directory: PathBuf,
    pub admin: SocketAddr,
    pub metrics: SocketAddr,
    pub state_dir: PathBuf,
    pub bpffs: PathBuf,
    /// Of the data path; `None`: what the CPUs ask for.
    pub threads: Option<usize>,
    /// The kernel encrypts what goes between agents, where it can.
    pub kernel_tls: bool,
    pub access_log: AccessLogFormat,
    pub log_format: LogFormat,
    /// A filter as in `info,mesh_agent::proxy=debug`.
    pub log_level: String,
    /// How long a stopping agent lets requests finish.
    pub drain: Duration,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessLogFormat {
    #[default]
    Off,
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// What an agent configuration that cannot be used is told.
#[derive(Debug, thiserror::Error)]
#[error("{}", .findings.join("\n"))]
pub struct InvalidConfig {
    /// One line each: `FILE: field.path: message`.
    pub findings: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawConfig {
    node: Option<String>,
    trust_domain: String,
    cluster_domain: String,
    resources: RawResources,
    identity: RawIdentity,
    admin: RawAddress,
    metrics: RawAddress,
    state_dir: PathBuf,
    bpffs: PathBuf,
    threads: Option<Value>,
    kernel_tls: bool,
    access_log: RawAccessLog,
    log: RawLog,
    drain: RawDrain,
}

impl Default for RawConfig {
    fn default() -> Self {
        Self {
            node: None,
            trust_domain: "cluster.local".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            resources: RawResources::default(),
            identity: RawIdentity::default(),
            admin: RawAddress::default(),
            metrics: RawAddress::default(),
            state_dir: "/var/lib/mesh-agent".into(),
            bpffs: "/sys/fs/bpf/mesh-agent".into(),
            threads: None,
            kernel_tls: false,
            access_log: RawAccessLog::default(),
            log: RawLog::default(),
            drain: RawDrain::default(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawResources {
    files: Vec<PathBuf>,
}

impl Default for RawResources {
    fn default() -> Self {
        Self {
            files: vec!["./resources".into()],
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawIdentity {
    ca: RawCa,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawCa {
    directory: PathBuf,
}

impl Default for RawCa {
    fn default() -> Self {
        Self {
            directory: "./ca".into(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawAddress {
    address: Option<String>,
}

/// The admin page shows much and is for the machine's own users; metrics are scraped from elsewhere.
const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15000);
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 15020);

/// More than any node has CPUs to spare for it.
const MAX_THREADS: usize = 1024;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawAccessLog {
    format: AccessLogFormat,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawLog {
    level: String,
    format: LogFormat,
}

impl Default for RawLog {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::default(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawDrain {
    deadline: Value,
}

impl Default for RawDrain {
    fn default() -> Self {
        Self {
            deadline: "30s".into(),
        }
    }
}

impl AgentConfig {
    /// Reads the file, or takes the defaults without one. `node_name` is `$NODE_NAME`.
    pub fn load(file: Option<&Path>, node_name: Option<&str>) -> Result<Self, InvalidConfig> {
        let Some(file) = file else {
            return Self::parse("", Path::new("agent.yaml"), node_name);
        };
        let text = read_text(file).map_err(|message| InvalidConfig {
            findings: vec![format!("{} {message}", file.display())],
        })?;
        Self::parse(&text, file, node_name)
    }

    fn parse(text: &str, file: &Path, node_name: Option<&str>) -> Result<Self, InvalidConfig> {
        let mut issues = Issues::default();
        let config = raw(text).map(|raw| Self::check(raw, file, node_name, &mut issues));
        let config = config.map_err(|issue| issues.push(issue));
        match config {
            Ok(config) if !issues.has_errors() => Ok(config),
            _ => Err(InvalidConfig {
                findings: issues
                    .into_vec()
                    .into_iter()
                    .map(|issue| match issue.path.as_str() {
                        "" => format!("{}: {}", file.display(), issue.message),
                        path => format!("{}: {path}: {}", file.display(), issue.message),
                    })
                    .collect(),
            }),
        }
    }

    fn check(raw: RawConfig, file: &Path, node_name: Option<&str>, issues: &mut Issues) -> Self {
        let base = file.parent().unwrap_or_else(|| Path::new(""));
        let whole = |path: &Path| absolute(base.join(path));
        let node = raw
            .node
            .or_else(|| node_name.filter(|name| !name.is_empty()).map(str::to_owned))
            .unwrap_or_else(hostname);
        for (field, name) in [
            ("node", &node),
            ("trustDomain", &raw.trust_domain),
            ("clusterDomain", &raw.cluster_domain),
        ] {
            if !is_dns_subdomain(name) {
                issues.error(field, format!("{name:?} is not a name; {DNS_SUBDOMAIN}"));
            }
        }
        if let Err(error) = log_filter::parse(&raw.log.level) {
            issues.error("log.level", error.to_string());
        }
        let threads = raw.threads.map(|threads| {
            let count = threads.as_u64().and_then(|count| usize::try_from(count).ok());
            count
                .filter(|count| (1..=MAX_THREADS).contains(count))
                .ok_or(threads)
        });
        let threads = threads.transpose().unwrap_or_else(|other| {
            issues.error(
                "threads",
                format!("`{other}` is not a number from 1 to {MAX_THREADS}"),
            );
            None
        });
        let drain = deadline(&raw.drain.deadline).unwrap_or_else(|message| {
            issues.error("drain.deadline", message);
            Duration::ZERO
        });
        let mut address = |field, raw: RawAddress, default: SocketAddr| {
            let Some(text) = raw.address else { return default };
            text.parse().unwrap_or_else(|_| {
                issues.error(field, format!("`{text}` is not IP:PORT; write as in {default}"));
                default
            })
        };
        let admin = address("admin.address", raw.admin, ADMIN);
        let metrics = address("metrics.address", raw.metrics, METRICS);
        if admin == metrics && admin.port() != 0 {
            issues.error(
                "metrics.address",
                format!("{metrics} is the admin.address already"),
            );
        }
        Self {
            node,
            trust_domain: raw.trust_domain,
            cluster_domain: raw.cluster_domain,
            files: raw.resources.files.iter().map(|file| whole(file)).collect(),
            ca_directory: whole(&raw.identity.ca.directory),
            admin,
            metrics,
            state_dir: whole(&raw.state_dir),
            bpffs: whole(&raw.bpffs),
            threads,
            kernel_tls: raw.kernel_tls,
            access_log: raw.access_log.format,
            log_format: raw.log.format,
            log_level: raw.log.level,
            drain,
        }
    }

    pub fn settings(&self) -> Settings {
        Settings {
            node: self.node.as_str().into(),
            trust_domain: self.trust_domain.as_str().into(),
            cluster_domain: self.cluster_domain.as_str().into(),
        }
    }
}

fn raw(text: &str) -> Result<RawConfig, Issue> {
    let value = match parse_single(text)? {
        // A file with nothing but comments.
        Value::Null => Value::Object(serde_json::Map::new()),
        value => value,
    };
    typed(value, "")
}

/// One spelling, however the file that names it was named: events of files and the last run's state are told by path.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

fn deadline(value: &Value) -> Result<Duration, String> {
    match value {
        Value::String(text) => duration(text),
        other => Err(format!("`{other}` has no unit; write as in 30s")),
    }
}

/// Kubernetes names nodes in lower case, whatever the machine thinks.
fn hostname() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<AgentConfig, String> {
        AgentConfig::parse(text, Path::new("/etc/mesh/agent.yaml"), Some("node-a"))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn every_field_has_a_default() {
        let config = parse("# nothing\n").unwrap();
        assert_eq!(config, parse("").unwrap());
        assert_eq!(config.node, "node-a");
        assert_eq!(config.files, [Path::new("/etc/mesh/./resources")]);
        assert_eq!(config.admin.to_string(), "127.0.0.1:15000");
        assert_eq!(config.metrics.to_string(), "0.0.0.0:15020");
        assert_eq!(config.state_dir, Path::new("/var/lib/mesh-agent"));
        assert_eq!(config.threads, None);
        assert!(!config.kernel_tls);
        assert_eq!(config.drain, Duration::from_secs(30));
        let named = AgentConfig::parse("", Path::new("agent.yaml"), None).unwrap();
        assert!(is_dns_subdomain(&named.node), "{}", named.node);
    }

    #[test]
    fn a_path_has_one_spelling() {
        let here = std::env::current_dir().unwrap();
        for file in ["agent.yaml", "./agent.yaml"] {
            let config = AgentConfig::parse("stateDir: ./state", Path::new(file), Some("node-a")).unwrap();
            // As texts: paths are equal also where one says `.` more.
            assert_eq!(config.files[0].as_os_str(), here.join("resources").as_os_str());
            assert_eq!(config.state_dir.as_os_str(), here.join("state").as_os_str());
        }
    }

    #[test]
    fn fields_are_read() {
        let text = "
node: b
trustDomain: example.org
clusterDomain: c.local
resources: {files: [/r, x.yaml]}
identity: {ca: {directory: /ca}}
admin: {address: '127.0.0.1:1'}
metrics: {address: '[::1]:2'}
stateDir: state
bpffs: /sys/fs/bpf/b
threads: 3
kernelTls: true
accessLog: {format: json}
log: {level: 'warn,mesh_agent=debug', format: json}
drain: {deadline: 1m}
";
        let config = parse(text).unwrap();
        let expected = AgentConfig {
            node: "b".into(),
            trust_domain: "example.org".into(),
            cluster_domain: "c.local".into(),
            files: vec!["/r".into(), "/etc/mesh/x.yaml".into()],
            ca_directory: "/ca".into(),
            admin: "127.0.0.1:1".parse().unwrap(),
            metrics: "[::1]:2".parse().unwrap(),
            state_dir: "/etc/mesh/state".into(),
            bpffs: "/sys/fs/bpf/b".into(),
            threads: Some(3),
            kernel_tls: true,
            access_log: AccessLogFormat::Json,
            log_format: LogFormat::Json,
            log_level: "warn,mesh_agent=debug".into(),
            drain: Duration::from_secs(60),
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            (
                "nod: a",
                "/etc/mesh/agent.yaml: nod: unknown field `nod`, expected one of `node`",
            ),
            ("identity: {ca: {dir: x}}", "identity.ca.dir: unknown field"),
            (
                "admin: {address: localhost}",
                "admin.address: `localhost` is not IP:PORT; write as in 127.0.0.1:15000",
            ),
            (
                "{admin: {address: '127.0.0.1:1'}, metrics: {address: '127.0.0.1:1'}}",
                "metrics.address: 127.0.0.1:1 is the admin.address already",
            ),
            (
                "accessLog: {format: xml}",
                "accessLog.format: unknown variant `xml`, expected one of `off`, `text`, `json`",
            ),
            (
                "drain: {deadline: 30}",
                "drain.deadline: `30` has no unit; write as in 30s",
            ),
            (
                "drain: {deadline: 30x}",
                "drain.deadline: `30x` is not a duration; allowed: ",
            ),
            ("threads: 0", "threads: `0` is not a number from 1 to 1024"),
            ("threads: -1", "threads: `-1` is not a number from 1 to 1024"),
            ("kernelTls: maybe", "kernelTls: invalid type: string"),
            ("node: A_b", "node: \"A_b\" is not a name; allowed: "),
            (
                "log: {level: debgu}",
                "/etc/mesh/agent.yaml: log.level: `debgu` is no level; use off, error, warn, info, debug or trace",
            ),
            (
                "log: {level: 'info,mesh_agent'}",
                "log.level: `mesh_agent` is no level",
            ),
            ("log: {level: 'a b=info'}", "log.level: `a b` is no target"),
            ("node: [", "line 1: not YAML: "),
            (
                "- a",
                "/etc/mesh/agent.yaml: invalid type: sequence, expected a map",
            ),
            (
                "log: [debug, json]",
                "log: invalid type: sequence, expected a map",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let both = parse("node: A\ntrustDomain: B\n").unwrap_err();
        assert_eq!(both.lines().count(), 2, "{both}");
    }
}
