//! The models that this server names: the aliases, and what the operator lists.
//! It must never be taken for a rule: a full id that is not here may be asked for, and the upstream decides.

use std::borrow::Cow;

use serde::Serialize;

use gaoler_policy::settings::Settings;

use super::error::ApiError;

/// Models on one page, at most: the API's own bound. It is also what a request without `limit` gets, for clients
/// of the other family know no second page.
const PAGE_MAX: usize = 1000;
/// What everybody can ask for.
pub const ALIASES: [(&str, &str); 3] =
    [("opus", "Claude Opus"), ("sonnet", "Claude Sonnet"), ("haiku", "Claude Haiku")];

/// A page of the list, in a form that both families of clients read.
#[derive(Debug, Serialize)]
pub struct Page<'a> {
    object: &'static str,
    data: Vec<Model<'a>>,
    has_more: bool,
    first_id: Option<&'a str>,
    last_id: Option<&'a str>,
}

/// One model of it.
#[derive(Debug, Serialize)]
pub struct Model<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    display_name: &'a str,
    created_at: &'static str,
    object: &'static str,
    created: u32,
    owned_by: &'static str,
}

/// `GET /v1/models`: one page.
///
/// # Errors
/// 400 for a bound that is none, or for an id that is not in the list.
pub fn page<'a>(settings: &'a Settings, query: &str) -> Result<Page<'a>, ApiError> {
    let asked = Asked::parse(query)?;
    let models = listed(settings);
    let place = |name: &str, id: &str| {
        let missing = || ApiError::invalid(format!("{name}: not an id of this list."));
        models.iter().position(|(listed, _)| *listed == id).ok_or_else(missing)
    };
    let (rows, has_more) = match (&asked.after, &asked.before) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid("after_id, before_id: send one of them."));
        }
        (None, Some(id)) => {
            let end = place("before_id", id)?;
            let begin = end.saturating_sub(asked.limit);
            (&models[begin..end], begin > 0)
        }
        (after, None) => {
            let begin = match after {
                Some(id) => place("after_id", id)? + 1,
                None => 0,
            };
            let end = models.len().min(begin.saturating_add(asked.limit));
            (&models[begin..end], end < models.len())
        }
    };
    let id = |row: Option<&(&'a str, &'a str)>| row.map(|(id, _)| *id);
    Ok(Page {
        object: "list",
        data: rows.iter().map(|(id, name)| entry(id, name)).collect(),
        has_more,
        first_id: id(rows.first()),
        last_id: id(rows.last()),
    })
}

/// `GET /v1/models/{id}`.
///
/// # Errors
/// 404 for one that is not in the list.
pub fn one<'a>(settings: &'a Settings, id: &str) -> Result<Model<'a>, ApiError> {
    match listed(settings).into_iter().find(|(listed, _)| *listed == id) {
        Some((id, name)) => Ok(entry(id, name)),
        None => Err(ApiError::new(
            404,
            "model_not_found",
            "model: not in the list of GET /v1/models. A full id that begins with claude- may be asked for all the same.",
        )),
    }
}

fn listed(settings: &Settings) -> Vec<(&str, &str)> {
    let own = settings.models.list.iter().map(|model| {
        let name = if model.display_name.is_empty() { &model.id } else { &model.display_name };
        (model.id.as_str(), name.as_str())
    });
    ALIASES.into_iter().chain(own).collect()
}

/// The API has the epoch where a day is not known, and what an alias stands for changes.
fn entry<'a>(id: &'a str, display_name: &'a str) -> Model<'a> {
    Model {
        kind: "model",
        id,
        display_name,
        created_at: "1970-01-01T00:00:00Z",
        object: "model",
        created: 0,
        owned_by: "anthropic",
    }
}

/// What a query asks for.
struct Asked<'a> {
    limit: usize,
    after: Option<Cow<'a, str>>,
    before: Option<Cow<'a, str>>,
}

