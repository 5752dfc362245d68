//! The report of an exec run: what kept it apart, what it was allowed, what it took and how it ended.
//! It must never hold a byte that the command wrote.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use gaoler_protocol::{Exit, Layers, Level, Refused, Spawned, Violation};
use serde_json::{Map, Value, json};

use crate::{ledger, limits};

/// What was learnt of one run; each part is there as soon as the supervisor has said it.
#[derive(Debug, Default)]
pub struct Report {
    /// The level that was asked for.
    pub level: Option<Level>,
    /// The host, as tried.
    pub layers: Option<Layers>,
    /// The run's start.
    pub spawned: Option<Spawned>,
    /// Why there was none.
    pub refused: Option<Refused>,
    /// What was denied, newest count of each kind.
    pub violations: Vec<Violation>,
    /// The run's end.
    pub exit: Option<Exit>,
    /// Where its egress went, a line for each destination.
    pub egress: Vec<Map<String, Value>>,
}

impl Report {
    /// The report as JSON; `status` is what gaoler exits with.
    pub fn json(&self, status: u8) -> Value {
        let mut report = self.layers.as_ref().map_or_else(|| json!({}), crate::doctor::json);
        let parts = [
            ("status", json!(status)),
            ("level", json!(self.level.map(Level::name))),
            ("run", json!(self.spawned.map(|spawned| spawned.run.to_string()))),
            ("launch_us", json!(self.spawned.map(|spawned| spawned.launch_us))),
            ("limits", json!(self.spawned.map(|spawned| limits::json(&spawned.limits)))),
            ("refused", json!(self.refused.map(refused))),
            ("violations", self.violations.iter().map(violation).collect()),
            ("exit", json!(self.exit.map(exit))),
            ("hit", json!(self.exit.as_ref().map(ledger::hit).unwrap_or_default())),
            ("egress", json!(self.egress)),
            ("rusage", json!(self.exit.map(rusage))),
            ("peaks", json!(self.exit.map(peaks))),
        ];
        for (name, part) in parts {
            report[name] = part;
        }
        report
    }
}

fn refused(refused: Refused) -> Value {
    json!({ "reason": refused.reason.name(), "step": refused.step, "errno": refused.errno })
}

fn violation(violation: &Violation) -> Value {
    json!({ "what": violation.what.name(), "count": violation.count })
}

fn exit(exit: Exit) -> Value {
    json!({
        "reason": exit.reason.name(), "code": exit.code, "signal": exit.signal,
        "quarantined": exit.quarantined, "teardown_us": exit.teardown_us,
    })
}

fn rusage(exit: Exit) -> Value {
    json!({
        "wall_us": exit.wall_us, "user_us": exit.user_us, "system_us": exit.system_us,
        "maxrss_kib": exit.maxrss_kib,
    })
}

fn peaks(exit: Exit) -> Value {
    json!({
        "memory_bytes": exit.memory_peak, "tasks": exit.tasks_peak, "oom_kills": exit.oom_kills,
        "tasks_denied": exit.tasks_denied,
    })
}

/// Where a report will be: opened before the run, so that a bad path costs nothing, and put into place as a
/// whole after it.
pub struct ReportFile {
    path: PathBuf,
    file: tempfile::NamedTempFile,
}

impl ReportFile {
    /// Makes the file beside `path`.
    ///
    /// # Errors
    /// A folder that is missing or cannot be written.
    pub fn prepare(path: &Path) -> Result<ReportFile, String> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let readable = std::fs::Permissions::from_mode(0o644);
        let file =
            tempfile::Builder::new().prefix(".gaoler-report-").permissions(readable).tempfile_in(folder);
        let file = file.map_err(|error| {
            format!("--report {}: {error}; give a path in a folder that exists", path.display())
        })?;
        Ok(ReportFile { path: path.to_owned(), file })
    }

    /// Writes the report and puts it into place.
    ///
    /// # Errors
    /// Those of write(2) and rename(2).
    pub fn write(mut self, report: &Value) -> Result<(), String> {
        let place = self.path.display().to_string();
        let failed = |error: std::io::Error| format!("--report {place}: {error}");
        writeln!(self.file, "{report:#}").map_err(failed)?;
        self.file.persist(&self.path).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_protocol::{Denial, RunId};

    #[test]
    fn a_report_is_put_into_place_as_a_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("report.json");
        let file = ReportFile::prepare(&path).expect("prepared");
        assert!(!path.exists());
        let run = RunId([7; 16]);
        let report = Report {
            refused: Some(Refused { run, reason: gaoler_protocol::Refusal::Busy, step: 0, errno: 0 }),
            violations: vec![Violation { run, what: Denial::Path, count: 2 }],
            ..Report::default()
        };
        file.write(&report.json(125)).expect("written");
        let read: Value = serde_json::from_slice(&std::fs::read(&path).expect("there")).expect("JSON");
        assert_eq!(read["status"], 125);
        assert_eq!(read["refused"], json!({ "reason": "busy", "step": 0, "errno": 0 }));
        assert_eq!(read["violations"], json!([{ "what": "path", "count": 2 }]));
        assert_eq!(read["exit"], Value::Null);
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 1);
    }

    #[test]
    fn a_missing_folder_is_said_before_the_run() {
        let wrong = ReportFile::prepare(Path::new("/nowhere/report.json")).err().expect("missing");
        assert!(wrong.starts_with("--report /nowhere/report.json: No such file"), "{wrong}");
    }
}
