//! Bytes in frames, both ways: what breaks off is told from what ends.
//! It must never hand on bytes of a frame that is longer than a frame may be.

use std::io::{Read, Result, Write};

use gaoler_files::{Code, FRAME_BYTES_MAX};

use crate::failure::Told;

/// The bytes of the frames that come in.
pub struct FramesIn<'a> {
    input: &'a mut dyn Read,
    left: usize,
    ended: bool,
    /// Bytes so far.
    pub taken: u64,
}

impl<'a> FramesIn<'a> {
    /// Of this input.
    pub fn new(input: &'a mut dyn Read) -> FramesIn<'a> {
        FramesIn { input, left: 0, ended: false, taken: 0 }
    }
}

impl Read for FramesIn<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let cut = || Told::io(Code::Cut, "The body broke off before its end; nothing was changed.");
        while self.left == 0 {
            if self.ended {
                return Ok(0);
            }
            let mut length = [0; 4];
            self.input.read_exact(&mut length).map_err(|_| cut())?;
            self.left = u32::from_le_bytes(length) as usize;
            self.ended = self.left == 0;
            if self.left > FRAME_BYTES_MAX {
                return Err(cut());
            }
        }
        let most = buffer.len().min(self.left);
        let got = self.input.read(&mut buffer[..most])?;
        if got == 0 && most > 0 {
            return Err(cut());
        }
        self.left -= got;
        self.taken += got as u64;
        Ok(got)
    }
}

/// Writes what it is given in frames.
pub struct FramesOut<'a> {
    output: &'a mut dyn Write,
}

impl<'a> FramesOut<'a> {
    /// To this output.
    pub fn new(output: &'a mut dyn Write) -> FramesOut<'a> {
        FramesOut { output }
    }

    /// The end.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn end(self) -> Result<()> {
        self.output.write_all(&0u32.to_le_bytes())
    }
}

impl Write for FramesOut<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let piece = &bytes[..bytes.len().min(FRAME_BYTES_MAX)];
        if !piece.is_empty() {
            self.output.write_all(&(piece.len() as u32).to_le_bytes())?;
            self.output.write_all(piece)?;
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> Result<()> {
        self.output.flush()
    }
}
