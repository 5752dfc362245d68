//! What tokens cost, as the operator has set it: by the model that egress saw in each request.
//! It must never price a token at less than what is known of it: what nobody can say costs what the dearest model does.

use serde_json::{Map, Value};

use gaoler_ledger_wire::Counted;
use gaoler_policy::settings::Price as Listed;

/// Dollars of a million tokens are millionths of a dollar of one; here in thousandths of those.
const THOUSAND: f64 = 1000.0;

/// Tokens of one kind each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Tokens([u64; 4]);

impl Tokens {
    fn of(counted: &Counted) -> Tokens {
        let Counted { input_tokens, output_tokens, cache_write_tokens, cache_read_tokens, .. } = *counted;
        Tokens([input_tokens, output_tokens, cache_write_tokens, cache_read_tokens])
    }

    /// Of egress' own line of a model.
    fn said(line: &Map<String, Value>) -> Tokens {
        let keys = ["input_tokens", "output_tokens", "cache_write_tokens", "cache_read_tokens"];
        Tokens(keys.map(|key| line.get(key).and_then(Value::as_u64).unwrap_or_default()))
    }
}

/// The sum of egress' lines of the models.
pub fn counted(models: &[Map<String, Value>]) -> Counted {
    let sum = models.iter().map(Tokens::said).fold(Tokens::default(), |sum, more| {
        Tokens(std::array::from_fn(|at| sum.0[at].saturating_add(more.0[at])))
    });
    let Tokens([input_tokens, output_tokens, cache_write_tokens, cache_read_tokens]) = sum;
    Counted { input_tokens, output_tokens, cache_write_tokens, cache_read_tokens, ..Counted::default() }
}

/// What a token of each kind costs, in thousandths of a millionth of a dollar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price([u64; 4]);

impl Price {
    fn of(listed: &Listed) -> Price {
        let each = [listed.input, listed.output, listed.cache_write, listed.cache_read];
        // The settings were checked: none is negative or beyond what fits.
        Price(each.map(|usd| (usd * THOUSAND).round() as u64))
    }

    /// Thousandths of a millionth.
    fn cost(&self, tokens: &Tokens) -> u128 {
        self.0.iter().zip(tokens.0).map(|(price, tokens)| u128::from(*price) * u128::from(tokens)).sum()
    }

    fn dearest(&self) -> u64 {
        self.0.into_iter().max().unwrap_or_default()
    }

    /// What so many tokens cost at most, in millionths of a dollar.
    pub fn most(&self, tokens: u64) -> u64 {
        rounded(u128::from(self.dearest()) * u128::from(tokens))
    }
}

/// Up: what costs something is never nothing.
fn rounded(thousandths: u128) -> u64 {
    u64::try_from(thousandths.div_ceil(1000)).unwrap_or(u64::MAX)
}

/// The prices.
#[derive(Debug, Default)]
pub struct Prices(Vec<(String, Price)>);

impl Prices {
    /// As the settings have them.
    pub fn new(list: &[Listed]) -> Prices {
        Prices(list.iter().map(|listed| (listed.model.clone(), Price::of(listed))).collect())
    }

    /// Whether there are any.
    pub fn are_set(&self) -> bool {
        !self.0.is_empty()
    }

    /// The price of a model: that of the longest beginning of its name. Of an alias, and of the CLI's own choice, the
    /// dearest of those that it may become.
    pub fn of(&self, model: &str) -> Option<Price> {
        if model.starts_with("claude-") {
            let known = self.0.iter().filter(|(prefix, _)| model.starts_with(prefix.as_str()));
            return known.max_by_key(|(prefix, _)| prefix.len()).map(|(_, price)| *price);
        }
        let family = model.trim_end_matches("[1m]");
        self.dearest_of(|name| name.contains(family))
    }

    fn dearest_of(&self, is: impl Fn(&str) -> bool) -> Option<Price> {
        let known = self.0.iter().filter(|(name, _)| is(name));
        known.map(|(_, price)| *price).max_by_key(Price::dearest)
    }

    /// The highest of each kind.
    fn dearest(&self) -> Price {
        let most = |at: usize| self.0.iter().map(|(_, price)| price.0[at]).max().unwrap_or_default();
        Price([most(0), most(1), most(2), most(3)])
    }

