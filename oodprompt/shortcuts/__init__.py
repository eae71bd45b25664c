"""Suspected shortcuts by name: words whose presence in an image goes with its label."""
