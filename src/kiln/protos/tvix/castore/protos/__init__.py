"""Generated: tvix/castore/protos."""
