"""One build's sandbox: planned as plain data, rendered for a runtime, started, supervised, captured."""
