//! Who asks, and what for: one rule for every route. A key of ours names a tenant, or the operator; a credential of the
//! upstream is a tenant by itself, unless it was linked to one.
//! A secret must never be compared, stored or shown here: the ledger is asked with its hash or its digest.

use http::HeaderMap;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use gaoler_ledger_wire::{Allowance, Answer, Grant, Hex, KeyKind, Proof, Question, Who};
use gaoler_protocol::TenantKey;
use gaoler_seal::SEALED;

use super::Frontend;
use super::crowd;
use super::error::ApiError;
use super::files::Whose;
use super::job::BodyCredential;
use super::ledger;
use super::tenant::{self, Credential};

/// The header of a credential beside a key.
pub const CREDENTIAL: &str = "x-claude-credential";
/// What every key of ours begins with.
const KEY_PREFIX: &str = "gaol_";
/// Hexadecimal digits of a key's public and of its secret part.
const KEY_ID_CHARS: usize = 16;
const KEY_SECRET_CHARS: usize = 64;

/// Who a request's headers say it is from.
pub enum Shown {
    /// A tenant of the operator's, by its key.
    Tenant(Box<Grant>, Proof),
    /// The operator.
    Admin(Proof),
    /// A credential of the upstream; and the tenant that it was linked to.
    Credential(Credential, Option<Box<Grant>>),
    /// Nobody: the body may still say.
    Nobody,
}

/// Who asks, and the credential of their run.
pub struct Caller {
    /// The capability.
    pub tenant: TenantKey,
    /// The tenant's name in the books.
    pub name: String,
    /// What was shown, as the ledger is told it.
    pub proof: Proof,
    /// The key that was shown.
    pub key: Option<String>,
    /// What it may, where that is not what the settings say.
    pub allowance: Allowance,
    /// The bytes of the run's credential file.
    pub credential: Zeroizing<Vec<u8>>,
    /// The credential is all that says who it is: the upstream has to know it.
    pub unlinked: bool,
}

impl Caller {
    /// The tenant, as a run of its is known by.
    pub fn whose(&self) -> Whose {
        let (name, key) = (self.name.clone(), self.key.clone());
        Whose { tenant: self.tenant, name, key, most: self.allowance.tenant_max }
    }
}

/// A key as it is issued: shown once, and never kept.
pub struct Issued {
    /// Its public part.
    pub id: String,
    /// What is kept of it.
    pub hash: Hex,
    /// All of it.
    pub text: Zeroizing<String>,
}

/// Draws a key.
pub fn issue(kind: KeyKind) -> Issued {
    let id = Hex(rand::random::<[u8; KEY_ID_CHARS / 2]>().to_vec()).to_string();
    let secret = Zeroizing::new(Hex(rand::random::<[u8; KEY_SECRET_CHARS / 2]>().to_vec()).to_string());
    let text = Zeroizing::new(format!("{}{id}_{}", kind.prefix(), *secret));
    Issued { id, hash: hash(&secret), text }
}

fn hash(secret: &str) -> Hex {
    Hex(Sha256::digest(secret.as_bytes()).to_vec())
}

/// The proof that a key is: its public part, and the hash of the other.
fn proof(key: &str) -> Result<Proof, ApiError> {
    let parts = [KeyKind::Tenant, KeyKind::Admin].iter().find_map(|kind| key.strip_prefix(kind.prefix()));
    let (id, secret) = parts.and_then(|rest| rest.split_once('_')).unwrap_or_default();
    let hexadecimal = |text: &str, chars| text.len() == chars && Hex::parse(text).is_some();
    match hexadecimal(id, KEY_ID_CHARS) && hexadecimal(secret, KEY_SECRET_CHARS) {
        true => Ok(Proof::Key { id: id.to_owned(), hash: hash(secret) }),
        false => Err(ApiError::unauthenticated(
            "invalid_token_format",
            "Invalid key format: a key begins with gaol_t_ or gaol_a_ and is 88 characters long.",
        )),
    }
}

