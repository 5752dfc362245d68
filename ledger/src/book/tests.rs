//! The book over a database of its own: identity, isolation, sums and retention.
//! It must never share a database between two tests.

use super::*;
use crate::schema;

fn book() -> (tempfile::TempDir, Book) {
    let folder = tempfile::tempdir().expect("a folder");
    let book = Book::new(schema::open(folder.path()).expect("a database"));
    (folder, book)
}

fn hash(n: u8) -> Hex {
    Hex(vec![n; 32])
}

fn key(n: u8) -> Proof {
    Proof::Key { id: format!("{n:016x}"), hash: hash(n) }
}

fn create(book: &mut Book, n: u8, tenant: Option<&str>, expires_at: Option<i64>) -> Answered {
    let kind = if tenant.is_some() { KeyKind::Tenant } else { KeyKind::Admin };
    book.answer_root(Question::CreateKey {
        id: format!("{n:016x}"),
        hash: hash(n),
        kind,
        tenant: tenant.map(ToOwned::to_owned),
        make_tenant: true,
        label: "a label".into(),
        expires_at,
    })
}

fn asks(book: &mut Book, by: Option<Proof>, question: Question) -> Answered {
    book.answer_all(vec![(by, question)]).pop().expect("one answer")
}

fn grant(book: &mut Book, by: Proof) -> Grant {
    match asks(book, Some(by), Question::Who) {
        Ok(Answer::Who(Who::Tenant(grant))) => *grant,
        other => panic!("{other:?}"),
    }
}

fn record(run: u32, tenant: &str, status: u16) -> Question {
    Question::Record(Box::new(RunRecord {
        run: format!("{run:032x}"),
        tenant: tenant.into(),
        key: None,
        session: None,
        model: "sonnet".into(),
        level: "balanced".into(),
        tier: "kernel".into(),
        outcome: "end_turn".into(),
        status,
        launch_us: 3,
        counted: Counted { input_tokens: 10, output_tokens: 4, cache_read_tokens: 2, ..Counted::default() },
    }))
}

#[test]
fn a_key_is_its_tenant_until_it_ends() {
    let (_folder, mut book) = book();
    assert_eq!(create(&mut book, 1, Some("acme"), None), Ok(Answer::Done));
    assert_eq!(create(&mut book, 2, Some("acme"), Some(now() + 100)), Ok(Answer::Done));
    assert_eq!(create(&mut book, 3, Some("other"), None), Ok(Answer::Done));
    assert_eq!(create(&mut book, 4, None, None), Ok(Answer::Done));
    let (one, two, three) = (grant(&mut book, key(1)), grant(&mut book, key(2)), grant(&mut book, key(3)));
    assert_eq!((&one.tenant, &one.secret), (&two.tenant, &two.secret), "two keys of one tenant");
    assert!(one.tenant != three.tenant && one.secret != three.secret);
    assert_eq!(asks(&mut book, Some(key(4)), Question::Who), Ok(Answer::Who(Who::Admin)));
    // Not another's hash, not half of one, not an id that is none.
    for hash in [hash(2), Hex(vec![1; 16]), Hex(vec![])] {
        let by = Proof::Key { id: format!("{:016x}", 1), hash };
        assert_eq!(asks(&mut book, Some(by), Question::Who), Err(Refusal::KeyUnknown));
    }
    assert_eq!(asks(&mut book, Some(key(9)), Question::Who), Err(Refusal::KeyUnknown));
    assert_eq!(book.answer_root(Question::RevokeKey { id: format!("{:016x}", 1) }), Ok(Answer::Done));
    assert_eq!(asks(&mut book, Some(key(1)), Question::Who), Err(Refusal::KeyRevoked));
    book.run("UPDATE keys SET expires_at = ?1 WHERE id = ?2", params![now() - 1, format!("{:016x}", 2)])
        .expect("changed");
    assert_eq!(asks(&mut book, Some(key(2)), Question::Who), Err(Refusal::KeyExpired));
    assert_eq!(create(&mut book, 1, Some("acme"), None), Err(Refusal::Conflict), "an id is used once");
    assert_eq!(create(&mut book, 5, Some("acme"), Some(now() - 1)), Err(Refusal::Invalid));
    for name in ["", "-x", "a b", "tn_x", &"x".repeat(65), "é"] {
        assert_eq!(create(&mut book, 6, Some(name), None), Err(Refusal::Invalid), "{name}");
    }
}

