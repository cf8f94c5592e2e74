"""Tests this library and its peers against the laws of batch norm."""