/// Who a request is from, before its body is read.
///
/// # Errors
/// 401 for what is no key and no credential, or none that may be used; 503 where the ledger is silent.
pub async fn shown(frontend: &Frontend, headers: &HeaderMap) -> Result<Shown, ApiError> {
    let Some(token) = tenant::shown(headers) else { return Ok(Shown::Nobody) };
    if !token.starts_with(KEY_PREFIX) {
        return credential(frontend, Credential::parse(token)?).await;
    }
    let proof = proof(token)?;
    match frontend.ledger.ask(Some(proof.clone()), Question::Who).await? {
        // The prefix is for people; what a key may is what the ledger says.
        Answer::Who(Who::Tenant(grant)) => {
            crowd::is_known();
            Ok(Shown::Tenant(grant, proof))
        }
        Answer::Who(Who::Admin) => {
            crowd::is_known();
            Ok(Shown::Admin(proof))
        }
        _ => Err(ledger::unavailable()),
    }
}

/// Whether a run may be asked for in the name that the head shows, as far as the head alone says.
///
/// # Errors
/// 403 for an admin key; 401 for a credential beside no key.
pub fn may_run(shown: Shown, headers: &HeaderMap) -> Result<Shown, ApiError> {
    match shown {
        Shown::Admin(_) => Err(insufficient()),
        Shown::Nobody if headers.contains_key(CREDENTIAL) => Err(missing()),
        shown => Ok(shown),
    }
}

/// Whether a request shows a key that is known, or a credential of a right form. It is enough where nothing is told
/// that is somebody's; whose a credential is need not be looked up.
///
/// # Errors
/// As [`somebody`].
pub async fn recognized(frontend: &Frontend, headers: &HeaderMap) -> Result<(), ApiError> {
    match at_once(frontend, headers) {
        Some(known) => known,
        None => somebody(frontend, headers).await.map(drop),
    }
}

/// The same of whoever shows a credential of the upstream: nobody need be asked. `None` for anybody else.
pub fn at_once(frontend: &Frontend, headers: &HeaderMap) -> Option<Result<(), ApiError>> {
    let token = tenant::shown(headers).filter(|token| !token.starts_with(KEY_PREFIX))?;
    Some(Credential::scheme_of(token).and_then(|_| key_not_required(frontend)))
}

fn key_not_required(frontend: &Frontend) -> Result<(), ApiError> {
    if frontend.live().settings.identity.require_key {
        let message = "This server asks for a tenant key (gaol_t_…) as `authorization: Bearer` or `x-api-key`, with the \
                       credential in x-claude-credential, in the body, or stored.";
        return Err(ApiError::unauthenticated("key_required", message));
    }
    Ok(())
}

async fn credential(frontend: &Frontend, credential: Credential) -> Result<Shown, ApiError> {
    key_not_required(frontend)?;
    match frontend.ledger.ask(Some(digest(frontend, &credential)), Question::Who).await? {
        Answer::Who(Who::Tenant(grant)) => {
            crowd::is_known();
            Ok(Shown::Credential(credential, Some(grant)))
        }
        Answer::Who(Who::Unlinked) => {
            if frontend.vouching.is_known(&credential.tenant(&frontend.secret)) {
                crowd::is_known();
            }
            Ok(Shown::Credential(credential, None))
        }
        _ => Err(ledger::unavailable()),
    }
}

/// The proof that a credential of the upstream is.
fn digest(frontend: &Frontend, credential: &Credential) -> Proof {
    Proof::Credential { digest: Hex(credential.digest(&frontend.secret).to_vec()) }
}

/// Who a request is from that must be somebody's, but needs no credential of the upstream.
///
/// # Errors
/// As [`shown`], and 401 for nobody.
pub async fn somebody(frontend: &Frontend, headers: &HeaderMap) -> Result<Shown, ApiError> {
    match shown(frontend, headers).await? {
        Shown::Nobody => Err(missing()),
        shown => Ok(shown),
    }
}

/// The tenant that a request is from, where nothing runs for it.
///
/// # Errors
/// As [`somebody`]; 403 for an admin key, which is no tenant's.
pub async fn tenant(frontend: &Frontend, headers: &HeaderMap) -> Result<TenantKey, ApiError> {
    holder(frontend, headers).await.map(|holder| holder.tenant)
}

