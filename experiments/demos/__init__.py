"""Commands that show batch norm at work: `demo`, `sync-demo` and `diagnose`."""
