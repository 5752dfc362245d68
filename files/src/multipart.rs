//! Bodies of forms: parts between lines of a boundary, of which those with a file's name are files.
//! It must never hold more of a body than a piece, nor take a line of a part's bytes for a boundary.

use std::io::{Read, Result, Write};

use gaoler_files::Code;

use crate::failure::Told;

/// Bytes of a part's head.
const HEAD_BYTES_MAX: usize = 8 * 1024;
/// Bytes that are read at a time.
const PIECE: usize = 64 * 1024;

/// A form that is read part by part.
pub struct Form<'a> {
    from: &'a mut dyn Read,
    mark: Vec<u8>,
    buffer: Vec<u8>,
    ended: bool,
}

fn broken(what: &str) -> std::io::Error {
    Told::io(Code::Broken, format!("The form is broken: {what}; nothing was written."))
}

impl<'a> Form<'a> {
    /// A form with this boundary; what comes before the first is read and dropped.
    pub fn new(from: &'a mut dyn Read, boundary: &str) -> Result<Form<'a>> {
        // The first boundary may stand at the very beginning.
        let mut form = Form {
            from,
            mark: format!("\r\n--{boundary}").into_bytes(),
            buffer: b"\r\n".to_vec(),
            ended: false,
        };
        form.until_mark(&mut std::io::sink())?;
        Ok(form)
    }

    /// More bytes; `false` at the end.
    fn more(&mut self) -> Result<bool> {
        let before = self.buffer.len();
        self.buffer.resize(before + PIECE, 0);
        let got = self.from.read(&mut self.buffer[before..])?;
        self.buffer.truncate(before + got);
        Ok(got > 0)
    }

    /// Hands on the bytes before the next boundary, and takes that away.
    fn until_mark(&mut self, to: &mut dyn Write) -> Result<()> {
        let mut begin = 0;
        loop {
            match self.buffer[begin..].iter().position(|&b| b == b'\r').map(|at| at + begin) {
                Some(at) if self.buffer.len() - at >= self.mark.len() => {
                    if self.buffer[at..].starts_with(&self.mark) {
                        to.write_all(&self.buffer[..at])?;
                        self.buffer.drain(..at + self.mark.len());
                        return Ok(());
                    }
                    begin = at + 1;
                    continue;
                }
                // Nothing before it is a boundary.
                found => {
                    let sure = found.unwrap_or(self.buffer.len());
                    to.write_all(&self.buffer[..sure])?;
                    self.buffer.drain(..sure);
                    begin = 0;
                }
            }
            if !self.more()? {
                return Err(broken("its last boundary is missing"));
            }
        }
    }

    /// The name of the next part's file, empty for a part that is none; `None` after the last.
    pub fn next(&mut self) -> Result<Option<Vec<u8>>> {
        while self.buffer.len() < 2 && !self.ended {
            if !self.more()? {
                return Err(broken("it ends in a boundary"));
            }
        }
        if self.ended || self.buffer.starts_with(b"--") {
            self.ended = true;
            return Ok(None);
        }
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|it| it == b"\r\n\r\n") {
                break at;
            }
            if self.buffer.len() > HEAD_BYTES_MAX || !self.more()? {
                return Err(broken("a part has no head"));
            }
        };
        let head: Vec<u8> = self.buffer.drain(..end + 4).collect();
        Ok(Some(name(&head).unwrap_or_default()))
    }

    /// The bytes of the part.
    pub fn pour(&mut self, to: &mut dyn Write) -> Result<()> {
        self.until_mark(to)
    }
}

/// `filename="..."` of a part's head, as browsers and curl write it.
fn name(head: &[u8]) -> Option<Vec<u8>> {
    let line = head.split(|&b| b == b'\n').find(|line| {
        let known = b"content-disposition:";
        line.len() > known.len() && line[..known.len()].eq_ignore_ascii_case(known)
    })?;
    let key = b"filename=\"";
    let at = line.windows(key.len()).position(|it| it == key)? + key.len();
    let mut name = Vec::new();
    let mut bytes = line[at..].iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'"' => return Some(name),
            b'\\' => name.extend(bytes.next()),
            _ => name.push(byte),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives a few bytes at a time, so that every boundary is cut somewhere.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
            let most = self.1.min(buffer.len());
            self.0.read(&mut buffer[..most])
        }
    }

    fn parts(body: &[u8], step: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut slow = Slow(body, step);
        let mut form = Form::new(&mut slow, "XX")?;
        let mut all = Vec::new();
        while let Some(name) = form.next()? {
            let mut bytes = Vec::new();
            form.pour(&mut bytes)?;
            all.push((name, bytes));
        }
        Ok(all)
    }

    #[test]
    fn a_form_is_read_alike_however_it_is_cut() {
        let head = |name: &str| format!("\r\nContent-Disposition: form-data; name=\"f\"{name}\r\n\r\n");
        let odd = "a\r\n--X\r\n--XY\r\r\n-- XX --XX";
        let body = format!(
            "preamble\r\n--XX{}{odd}\r\n--XX{}\r\n--XX{}plain\r\n--XX--\r\nepilogue",
            head("; filename=\"a/b \\\"c\\\".txt\""),
            head("; filename=\"empty\""),
            head(""),
        );
        let expected = vec![
            (b"a/b \"c\".txt".to_vec(), odd.as_bytes().to_vec()),
            (b"empty".to_vec(), Vec::new()),
            (Vec::new(), b"plain".to_vec()),
        ];
        for step in [1, 2, 3, 7, 1000] {
            assert_eq!(parts(body.as_bytes(), step).expect("a form"), expected, "{step}");
        }
        let first = format!("--XX{}x\r\n--XX--", head("; filename=\"f\""));
        assert_eq!(parts(first.as_bytes(), 5).expect("a form").len(), 1);
        for broken in ["", "--XX", "--XX\r\n", "--XX\r\n\r\nx", "no boundary", "--XX\r\n\r\nx\r\n--X"] {
            assert!(parts(broken.as_bytes(), 4).is_err(), "{broken:?}");
        }
    }
}
