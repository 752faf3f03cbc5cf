"""Generated: snix/castore/protos."""
