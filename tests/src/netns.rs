//! Network namespaces with a name, as `ip netns` makes them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use crate::shell;

/// A network namespace, deleted when dropped. Processes inside keep it alive for as long as they run.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes one, with its loopback up.
    pub fn create(name: &str) -> Result<Self> {
        shell::output(Command::new("ip").args(["netns", "add", name]))?;
        let netns = Self {
            name: name.to_owned(),
        };
        shell::ip(name, &["link set lo up".to_owned()])?;
        Ok(netns)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the namespace is bound, for a workload document.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// What programs inside find as `/etc/resolv.conf`.
    pub fn set_resolv_conf(&self, text: &str) -> Result<()> {
        let folder = etc(&self.name);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("resolv.conf"), text)?;
        Ok(())
    }

    /// A program that will run inside.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program.as_ref());
        command
    }

    /// Runs `work` in a thread of its own inside. Sockets that it makes stay inside, wherever they are used.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(self.path()).with_context(|| format!("no namespace {}", self.name))?;
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&file, CloneFlags::CLONE_NEWNET).context("cannot enter the namespace")?;
                    Ok(work())
                })
                .join()
                .map_err(|panic| {
                    let text = panic.downcast_ref::<String>().map(String::as_str);
                    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                    anyhow!("inside {}: {}", self.name, text.unwrap_or("panicked"))
                })?
        })
    }

    /// Deletes a namespace that may or may not be there.
    pub(crate) fn delete(name: &str) {
        let _deleted = shell::raw(Command::new("ip").args(["netns", "delete", name]));
        let _removed = fs::remove_dir_all(etc(name));
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        Self::delete(&self.name);
    }
}

/// `ip netns exec` binds the files of this folder over those of `/etc`.
fn etc(name: &str) -> PathBuf {
    Path::new("/etc/netns").join(name)
}
