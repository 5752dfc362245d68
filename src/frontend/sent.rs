//! A request's body as it comes: within its bytes, its pace and its part of what all may take together.
//! It must never wait for a sender without a deadline, nor hold a byte that is not counted.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRequest;
use http::Request;
use http::header;
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use super::bodies::{Hold, Whose};
use super::crowd::{Connection, Stage};
use super::error::ApiError;
use super::http::App;
use super::identity::{Holder, Shown};
use super::{Frontend, identity, tenant};

/// Bytes of a body that is too large which are read and dropped, so that its sender reads our answer.
const DROPPED_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Bytes that a body has room for at first; then it doubles.
const ROOM_BYTES: usize = 4 * 1024;
/// Bytes of a body that holds words about something: a name, a title, servers.
pub const WORDS_BYTES_MAX: usize = 1024 * 1024;

/// How fast a body must come.
#[derive(Clone, Copy)]
pub struct Pace {
    /// How long one piece may take.
    pub piece: Duration,
    /// How long all of it may take.
    pub whole: Duration,
    /// How long it may be slower than `least`, in bytes a second.
    pub grace: Duration,
    /// See `grace`.
    pub least: u64,
}

impl Pace {
    /// Of one who is known: slower than any line that a request of 32 MB is sent over.
    pub const KNOWN: Pace = Pace {
        piece: Duration::from_secs(15),
        whole: Duration::from_secs(120),
        grace: Duration::from_secs(20),
        least: 16 * 1024,
    };
    /// Of a stranger: one that sends a byte now and then must not hold a place by it.
    pub const STRANGER: Pace = Pace {
        piece: Duration::from_secs(5),
        whole: Duration::from_secs(120),
        grace: Duration::from_secs(5),
        least: 64 * 1024,
    };
    /// Of a file, which may have a gigabyte, and which its disk takes at its own pace.
    pub const UPLOAD: Pace = Pace {
        piece: Duration::from_secs(30),
        whole: Duration::from_secs(3600),
        grace: Duration::from_secs(60),
        least: 16 * 1024,
    };

    /// When the next piece of a body that began then must be there, of which so many bytes have come.
    pub fn until(&self, begun: Instant, taken: u64) -> Instant {
        let enough = begun + self.grace + Duration::from_secs(taken / self.least.max(1));
        (Instant::now() + self.piece).min(begun + self.whole).min(enough)
    }
}

/// A body, and who sends it.
pub struct Sent {
    body: Body,
    /// Bytes that it says it has.
    length: Option<usize>,
    connection: Option<Arc<Connection>>,
    place: Option<u128>,
}

impl FromRequest<App> for Sent {
    type Rejection = Infallible;

    async fn from_request(request: Request<Body>, frontend: &App) -> Result<Sent, Infallible> {
        let connection = request.extensions().get::<Arc<Connection>>().cloned();
        let length = request.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
        let place = connection
            .as_ref()
            .map(|connection| frontend.live().rates.place_of(connection.address, request.headers()));
        Ok(Sent { length, connection, place, body: request.into_body() })
    }
}

impl Sent {
    /// The body alone, for who reads it at a pace of their own.
    pub fn into_body(self) -> Body {
        self.body
    }

    /// Whose it is, as far as the head of its request says.
    pub fn whose(&self, frontend: &Frontend, shown: &Shown) -> Result<Whose, ApiError> {
        let stranger = Whose::Stranger(self.place.unwrap_or_default());
        Ok(match shown {
            Shown::Admin(_) => Whose::Operator,
            Shown::Tenant(grant, _) | Shown::Credential(_, Some(grant)) => {
                Whose::Known(identity::keyed(frontend, grant)?.0)
            }
            Shown::Credential(credential, None) => {
                let tenant = credential.tenant(&frontend.secret);
                if frontend.vouching.is_known(&tenant) { Whose::Known(tenant.0) } else { stranger }
            }
            Shown::Nobody => stranger,
        })
    }

