"""Chosen tile sizes, one module a GPU architecture, with the reason or the measured number beside each."""
