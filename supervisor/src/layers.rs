//! temporary
pub fn probe(_s: std::os::fd::BorrowedFd<'_>) -> Vec<gaoler_protocol::LayerRow> {
    Vec::new()
}