    /// The same of who asks for files.
    pub fn whose_of(&self, frontend: &Frontend, holder: &Holder) -> Whose {
        let is_raw = holder.name == tenant::raw_name(&holder.tenant);
        match is_raw && !frontend.vouching.is_known(&holder.tenant) {
            true => Whose::Stranger(self.place.unwrap_or_default()),
            false => Whose::Known(holder.tenant.0),
        }
    }

    /// All of it, and the part of the budget that it takes.
    ///
    /// # Errors
    /// 400 where it breaks off, 408 where it comes too slowly, 413, 503 for a stranger in a drain, 529.
    pub async fn read(
        self,
        frontend: &Frontend,
        whose: Whose,
        most: usize,
    ) -> Result<(Zeroizing<Vec<u8>>, Hold), ApiError> {
        let hold = frontend.bodies.begin(whose);
        let stage = match whose {
            Whose::Stranger(_) => Stage::Stranger,
            Whose::Known(_) | Whose::Operator => Stage::Known,
        };
        // Until all of it is there, its connection may have to make room for another's.
        let _exposed = self.connection.as_ref().map(|connection| connection.expose(stage));
        let is_stranger = matches!(whose, Whose::Stranger(_));
        let mut draining = frontend.draining.subscribe();
        let told = async {
            match is_stranger {
                true => drop(draining.wait_for(|&draining| draining).await),
                false => std::future::pending().await,
            }
        };
        let pace = if is_stranger { Pace::STRANGER } else { Pace::KNOWN };
        let bytes = tokio::select! {
            biased;
            error = hold.goes() => return Err(error),
            // Nobody waits for one whom nobody knows.
            () = told => return Err(ApiError::draining()),
            bytes = whole(self.body, &hold, pace, self.length, most) => bytes?,
        };
        hold.is_whole();
        Ok((bytes, hold))
    }
}

async fn whole(
    mut body: Body,
    hold: &Hold,
    pace: Pace,
    length: Option<usize>,
    most: usize,
) -> Result<Zeroizing<Vec<u8>>, ApiError> {
    let begun = Instant::now();
    // Without room for one that is too large, so that nothing is taken for it.
    let wanted = length.filter(|length| *length <= most);
    let mut bytes = Zeroizing::new(Vec::new());
    let mut total = 0usize;
    loop {
        let frame = match timeout_at(pace.until(begun, total as u64), body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(_))) => return Err(ApiError::invalid("The body broke off.")),
            Ok(None) => break,
            Err(_) => return Err(too_slow()),
        };
        let Ok(data) = frame.into_data() else { continue };
        total += data.len();
        if total > most.saturating_add(DROPPED_BYTES_MAX) {
            return Err(too_large(most));
        }
        if total > most || length.is_some_and(|length| length > most) {
            bytes = Zeroizing::new(Vec::new());
            continue;
        }
        if total > bytes.capacity() {
            // As it will be, not as it might: what is counted is what the allocator is asked for.
            let doubled = bytes.capacity().saturating_mul(2).max(ROOM_BYTES).max(total);
            let room = doubled.min(wanted.unwrap_or(most)).max(total);
            hold.grow(room - bytes.capacity()).await?;
            let mut larger = Zeroizing::new(Vec::new());
            larger.reserve_exact(room);
            larger.extend_from_slice(&bytes);
            bytes = larger;
        }
        bytes.extend_from_slice(&data);
    }
    if total > most { Err(too_large(most)) } else { Ok(bytes) }
}

/// 408: a body that comes too slowly.
pub fn too_slow() -> ApiError {
    ApiError::new(408, "body_timeout", "The body came too slowly.").final_word()
}

fn too_large(most: usize) -> ApiError {
    let message = match most.checked_div(1024 * 1024) {
        None | Some(0) => "The body is larger than it may be here.".to_owned(),
        Some(mib) => format!("The request is larger than {mib} MB."),
    };
    ApiError::new(413, "request_too_large", message)
}
