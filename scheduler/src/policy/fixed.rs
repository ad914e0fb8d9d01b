//! Nothing moves but by hand.

use super::{Decision, Policy, to_pins};
use crate::load::Load;

/// Leaves every vCPU where it is, unless it is pinned elsewhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Static;

impl Policy for Static {
    fn name(&self) -> &'static str {
        "static"
    }

    fn decide(&mut self, load: &Load) -> Vec<Decision> {
        to_pins(load)
    }
}
