"""Bytes between processes that may vanish or lie."""
