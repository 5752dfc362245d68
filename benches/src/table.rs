//! Measured times of several contenders, and their ratios to the one that matters.
//! It must never show a ratio without the two figures that it is made of.

use std::time::Duration;

use serde_json::{Value, json};

/// What one contender took, one entry a round.
pub struct Row {
    /// Who.
    pub name: &'static str,
    /// To the first byte of its answer.
    pub first: Vec<Duration>,
    /// To its end, everything cleaned up.
    pub end: Vec<Duration>,
}

impl Row {
    /// Nothing yet.
    pub fn new(name: &'static str) -> Row {
        Row { name, first: Vec::new(), end: Vec::new() }
    }
}

/// Contenders of one run; the first is ours, and ratios are ours to theirs.
pub struct Table {
    /// What was measured.
    pub title: String,
    /// Who took part.
    pub rows: Vec<Row>,
}

impl Table {
    /// For programs; milliseconds.
    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "name": row.name, "rounds": row.end.len(),
                    "first_p50_ms": at(&row.first, 50), "first_p99_ms": at(&row.first, 99),
                    "end_p50_ms": at(&row.end, 50), "end_p99_ms": at(&row.end, 99),
                    "first_p50_ratio": ratio(&self.rows[0].first, &row.first),
                    "end_p50_ratio": ratio(&self.rows[0].end, &row.end),
                })
            })
            .collect();
        json!({ "title": self.title, "rows": rows })
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.title)?;
        let heads = ["first p50", "p99", "end p50", "p99", "ours/its first", "end"];
        writeln!(
            f,
            "{:<22}{:>10}{:>9}{:>10}{:>9}{:>16}{:>7}",
            "ms", heads[0], heads[1], heads[2], heads[3], heads[4], heads[5]
        )?;
        for row in &self.rows {
            writeln!(
                f,
                "{:<22}{:>10.2}{:>9.2}{:>10.2}{:>9.2}{:>16.2}{:>7.2}",
                row.name,
                at(&row.first, 50),
                at(&row.first, 99),
                at(&row.end, 50),
                at(&row.end, 99),
                ratio(&self.rows[0].first, &row.first),
                ratio(&self.rows[0].end, &row.end)
            )?;
        }
        Ok(())
    }
}

/// The percentile of these values by nearest rank.
pub fn percentile(mut values: Vec<f64>, percent: usize) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// The percentile of these times, in milliseconds.
pub fn at(times: &[Duration], percent: usize) -> f64 {
    percentile(times.iter().map(|time| time.as_secs_f64() * 1000.0).collect(), percent)
}

/// The ratio of their medians.
pub fn ratio(ours: &[Duration], theirs: &[Duration]) -> f64 {
    at(ours, 50) / at(theirs, 50)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let times: Vec<Duration> = (1..=200).rev().map(Duration::from_millis).collect();
        assert_eq!((at(&times, 50), at(&times, 99)), (100.0, 198.0));
        assert_eq!(at(&times[..1], 99), 200.0);
        assert!(at(&[], 50).is_nan());
        assert_eq!(ratio(&times[100..], &times), 0.5);
    }
}
