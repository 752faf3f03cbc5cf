"""kiln runs builds: content-addressed requests in, sandboxed commands, content-addressed outputs out."""
