"""The laws of batch norm by subject.  Each is a function that raises AssertionError where the law is broken."""
