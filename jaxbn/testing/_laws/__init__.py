"""The laws of batch norm by subject; each law is a function that raises AssertionError if it is broken."""
