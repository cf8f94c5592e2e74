"""The commands `demo`, `sync-demo` and `diagnose`."""