#[test]
fn the_time_of_last_use_is_noted_later() {
    let (_folder, mut book) = book();
    create(&mut book, 1, Some("acme"), None).expect("a key");
    grant(&mut book, key(1));
    book.tidy(Keep { runs_days: 1, usage_days: 1 });
    let Ok(Answer::Keys(keys)) = book.answer_root(Question::Keys { tenant: None, after: None, limit: 9 })
    else {
        panic!("no keys")
    };
    assert!(keys[0].last_used_at.is_some_and(|at| at + 5 > now()), "{keys:?}");
    grant(&mut book, key(1));
    assert!(book.touched.is_empty(), "not twice in a minute");
}

#[test]
fn a_credential_is_its_tenants_and_goes_with_it() {
    let (_folder, mut book) = book();
    create(&mut book, 1, Some("acme"), None).expect("a key");
    create(&mut book, 2, Some("other"), None).expect("a key");
    let keep =
        || Question::KeepCredential { sealed: Hex(vec![9; 60]), scheme: "oauth".into(), vault: hash(8) };
    assert_eq!(asks(&mut book, None, keep()), Err(Refusal::Forbidden));
    assert_eq!(asks(&mut book, Some(key(1)), keep()), Ok(Answer::Done));
    assert_eq!(grant(&mut book, key(1)).credential.expect("kept").sealed, Hex(vec![9; 60]));
    assert_eq!(grant(&mut book, key(2)).credential, None);
    assert_eq!(asks(&mut book, Some(key(2)), Question::DropCredential), Err(Refusal::NotFound));
    assert_eq!(asks(&mut book, Some(key(1)), Question::DropCredential), Ok(Answer::Done));
    assert_eq!(grant(&mut book, key(1)).credential, None);
    asks(&mut book, Some(key(1)), keep()).expect("kept");
    assert_eq!(book.answer_root(Question::RemoveTenant { tenant: "acme".into() }), Ok(Answer::Done));
    for table in ["credentials", "keys WHERE kind = 'tenant' AND tenant NOT IN (SELECT id FROM tenants)"] {
        assert_eq!(book.count(&format!("SELECT count(*) FROM {table}"), []), Ok(0), "{table}");
    }
    assert_eq!(asks(&mut book, Some(key(1)), Question::Who), Err(Refusal::KeyUnknown));
}

#[test]
fn a_tenant_may_what_the_operator_says_and_that_goes_with_it() {
    let (_folder, mut book) = book();
    create(&mut book, 1, Some("acme"), None).expect("a key");
    create(&mut book, 2, Some("other"), None).expect("a key");
    let allow = |name: &str, allowance| Question::Allow { tenant: name.into(), allowance };
    let some = Allowance { tenant_max: Some(2), cost_per_day_microusd: Some(5), ..Allowance::default() };
    assert_eq!(asks(&mut book, Some(key(1)), allow("acme", some)), Err(Refusal::Forbidden));
    assert_eq!(book.answer_root(allow("nobody", some)), Err(Refusal::NotFound));
    let wrong = Allowance { tenant_max: Some(0), ..some };
    assert_eq!(wrong.wrong(), Some(("tenant_max", 1..=1024)));
    assert_eq!(book.answer_root(allow("acme", wrong)), Err(Refusal::Invalid));
    assert_eq!(grant(&mut book, key(1)).allowance, Allowance::default());
    assert_eq!(book.answer_root(allow("acme", some)), Ok(Answer::Done));
    assert_eq!(grant(&mut book, key(1)).allowance, some);
    assert_eq!(grant(&mut book, key(2)).allowance, Allowance::default());
    let asked = |name: &str| Question::Allowance { tenant: name.into() };
    assert_eq!(book.answer_root(asked("acme")), Ok(Answer::Allowance(some)));
    let less = Allowance { tokens_per_month: Some(0), ..Allowance::default() };
    assert_eq!(book.answer_root(allow("acme", less)), Ok(Answer::Done));
    assert_eq!(grant(&mut book, key(1)).allowance, less, "all of it is said anew");
    assert_eq!(book.answer_root(Question::RemoveTenant { tenant: "acme".into() }), Ok(Answer::Done));
    assert_eq!(book.count("SELECT count(*) FROM allowances", []), Ok(0));
    assert_eq!(book.answer_root(asked("acme")), Err(Refusal::NotFound));
}

