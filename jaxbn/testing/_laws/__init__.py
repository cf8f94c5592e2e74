"""The laws of batch norm by subject; each is a function that raises an error where it does not hold."""
