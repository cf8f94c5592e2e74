"""The tests of jaxbn and of its experiments."""