#[test]
fn a_linked_credential_is_its_tenant_and_nobody_elses() {
    let (_folder, mut book) = book();
    create(&mut book, 1, Some("acme"), None).expect("a key");
    create(&mut book, 2, Some("other"), None).expect("a key");
    let shown = || Some(Proof::Credential { digest: hash(7) });
    let link = || Question::Link { digest: hash(7) };
    assert_eq!(asks(&mut book, shown(), Question::Who), Ok(Answer::Who(Who::Unlinked)));
    assert_eq!(asks(&mut book, shown(), link()), Err(Refusal::Forbidden), "a credential alone links nothing");
    assert_eq!(asks(&mut book, Some(key(1)), link()), Ok(Answer::Done));
    assert_eq!(asks(&mut book, Some(key(1)), link()), Ok(Answer::Done), "twice is once");
    assert_eq!(asks(&mut book, Some(key(2)), link()), Err(Refusal::Conflict));
    assert_eq!(asks(&mut book, Some(key(2)), Question::Unlink { digest: hash(7) }), Err(Refusal::NotFound));
    let linked = grant(&mut book, Proof::Credential { digest: hash(7) });
    assert_eq!((linked.name.as_str(), linked.key), ("acme", None));
    assert_eq!(asks(&mut book, Some(key(1)), Question::Unlink { digest: hash(7) }), Ok(Answer::Done));
    assert_eq!(asks(&mut book, shown(), Question::Who), Ok(Answer::Who(Who::Unlinked)));
}

#[test]
fn runs_are_summed_by_day_and_counted_once() {
    let (_folder, mut book) = book();
    for (run, tenant, status) in [(1, "a", 200), (2, "a", 429), (2, "a", 429), (3, "b", 200)] {
        assert_eq!(asks(&mut book, None, record(run, tenant, status)), Ok(Answer::Done));
    }
    let usage = |tenant: &str| Question::Usage { tenant: Some(tenant.into()), before: None, limit: 50 };
    let Ok(Answer::Usage(days)) = asks(&mut book, None, usage("a")) else { panic!("no usage") };
    assert_eq!(days.len(), 1, "{days:?}");
    assert_eq!((days[0].runs, days[0].failed, days[0].counted.input_tokens), (2, 1, 20));
    assert_eq!(days[0].counted.cache_read_tokens, 4);
    let all = Question::Usage { tenant: None, before: None, limit: 1 };
    let Ok(Answer::Usage(first)) = book.answer_root(all) else { panic!("no usage") };
    let cursor = format!("{}/{}", first[0].day, first[0].tenant);
    let next = Question::Usage { tenant: None, before: Some(cursor), limit: 50 };
    let Ok(Answer::Usage(rest)) = book.answer_root(next) else { panic!("no usage") };
    assert_eq!([&first[0].tenant, &rest[0].tenant], ["a", "b"]);
    let wrong = Question::Usage { tenant: None, before: Some("yesterday".into()), limit: 1 };
    assert_eq!(book.answer_root(wrong), Err(Refusal::Invalid));
    let runs = Question::Runs { tenant: Some("a".into()), before: Some(2), limit: 50 };
    let Ok(Answer::Runs(runs)) = book.answer_root(runs) else { panic!("no runs") };
    assert_eq!((runs.len(), runs[0].number), (1, 1));
}

#[test]
fn a_sum_never_overflows() {
    let (_folder, mut book) = book();
    for run in [1, 2] {
        let Question::Record(mut most) = record(run, "a", 200) else { unreachable!() };
        most.counted.output_tokens = u64::MAX;
        assert_eq!(asks(&mut book, None, Question::Record(most)), Ok(Answer::Done));
    }
    let usage = Question::Usage { tenant: Some("a".into()), before: None, limit: 1 };
    let Ok(Answer::Usage(days)) = asks(&mut book, None, usage) else { panic!("no usage") };
    assert_eq!(days[0].counted.output_tokens, i64::MAX as u64);
}

#[test]
fn what_is_old_goes() {
    let (_folder, mut book) = book();
    for run in 1..=3 {
        asks(&mut book, None, record(run, "a", 200)).expect("recorded");
    }
    book.run("UPDATE runs SET ended_at = ended_at - ?1 WHERE number < 3", params![91 * DAY]).expect("aged");
    book.run("UPDATE usage SET day = day - 801", []).expect("aged");
    asks(&mut book, None, record(4, "a", 200)).expect("recorded");
    book.tidy(Keep { runs_days: 90, usage_days: 800 });
    assert_eq!(book.count("SELECT count(*) FROM runs", []), Ok(2));
    assert_eq!(book.count("SELECT count(*) FROM usage", []), Ok(1));
}

#[test]
fn one_question_that_fails_undoes_itself_alone() {
    let (_folder, mut book) = book();
    create(&mut book, 4, None, None).expect("an admin");
    let name = |name: &str| (Some(key(4)), Question::CreateTenant { name: name.into() });
    let answers = book.answer_all(vec![name("one"), name("one"), name("two"), (None, Question::Who)]);
    let done = Ok(Answer::Done);
    assert_eq!(answers, [done.clone(), Err(Refusal::Conflict), done, Ok(Answer::Who(Who::Unlinked))]);
    let Ok(Answer::Tenants(tenants)) = book.answer_root(Question::Tenants { after: None, limit: 50 }) else {
        panic!("no tenants")
    };
    assert_eq!(tenants.iter().map(|tenant| tenant.name.as_str()).collect::<Vec<_>>(), ["one", "two"]);
    assert_eq!(book.answer_root(Question::Integrity), Ok(Answer::Integrity(vec![])));
}

