//! Frames between nodes: one ordered, reliable stream per pair of nodes.
