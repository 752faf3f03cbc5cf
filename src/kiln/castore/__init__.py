"""The content-addressed store: blobs and directories under their digests."""
