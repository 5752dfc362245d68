//! How one level's file builds on another's: it says only what differs, and each difference has its reason.
//! It must never keep a row that the file takes away, nor take a difference for a slip: a row that is not there
//! cannot be removed.

use toml::{Table, Value};

use crate::Result;

/// What names a row, in the order in which it is looked for.
const KEYS: [&str; 7] = ["method", "path", "name", "host", "prefix", "field", "kind"];

/// The text of a level, and of those that it extends, as one table.
///
/// # Errors
/// What is not TOML, what changes without a reason, and what takes away what is not there.
pub fn extended(text: &str, read: impl Fn(&str) -> Result<String>) -> Result<Table> {
    let mut table = parse(text)?;
    let Some(base) = table.remove("extends") else { return Ok(table) };
    let base = base.as_str().ok_or("extends: it must name a level")?.to_owned();
    let mut whole = parse(&read(&base)?)?;
    if whole.contains_key("extends") {
        return Err(format!(
            "extends: {base} extends another level itself: one step can be read, two cannot"
        ));
    }
    merge(&mut whole, table, "the level")?;
    Ok(whole)
}

fn parse(text: &str) -> Result<Table> {
    text.parse().map_err(|error: toml::de::Error| error.to_string())
}

/// Tables by key, lists of rows row by row, anything else as a whole.
fn merge(into: &mut Table, changes: Table, place: &str) -> Result<()> {
    for (key, change) in changes {
        let here = format!("{place}, {key}");
        match (into.get_mut(&key), change) {
            (Some(Value::Table(old)), Value::Table(new)) => {
                if !new.contains_key("why") {
                    return Err(format!("{here}: a change without a reason"));
                }
                merge(old, new, &here)?;
            }
            (Some(Value::Array(old)), Value::Array(new)) if new.iter().all(Value::is_table) => {
                new.into_iter().try_for_each(|row| place_row(old, row, &here))?;
            }
            (_, change) => {
                into.insert(key, change);
            }
        }
    }
    Ok(())
}

/// Takes a row away, puts it where one of its name was, or adds it.
fn place_row(rows: &mut Vec<Value>, mut row: Value, place: &str) -> Result<()> {
    let removes = row.as_table_mut().and_then(|row| row.remove("remove"));
    let at = rows.iter().position(|old| KEYS.iter().all(|key| old.get(*key) == row.get(*key)));
    match (removes, at) {
        (None, Some(at)) => rows[at] = row,
        (None, None) => rows.push(row),
        (Some(Value::Boolean(true)), Some(at)) if reasoned(&row) => {
            rows.remove(at);
        }
        (Some(Value::Boolean(true)), Some(_)) => {
            return Err(format!("{place}: a removal without a reason: {row}"));
        }
        (Some(Value::Boolean(true)), None) => {
            return Err(format!("{place}: nothing to remove: {row}"));
        }
        (Some(_), _) => return Err(format!("{place}: remove is true or not there: {row}")),
    }
    Ok(())
}

fn reasoned(row: &Value) -> bool {
    row.get("why").and_then(Value::as_str).is_some_and(|why| !why.trim().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#"
        level = "base"
        [limits]
        tasks = 5
        wall_ms = 6
        why = "first"
        [[env]]
        name = "A"
        value = "1"
        why = "a"
        [[env]]
        name = "B"
        value = "2"
        why = "b"
    "#;

    fn check(text: &str, expected: std::result::Result<&str, &str>) {
        let found = extended(text, |_| Ok(BASE.into())).map(|table| Value::Table(table).to_string());
        match expected {
            Ok(whole) => assert_eq!(found, Ok(Value::Table(parse(whole).unwrap()).to_string()), "{text}"),
            Err(part) => assert!(found.clone().is_err_and(|why| why.contains(part)), "{text}: {found:?}"),
        }
    }

    #[test]
    fn t06_a_level_says_only_what_differs_and_why() {
        check(BASE, Ok(BASE));
        check("extends = 'base'", Ok(BASE));
        check(
            "extends = 'base'\nlevel = 'x'\n[limits]\ntasks = 1\nwhy = 'less'\n[[env]]\nname = 'B'\nvalue = '3'\nwhy = 'c'\n\
             [[env]]\nname = 'A'\nremove = true\nwhy = 'not here'",
            Ok(
                "level = 'x'\n[limits]\ntasks = 1\nwall_ms = 6\nwhy = 'less'\n[[env]]\nname = 'B'\nvalue = '3'\nwhy = 'c'",
            ),
        );
        check("extends = 'base'\n[limits]\ntasks = 1", Err("a change without a reason"));
        check("extends = 'base'\n[[env]]\nname = 'A'\nremove = true", Err("a removal without a reason"));
        check("extends = 'base'\n[[env]]\nname = 'C'\nremove = true\nwhy = 'c'", Err("nothing to remove"));
        check(
            "extends = 'base'\n[[env]]\nname = 'A'\nremove = 1\nwhy = 'c'",
            Err("remove is true or not there"),
        );
        check("extends = 1", Err("it must name a level"));
        let twice = extended("extends = 'b'", |_| Ok("extends = 'a'".into()));
        assert!(twice.is_err_and(|why| why.contains("extends another level itself")));
    }
}
