//! Hosts, sessions and their control.
