"""Blob services: one backend, or one concern around any of them, a file."""
