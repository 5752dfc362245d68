//! The `gaoler` binary: hands its arguments to the library and its verdict to the kernel.
//! It must never hold logic of its own.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    gaoler::command::run(std::env::args_os())
}