#[test]
fn a_sessions_servers_are_its_tenants_and_go_with_it() {
    let (_folder, mut book) = book();
    create(&mut book, 1, Some("acme"), None).expect("a key");
    create(&mut book, 2, Some("other"), None).expect("a key");
    create(&mut book, 4, None, None).expect("an admin");
    let alone = || Proof::Credential { digest: hash(7) };
    let id = |n: usize| format!("00000000-0000-0000-0000-{n:012x}");
    let keep =
        |n: usize, byte: u8| Question::KeepServers { session: id(n), locked: Hex(vec![byte; 9]), used_at: 5 };
    let read = |n: usize| Question::Servers { session: id(n) };
    let found = |byte: u8| Ok(Answer::Servers(Some(KeptServers { locked: Hex(vec![byte; 9]), used_at: 5 })));
    let none = Ok(Answer::Servers(None));
    for (by, byte) in [(key(1), 1), (key(2), 2), (alone(), 3)] {
        assert_eq!(asks(&mut book, Some(by.clone()), read(1)), none);
        assert_eq!(asks(&mut book, Some(by), keep(1, byte)), Ok(Answer::Done));
    }
    // One id, three owners; and nobody else has any.
    for (by, byte) in [(key(1), 1), (key(2), 2), (alone(), 3)] {
        assert_eq!(asks(&mut book, Some(by), read(1)), found(byte));
    }
    let stranger = Proof::Credential { digest: hash(8) };
    assert_eq!(asks(&mut book, Some(stranger), read(1)), none);
    for by in [None, Some(key(4))] {
        assert_eq!(asks(&mut book, by, read(1)), Err(Refusal::Forbidden));
    }
    assert_eq!(asks(&mut book, Some(key(1)), keep(1, 9)), Ok(Answer::Done), "in the place of those before");
    assert_eq!(asks(&mut book, Some(key(1)), read(1)), found(9));
    let many = Question::DropServers { sessions: vec![id(1), id(2)] };
    assert_eq!(asks(&mut book, Some(key(2)), many), Ok(Answer::Done), "also those that are not there");
    assert_eq!(asks(&mut book, Some(key(2)), read(1)), none);
    assert_eq!(asks(&mut book, Some(key(1)), read(1)), found(9), "another's stay");
    assert_eq!(asks(&mut book, Some(alone()), Question::Served), Ok(Answer::Served(vec![id(1)])));
    // A linked credential is the tenant's; its own come back with it.
    asks(&mut book, Some(key(1)), Question::Link { digest: hash(7) }).expect("linked");
    assert_eq!(asks(&mut book, Some(alone()), read(1)), found(9));
    asks(&mut book, Some(key(1)), Question::Unlink { digest: hash(7) }).expect("unlinked");
    assert_eq!(asks(&mut book, Some(alone()), read(1)), found(3));
    // Bounds: bytes, sessions, and what is no session.
    let large = |bytes| Question::KeepServers { session: id(1), locked: Hex(vec![0; bytes]), used_at: 0 };
    assert_eq!(asks(&mut book, Some(key(2)), large(SERVERS_BYTES_MAX)), Ok(Answer::Done));
    assert_eq!(asks(&mut book, Some(key(2)), large(SERVERS_BYTES_MAX + 1)), Err(Refusal::Invalid));
    let odd = Question::KeepServers { session: "x".into(), locked: Hex(vec![]), used_at: 0 };
    assert_eq!(asks(&mut book, Some(key(2)), odd), Err(Refusal::Invalid));
    for n in 2..=SERVED_MAX {
        assert_eq!(asks(&mut book, Some(key(2)), keep(n, 2)), Ok(Answer::Done));
    }
    assert_eq!(asks(&mut book, Some(key(2)), keep(0, 2)), Err(Refusal::Conflict), "one too many");
    assert_eq!(asks(&mut book, Some(key(2)), keep(1, 4)), Ok(Answer::Done), "one that is there");
    assert_eq!(asks(&mut book, Some(key(1)), keep(0, 1)), Ok(Answer::Done), "another tenant's");
    assert_eq!(book.answer_root(Question::RemoveTenant { tenant: "other".into() }), Ok(Answer::Done));
    assert_eq!(book.count("SELECT count(*) FROM session_servers", []), Ok(3));
}