/// Whose files are asked for.
#[derive(Clone)]
pub struct Holder {
    /// The capability.
    pub tenant: TenantKey,
    /// The tenant's name in the books.
    pub name: String,
    /// The key that was shown.
    pub key: Option<String>,
    /// What was shown, as the ledger is told it.
    pub proof: Proof,
    /// What it may, where that is not what the settings say.
    pub allowance: Allowance,
    /// The bytes of a credential's file: a tenant whom nobody has seen yet must be vouched for.
    pub credential: Option<Zeroizing<Vec<u8>>>,
    /// The credential is all that says who it is: the upstream has to know it.
    pub unlinked: bool,
}

impl Holder {
    /// The tenant, as a run of its is known by.
    pub fn whose(&self) -> Whose {
        let (name, key) = (self.name.clone(), self.key.clone());
        Whose { tenant: self.tenant, name, key, most: self.allowance.tenant_max }
    }
}

/// The same, with the bytes of a credential's file where there is one: a tenant's own files need none.
///
/// # Errors
/// As [`tenant`], and 401 for a credential beside the key that is none.
pub async fn holder(frontend: &Frontend, headers: &HeaderMap) -> Result<Holder, ApiError> {
    let of = |grant: &Grant, proof, credential| {
        let (tenant, allowance) = (keyed(frontend, grant)?, grant.allowance);
        let (name, key) = (grant.tenant.clone(), grant.key.clone());
        Ok(Holder { tenant, name, key, proof, allowance, credential, unlinked: false })
    };
    match somebody(frontend, headers).await? {
        Shown::Tenant(grant, proof) => {
            let beside = headers.get(CREDENTIAL).map(|value| value.to_str().unwrap_or_default().trim());
            let credential = match beside {
                Some(token) => Some(Credential::parse(token)?.bytes()),
                None => stored(frontend, &grant).ok(),
            };
            of(&grant, proof, credential)
        }
        Shown::Credential(credential, Some(grant)) => {
            of(&grant, digest(frontend, &credential), Some(credential.bytes()))
        }
        Shown::Credential(credential, None) => {
            let (tenant, proof) = (credential.tenant(&frontend.secret), digest(frontend, &credential));
            let (name, credential) = (tenant::raw_name(&tenant), Some(credential.bytes()));
            let allowance = Allowance::default();
            Ok(Holder { tenant, name, key: None, proof, allowance, credential, unlinked: true })
        }
        Shown::Admin(_) => Err(insufficient()),
        Shown::Nobody => Err(missing()),
    }
}

fn insufficient() -> ApiError {
    ApiError::new(403, "key_insufficient", "An admin key runs nothing; use a tenant's.")
}

/// Who asks for a run, with what: the header's credential, else the body's, else the stored one.
///
/// # Errors
/// 401 where there is none, or none that may be used; 403 for an admin key, which is nobody's to run with.
pub async fn caller(
    frontend: &Frontend,
    shown: Shown,
    headers: &HeaderMap,
    body: Option<&BodyCredential>,
    now_ms: u64,
) -> Result<Caller, ApiError> {
    let beside = headers.get(CREDENTIAL).map(|value| value.to_str().unwrap_or_default().trim());
    let shown = match shown {
        Shown::Nobody if beside.is_some() => return Err(missing()),
        Shown::Nobody => {
            let body = body.ok_or_else(missing)?;
            credential(frontend, tenant::in_body(body, now_ms)?).await?
        }
        shown => shown,
    };
    match shown {
        Shown::Credential(..) if beside.is_some() => Err(ApiError::invalid(
            "x-claude-credential: goes with a tenant key, not with another credential.",
        )),
        Shown::Credential(credential, None) => {
            let (tenant, proof) = (credential.tenant(&frontend.secret), digest(frontend, &credential));
            let (name, credential) = (tenant::raw_name(&tenant), credential.bytes());
            let allowance = Allowance::default();
            Ok(Caller { tenant, name, proof, key: None, allowance, credential, unlinked: true })
        }
        Shown::Credential(credential, Some(grant)) => {
            of(frontend, &grant, digest(frontend, &credential), credential.bytes())
        }
        Shown::Tenant(grant, proof) => {
            let credential = match (beside, body) {
                (Some(token), _) => Credential::parse(token)?.bytes(),
                (None, Some(body)) => tenant::in_body(body, now_ms)?.bytes(),
                (None, None) => stored(frontend, &grant)?,
            };
            of(frontend, &grant, proof, credential)
        }
        Shown::Admin(_) => Err(insufficient()),
        Shown::Nobody => Err(missing()),
    }
}