impl Asked<'_> {
    /// Other fields are other clients' own, and are not looked at.
    fn parse(query: &str) -> Result<Asked<'_>, ApiError> {
        let mut asked = Asked { limit: PAGE_MAX, after: None, before: None };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match name.as_ref() {
                "limit" => {
                    let limit = value.parse().ok().filter(|limit| (1..=PAGE_MAX).contains(limit));
                    let wrong =
                        || ApiError::invalid(format!("limit: must be a whole number from 1 to {PAGE_MAX}."));
                    asked.limit = limit.ok_or_else(wrong)?;
                }
                "after_id" => asked.after = Some(value),
                "before_id" => asked.before = Some(value),
                _ => {}
            }
        }
        Ok(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_policy::settings::{ListedModel, Models};
    use serde_json::json;

    fn settings() -> Settings {
        let model = |id: &str, name: &str| ListedModel {
            id: id.into(),
            display_name: name.into(),
            ..ListedModel::default()
        };
        let list = vec![model("claude-a", "A"), model("claude-b[1m]", "")];
        Settings { models: Models { list }, ..Settings::default() }
    }

    #[test]
    fn a_page_is_what_was_asked_for_and_says_whether_there_is_more() {
        let all = ["opus", "sonnet", "haiku", "claude-a", "claude-b[1m]"];
        let rows: &[(&str, &[&str], bool)] = &[
            ("", &all, false),
            ("beta=true&limit=1000", &all, false),
            ("limit=5", &all, false),
            ("limit=4", &all[..4], true),
            ("limit=1", &all[..1], true),
            ("limit=2&after_id=opus", &all[1..3], true),
            ("after_id=haiku", &all[3..], false),
            ("after_id=claude-b%5B1m%5D", &[], false),
            ("limit=2&before_id=claude-a", &all[1..3], true),
            ("limit=3&before_id=claude-a", &all[..3], false),
            ("before_id=claude-b[1m]", &all[..4], false),
            ("before_id=opus", &[], false),
        ];
        for (query, ids, has_more) in rows {
            let settings = settings();
            let page = page(&settings, query).unwrap_or_else(|e| panic!("{query}: {}", e.message));
            let page = json!(page);
            let data = page["data"].as_array().expect("a list");
            let found: Vec<&str> = data.iter().filter_map(|model| model["id"].as_str()).collect();
            assert_eq!((found.as_slice(), &page["has_more"]), (*ids, &json!(has_more)), "{query}");
            let ends = (&page["first_id"], &page["last_id"]);
            assert_eq!(ends, (&json!(ids.first()), &json!(ids.last())), "{query}");
        }
    }

    #[test]
    fn a_query_that_cannot_be_answered_is_refused() {
        let rows = [
            ("limit=0", "limit: must be a whole number from 1 to 1000."),
            ("limit=1001", "limit: must be a whole number from 1 to 1000."),
            ("limit=-1", "limit: must be a whole number from 1 to 1000."),
            ("limit=", "limit: must be a whole number from 1 to 1000."),
            ("limit=1&limit=x", "limit: must be a whole number from 1 to 1000."),
            ("after_id=gpt-4", "after_id: not an id of this list."),
            ("before_id=", "before_id: not an id of this list."),
            ("after_id=opus&before_id=haiku", "after_id, before_id: send one of them."),
        ];
        for (query, message) in rows {
            let error = page(&settings(), query).expect_err(query);
            assert_eq!((error.status, error.message.as_str()), (400, message), "{query}");
        }
    }

    #[test]
    fn a_model_has_both_families_fields_and_a_name() {
        let settings = settings();
        let model = one(&settings, "claude-b[1m]").expect("listed");
        assert_eq!(
            json!(model),
            json!({
                "type": "model", "id": "claude-b[1m]", "display_name": "claude-b[1m]",
                "created_at": "1970-01-01T00:00:00Z", "object": "model", "created": 0, "owned_by": "anthropic",
            })
        );
        assert_eq!(one(&settings, "sonnet").expect("an alias").display_name, "Claude Sonnet");
        assert_eq!(one(&settings, "claude-c").expect_err("not listed").status, 404);
    }

    #[test]
    fn every_alias_is_one_that_a_request_may_name() {
        for (alias, _) in ALIASES {
            assert!(super::super::job::is_model(alias), "{alias}");
        }
    }
}
