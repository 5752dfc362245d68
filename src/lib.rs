//! gaoler's command line and, behind a hidden subcommand, its frontend.
//! Nothing here is ever privileged by itself: whatever needs a privilege is asked of the supervisor.

#![forbid(unsafe_code)]

mod allowance;
pub mod command;
pub mod config;
pub mod doctor;
pub mod exec;
pub mod frontend;
mod guarantee;
mod keeper;
mod knobs;
mod ledger;
pub mod limits;
mod mcp;
mod meter;
mod operator;
mod relay;
mod reload;
pub mod report;
pub mod serve;
pub mod supervisor;
mod telemetry;
mod vault;
