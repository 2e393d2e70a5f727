"""A web server for people who write with a model."""
