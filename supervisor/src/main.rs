//! Placeholder, replaced in this milestone.
fn main() {}