    /// What a run cost, in millionths of a dollar: what egress counted, each model's part at its price. `models` are
    /// egress' own lines of them. What they do not name, or has no price, costs what the dearest model does.
    pub fn cost(&self, counted: &Counted, models: &[Map<String, Value>]) -> u64 {
        let dearest = self.dearest();
        let mut left = Tokens::of(counted);
        let mut sum = 0;
        for line in models {
            let Some(name) = line.get("model").and_then(Value::as_str) else { continue };
            let said = Tokens::said(line).0;
            // A line never takes more than there is.
            let part = Tokens(std::array::from_fn(|at| said[at].min(left.0[at])));
            left = Tokens(std::array::from_fn(|at| left.0[at] - part.0[at]));
            let price = Some(name).filter(|name| name.starts_with("claude-")).and_then(|name| self.of(name));
            sum += price.unwrap_or(dearest).cost(&part);
        }
        rounded(sum + dearest.cost(&left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn listed(model: &str, input: f64, output: f64) -> Listed {
        Listed { model: model.into(), input, output, cache_write: input * 1.25, cache_read: input / 10.0 }
    }

    fn prices() -> Prices {
        Prices::new(&[
            listed("claude-sonnet-", 3.0, 15.0),
            listed("claude-haiku-", 1.0, 5.0),
            listed("claude-haiku-9", 2.0, 4.0),
            listed("claude-opus-", 5.0, 25.0),
        ])
    }

    #[test]
    fn a_model_has_the_price_of_its_name_and_an_alias_of_what_it_may_become() {
        let prices = prices();
        let output = |model: &str| prices.of(model).map(|price| price.0[1]);
        let rows = [
            ("claude-haiku-4-5", Some(5000)),
            ("claude-haiku-9-1", Some(4000)),
            ("claude-other-1", None),
            ("claude-opus-4-8[1m]", Some(25_000)),
            ("haiku", Some(5000)),
            ("sonnet[1m]", Some(15_000)),
            ("fable", None),
            ("", Some(25_000)),
        ];
        rows.into_iter().for_each(|(model, expected)| assert_eq!(output(model), expected, "{model}"));
        assert_eq!(Prices::default().of(""), None);
        assert_eq!(prices.of("sonnet").map(|price| price.most(1000)), Some(15_000));
    }

    #[test]
    fn a_run_costs_what_egress_counted_and_what_nobody_can_say_costs_most() {
        let counted = |input_tokens, output_tokens, cache_write_tokens, cache_read_tokens| Counted {
            input_tokens,
            output_tokens,
            cache_write_tokens,
            cache_read_tokens,
            ..Counted::default()
        };
        let line = |model: &str, input: u64, output: u64| {
            let line = json!({"model": model, "input_tokens": input, "output_tokens": output});
            line.as_object().cloned().expect("an object")
        };
        let prices = prices();
        let all = counted(1000, 100, 0, 0);
        let cost = |lines: &[Map<String, Value>]| prices.cost(&all, lines);
        assert_eq!(cost(&[line("claude-sonnet-5", 1000, 100)]), 3000 + 1500);
        let two = [line("claude-sonnet-5", 600, 60), line("claude-haiku-4-5", 400, 40)];
        assert_eq!(cost(&two), 1800 + 900 + 400 + 200);
        assert_eq!(cost(&[]), 5000 + 2500, "no line: the dearest");
        assert_eq!(cost(&[line("claude-haiku-4-5", 400, 40)]), 400 + 200 + 3000 + 1500);
        assert_eq!(cost(&[line("claude-new-1", 1000, 100)]), 5000 + 2500, "no price: the dearest");
        assert_eq!(cost(&[line("haiku", 1000, 100)]), 5000 + 2500, "egress sees no alias");
        assert_eq!(cost(&[line("claude-haiku-4-5", 9000, 900)]), 1000 + 500, "not more than was counted");
        assert_eq!(prices.cost(&counted(0, 0, 1000, 1000), &[]), 6250 + 500);
        assert_eq!(prices.cost(&counted(1, 0, 0, 0), &[]), 5);
        let cheap = Prices::new(&[listed("claude-", 0.001, 0.0)]);
        assert_eq!(cheap.cost(&counted(1, 0, 0, 0), &[]), 1, "what costs something is never nothing");
        assert_eq!(prices.cost(&counted(u64::MAX, u64::MAX, 0, 0), &[]), u64::MAX);
        assert_eq!(Prices::default().cost(&all, &[]), 0);
    }
}
