//! Virtio devices over PCI, and the PCI root they sit on.
