"""The laws of batch norm, put to this library and to its peers."""