fn of(
    frontend: &Frontend,
    grant: &Grant,
    proof: Proof,
    credential: Zeroizing<Vec<u8>>,
) -> Result<Caller, ApiError> {
    let tenant = keyed(frontend, grant)?;
    let (name, key) = (grant.tenant.clone(), grant.key.clone());
    Ok(Caller { tenant, name, proof, key, allowance: grant.allowance, credential, unlinked: false })
}

/// The capability of a tenant of the operator's.
///
/// # Errors
/// 503 for a ledger that is not itself.
pub fn keyed(frontend: &Frontend, grant: &Grant) -> Result<TenantKey, ApiError> {
    let secret = grant.secret.array::<32>().map(Zeroizing::new).ok_or_else(ledger::unavailable)?;
    Ok(tenant::keyed(&frontend.secret, &secret))
}

/// The stored credential, sealed as it is: only an egress can open it, and only for this tenant.
fn stored(frontend: &Frontend, grant: &Grant) -> Result<Zeroizing<Vec<u8>>, ApiError> {
    let Some(kept) = &grant.credential else {
        return Err(ApiError::unauthenticated(
            "credential_missing",
            "This key is known, but there is no credential for the upstream: send x-claude-credential or \
             oauth_credentials, or store one with PUT /v1/credential.",
        ));
    };
    if kept.vault.0 != frontend.vault {
        return Err(ApiError::unauthenticated(
            "credential_missing",
            "The stored credential cannot be opened any more, for this server has another key; store it again with \
             PUT /v1/credential.",
        ));
    }
    let mut file = Zeroizing::new(vec![SEALED]);
    file.extend_from_slice(&kept.sealed.0);
    Ok(file)
}

fn missing() -> ApiError {
    ApiError::unauthenticated(
        "credential_missing",
        "No credential: send `authorization: Bearer` or `x-api-key` with a key of this server (gaol_t_…) or a \
         credential of your own (sk-ant-…), or oauth_credentials in the body.",
    )
}

/// Whether a query holds what must never be in an address: those are written down wherever they pass.
pub fn in_query(query: &str) -> bool {
    let decoded = form_urlencoded::parse(query.as_bytes()).flat_map(|(name, value)| [name, value]);
    let secret = |text: &str| text.contains("sk-ant-") || text.contains(KEY_PREFIX);
    secret(query) || decoded.into_iter().any(|text| secret(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_shown_once_and_is_its_own_proof() {
        for kind in [KeyKind::Tenant, KeyKind::Admin] {
            let key = issue(kind);
            assert_eq!(key.text.len(), 88);
            assert!(key.text.starts_with(kind.prefix()));
            let expected = Proof::Key { id: key.id.clone(), hash: key.hash.clone() };
            assert_eq!(proof(&key.text).expect("a key"), expected);
            assert!(!key.text.contains(&key.hash.to_string()));
            for wrong in [&key.text[..87], &key.text.to_uppercase(), &key.text.replacen('_', "-", 1)] {
                assert_eq!(proof(wrong).expect_err("no key").code, "invalid_token_format", "{wrong}");
            }
        }
        assert_ne!(*issue(KeyKind::Tenant).text, *issue(KeyKind::Tenant).text);
    }

    #[test]
    fn a_secret_in_a_query_is_seen_however_it_is_written() {
        for query in
            ["key=gaol_t_x", "a=b&gaol_a_1=2", "k=%67aol%5Ft%5Fx", "token=sk-ant-api03-x", "t=sk%2Dant-x"]
        {
            assert!(in_query(query), "{query}");
        }
        for query in ["", "beta=true", "limit=10&after_id=claude-x", "x=gaol", "x=sk-"] {
            assert!(!in_query(query), "{query}");
        }
    }
}
