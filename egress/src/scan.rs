//! Looks for the credential in bytes that pass, across the borders of their pieces.
//! It must never let the last byte of an occurrence through, nor hold back a byte that cannot belong to one.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use memchr::memmem;
use zeroize::Zeroizing;

/// What is shorter than this cannot be told from ordinary text, and is no secret: answers are not searched for it.
pub const SECRET_BYTES_MIN: usize = 16;

/// The credential was found.
#[derive(Debug, PartialEq, Eq)]
pub struct Found;

/// A search of one answer.
pub struct Scan {
    needle: Option<Arc<Zeroizing<Vec<u8>>>>,
    /// The end of what came so far that may be the beginning of an occurrence: shorter than the needle.
    held: BytesMut,
}

impl Scan {
    /// A search for these bytes; `None` lets everything pass.
    pub fn new(needle: Option<Arc<Zeroizing<Vec<u8>>>>) -> Scan {
        Scan { needle, held: BytesMut::new() }
    }

    /// Takes a piece and gives what may go on.
    ///
    /// # Errors
    /// [`Found`]; then nothing more may go on.
    pub fn pass(&mut self, piece: Bytes) -> Result<Bytes, Found> {
        let Some(needle) = self.needle.clone() else { return Ok(piece) };
        let mut all = match self.held.is_empty() {
            true => BytesMut::from(piece),
            false => {
                let mut all = std::mem::take(&mut self.held);
                all.extend_from_slice(&piece);
                all
            }
        };
        if memmem::find(&all, &needle).is_some() {
            return Err(Found);
        }
        let keep = overlap(&all, &needle);
        self.held = all.split_off(all.len() - keep);
        Ok(all.freeze())
    }

    /// What was held back, once nothing can follow it.
    pub fn finish(&mut self) -> Bytes {
        std::mem::take(&mut self.held).freeze()
    }
}

/// Whether some bytes hold the needle.
pub fn contains(needle: Option<&Arc<Zeroizing<Vec<u8>>>>, bytes: &[u8]) -> bool {
    needle.is_some_and(|needle| memmem::find(bytes, needle).is_some())
}

/// The length of the longest end of `bytes` that the needle begins with.
fn overlap(bytes: &[u8], needle: &[u8]) -> usize {
    let start = bytes.len().saturating_sub(needle.len().saturating_sub(1));
    let tail = &bytes[start..];
    let Some(&first) = needle.first() else { return 0 };
    let at = memchr::memchr_iter(first, tail).find(|&at| needle.starts_with(&tail[at..]));
    at.map_or(0, |at| tail.len() - at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(pieces: &[&str]) -> Result<Vec<String>, Found> {
        let mut scan = Scan::new(Some(Arc::new(Zeroizing::new(b"sk-ant-secret".to_vec()))));
        let mut out = Vec::new();
        for piece in pieces {
            out.push(scan.pass(Bytes::copy_from_slice(piece.as_bytes()))?);
        }
        out.push(scan.finish());
        Ok(out.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect())
    }

    #[test]
    fn the_credential_is_found_wherever_it_is_split() {
        assert_eq!(scan(&["a sk-ant-secret b"]), Err(Found));
        for at in 1.."sk-ant-secret".len() {
            let (left, right) = "sk-ant-secret".split_at(at);
            assert_eq!(scan(&[left, right]), Err(Found));
            assert_eq!(scan(&["x", left, "", right]), Err(Found));
        }
        let letters: Vec<_> = "sk-ant-sk-ant-secret".split("").collect();
        assert_eq!(scan(&letters), Err(Found));
    }

    #[test]
    fn everything_else_passes_whole_and_at_once() {
        assert_eq!(scan(&["data: {}\n\n"]), Ok(vec!["data: {}\n\n".into(), "".into()]));
        assert_eq!(scan(&["a sk-", "ant b"]), Ok(vec!["a ".into(), "sk-ant b".into(), "".into()]));
        assert_eq!(scan(&["sk-ant-secre"]), Ok(vec!["".into(), "sk-ant-secre".into()]));
        assert_eq!(scan(&["sk-ant-sk", "-x"]), Ok(vec!["sk-ant-".into(), "sk-x".into(), "".into()]));
    }
}
