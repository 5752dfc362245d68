//! Where things are for a command: the same everywhere in a root of its own, and elsewhere below the folders
//! that the run has. It must never name a place that another run could have.

use std::path::{Path, PathBuf};

use crate::template;

/// Where things are, as the command sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// The temporary home.
    pub home: PathBuf,
    /// Temporary files.
    pub tmp: PathBuf,
    /// The broker's door and what the options said.
    pub run: PathBuf,
    /// The workspace, where the command begins.
    pub workspace: PathBuf,
    /// The CLI.
    pub cli: PathBuf,
}

impl Places {
    /// In a root of its own.
    pub fn own() -> Places {
        Places {
            home: "/home/agent".into(),
            tmp: "/tmp".into(),
            run: "/run/gaoler".into(),
            workspace: "/workspace".into(),
            cli: template::CLI.into(),
        }
    }

    /// Under covers: the workspace is the tenant's at its path, or dies with the home.
    pub fn covered(workspace: Option<PathBuf>, cli: &Path) -> Places {
        let workspace = workspace.unwrap_or_else(|| "/home/agent/workspace".into());
        Places { workspace, cli: cli.into(), ..Places::own() }
    }

    /// In the host's root, below this folder of the run's own.
    pub fn below(folder: &Path, workspace: Option<PathBuf>, cli: &Path) -> Places {
        Places {
            home: folder.join("home"),
            tmp: folder.join("tmp"),
            run: folder.join("run"),
            workspace: workspace.unwrap_or_else(|| folder.join("workspace")),
            cli: cli.into(),
        }
    }

    /// The broker's door.
    pub fn door(&self) -> PathBuf {
        self.run.join("api.sock")
    }

    /// Text for the system prompt.
    pub fn system(&self) -> PathBuf {
        self.run.join("system.md")
    }

    /// The CLI's MCP servers.
    pub fn mcp(&self) -> PathBuf {
        self.run.join("mcp.json")
    }

    /// Where the CLI reads and writes its transcript: below its home, in a folder that is named after its
    /// working directory with every character that is not alphanumeric turned into a dash.
    pub fn session(&self) -> PathBuf {
        let dashed = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let name: String = self.workspace.to_string_lossy().chars().map(dashed).collect();
        self.home.join(".claude/projects").join(name)
    }

    /// The variables of the environment that name a place.
    pub fn variables(&self) -> [(&'static str, PathBuf); 4] {
        [
            ("HOME", self.home.clone()),
            ("TMPDIR", self.tmp.clone()),
            ("CLAUDE_CODE_TMPDIR", self.tmp.join("cc")),
            ("ANTHROPIC_UNIX_SOCKET", self.door()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t01_a_transcript_lies_where_the_cli_looks_for_it() {
        let own = Places::own().session();
        assert_eq!(own, Path::new("/home/agent/.claude/projects/-workspace"));
        let places = Places::below(Path::new("/s/runs/7"), Some("/s/tenants/ab/w_1".into()), Path::new("/c"));
        assert_eq!(places.session(), Path::new("/s/runs/7/home/.claude/projects/-s-tenants-ab-w-1"));
        assert_eq!(places.door(), Path::new("/s/runs/7/run/api.sock"));
    }
}
