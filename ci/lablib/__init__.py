"""Emulated hosts and guest images: the parts of ci/lab and ci/image."""
