//! What the machine boots.
