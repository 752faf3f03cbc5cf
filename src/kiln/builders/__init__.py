"""Everything that implements the build protocol: backends, and wrappers of one concern each."""
