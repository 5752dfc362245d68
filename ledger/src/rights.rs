//! Who may ask what: a pure table. It must never let one tenant ask for another, nor the frontend for everybody.

use gaoler_ledger_wire::{Hex, Question, Who};

/// Who asks.
#[derive(Debug)]
pub enum Asker {
    /// Root's command line.
    Root,
    /// The frontend, for whoever proved this to it.
    Frontend(Who),
    /// The frontend, for a credential of this digest that nobody has linked: it is a tenant by itself.
    Credential(Hex),
}

impl Asker {
    /// Whose what is kept for sessions is, where the asker is a tenant.
    #[must_use]
    pub fn owner(&self) -> Option<String> {
        match self {
            Asker::Frontend(Who::Tenant(grant)) => Some(grant.tenant.clone()),
            Asker::Credential(digest) => Some(format!("credential:{digest}")),
            Asker::Root | Asker::Frontend(Who::Admin | Who::Unlinked) => None,
        }
    }
}

/// Whether this one may ask that.
#[must_use]
pub fn permits(asker: &Asker, question: &Question) -> bool {
    let (root, admin, tenant) = match asker {
        Asker::Root => (true, true, None),
        Asker::Frontend(Who::Admin) => (false, true, None),
        Asker::Frontend(Who::Tenant(grant)) => (false, false, Some(grant)),
        Asker::Frontend(Who::Unlinked) | Asker::Credential(_) => (false, false, None),
    };
    match question {
        Question::Who => !root,
        // What egress counted comes from the frontend alone; a run's tenant may have no key.
        Question::Record(_) => !root,
        // A tenant's own, which it need not have a key for: the frontend names whom it has recognized.
        Question::Usage { tenant: Some(_), .. } => true,
        Question::KeepCredential { .. }
        | Question::DropCredential
        | Question::Link { .. }
        | Question::Unlink { .. } => tenant.is_some(),
        // A session's servers are for whoever can have sessions, by what they prove and not by a name.
        Question::Servers { .. }
        | Question::Served
        | Question::KeepServers { .. }
        | Question::DropServers { .. } => asker.owner().is_some(),
        Question::Usage { tenant: None, .. }
        | Question::Runs { .. }
        | Question::CreateTenant { .. }
        | Question::Tenants { .. }
        | Question::RemoveTenant { .. }
        | Question::Allowance { .. }
        | Question::Allow { .. }
        | Question::CreateKey { .. }
        | Question::Keys { .. }
        | Question::RevokeKey { .. } => admin,
        Question::Integrity => root,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gaoler_ledger_wire::{Allowance, Grant, KeyKind};

    #[test]
    fn nobody_asks_for_more_than_what_is_theirs() {
        let grant = Grant {
            tenant: "t".into(),
            name: "n".into(),
            secret: Hex(vec![0; 32]),
            key: None,
            expires_at: None,
            credential: None,
            allowance: Allowance::default(),
        };
        let tenant = || Asker::Frontend(Who::Tenant(Box::new(grant.clone())));
        let (admin, nobody) = (Asker::Frontend(Who::Admin), Asker::Frontend(Who::Unlinked));
        let digest = || Hex(vec![0; 32]);
        let text = || "x".to_owned();
        let mine = [
            Question::KeepCredential { sealed: digest(), scheme: text(), vault: digest() },
            Question::DropCredential,
            Question::Link { digest: digest() },
            Question::Unlink { digest: digest() },
        ];
        for question in mine {
            let asked = [&tenant(), &admin, &nobody, &Asker::Root].map(|asker| permits(asker, &question));
            assert_eq!(asked, [true, false, false, false], "{question:?}");
        }
        let credential = Asker::Credential(digest());
        let of_sessions = [
            Question::Servers { session: text() },
            Question::Served,
            Question::KeepServers { session: text(), locked: digest(), used_at: 0 },
            Question::DropServers { sessions: vec![text()] },
        ];
        for question in of_sessions {
            let askers = [&tenant(), &credential, &admin, &nobody, &Asker::Root];
            let asked = askers.map(|asker| permits(asker, &question));
            assert_eq!(asked, [true, true, false, false, false], "{question:?}");
        }
        assert_eq!(tenant().owner().as_deref(), Some("t"));
        assert!(credential.owner().is_some_and(|owner| owner.starts_with("credential:00")));
        assert!(permits(&credential, &Question::Who) && !permits(&credential, &Question::DropCredential));
        let create = Question::CreateKey {
            id: text(),
            hash: digest(),
            kind: KeyKind::Admin,
            tenant: None,
            make_tenant: false,
            label: text(),
            expires_at: None,
        };
        let operators = [
            Question::Usage { tenant: None, before: None, limit: 1 },
            Question::Runs { tenant: None, before: None, limit: 1 },
            Question::CreateTenant { name: text() },
            Question::Tenants { after: None, limit: 1 },
            Question::RemoveTenant { tenant: text() },
            Question::Allowance { tenant: text() },
            Question::Allow { tenant: text(), allowance: Allowance::default() },
            create,
            Question::Keys { tenant: None, after: None, limit: 1 },
            Question::RevokeKey { id: text() },
        ];
        for question in operators {
            let askers = [&tenant(), &credential, &admin, &nobody, &Asker::Root];
            let asked = askers.map(|asker| permits(asker, &question));
            assert_eq!(asked, [false, false, true, false, true], "{question:?}");
        }
        assert!(permits(&nobody, &Question::Who) && !permits(&admin, &Question::Integrity));
    }
}
